import csv
import dataclasses
import json

import pytest

import wus_ext
from wus_ext.cli import parser
from wus_ext.methods.table import METHODS, Method
from wus_ext.training import ConfigError, DataError, StorageError, TrainConfig
from wus_ext.training.compare import CompareConfig, compare, read_compare
from wus_ext.training.plot import _curves
from wus_ext.training.report import markdown
from wus_ext.training.run import Run
from wus_ext.training.trainer import Trainer

pytest.importorskip("matplotlib")

from . import tiny
from .run_folders import fails_for
from .test_lock import free

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def small(monkeypatch):
    """Networks and images that train in no time, under the names of real ones."""
    monkeypatch.setattr("wus_ext.training.compare.load_data", lambda config: tiny.data())
    original = Trainer.__init__

    def init(self, config, **options):
        original(self, config, build=tiny.build, **options)

    monkeypatch.setattr(Trainer, "__init__", init)


def history(seconds, accuracy, skipped=()):
    return [
        {
            "epoch": epoch,
            "train_seconds": second,
            "test_accuracy": accuracy,
            "skipped": epoch in skipped,
            "skipped_steps": 0.75 * (epoch in skipped),
            "peak_bytes": 2**20 * (2 if epoch in skipped else 8),
            "step_seconds": second / 10,
        }
        for epoch, second in enumerate(seconds, 1)
    ]


RUNS = [
    Run("vgg11", "baseline", 0, history([10, 10], 80.0)),
    Run("vgg11", "wus", 0, history([10, 4], 79.0, skipped={2})),
    Run("vgg11", "baseline in the time of wus", 0, history([10], 70.0)),
    Run("vgg11", "baseline", 1, history([20, 20], 82.0)),
    Run("vgg11", "wus", 1, history([20, 12], 81.0, skipped={2})),
    Run("vgg11", "baseline in the time of wus", 1, history([20], 74.0)),
]


def cells(table, *names):
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {' | '.join(names)} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][len(names) :]


def test_the_table_has_means_and_deviations_over_seeds():
    table = markdown(RUNS, TrainConfig(epochs=2))
    assert cells(table, "vgg11", "baseline") == [
        "2", "81.00 ± 1.41", "30.0 ± 14.1", "-", "0 ± 0", "-", "15.0 ± 7.1", "8.0 ± 0.0", "-"
    ]  # fmt: skip
    # Saved: 1 - 14/20 = 30 % and 1 - 32/40 = 20 %; a skip step costs 0.4 and 0.6 of a full one.
    # Three steps of four skip in one epoch of two. The baseline's less 1 is reached at once.
    assert cells(table, "vgg11", "wus") == [
        "2", "80.00 ± 1.41", "23.0 ± 12.7", "25.0 ± 7.1", "38 ± 0", "0.50 ± 0.14",
        "15.0 ± 7.1", "8.0 ± 0.0", "2.0 ± 0.0",
    ]  # fmt: skip
    assert cells(table, "vgg11", "baseline in the time of wus")[:2] == ["1", "72.00 ± 2.83"]
    assert "54 % WUS, 50 % WUS+LR" in table
    assert "average**" not in table


def rising(*accuracies):
    records = history([10] * len(accuracies), 0.0)
    return [{**record, "test_accuracy": a} for record, a in zip(records, accuracies, strict=True)]


@pytest.mark.parametrize(
    ("target", "times", "says"),
    [
        # 79 and 84 %, the baselines' less 1
        (None, ["20.0 ± 0.0", "30.0 (1 of 2)"], "the baseline's less 1 point"),
        (70.0, ["10.0 ± 0.0", "15.0 ± 7.1"], "first reaches 70 %"),
        (85.0, ["30.0 (1 of 2)", "-"], "first reaches 85 %"),
    ],
)
def test_the_time_to_a_target_is_that_of_the_first_epoch_that_reaches_it(target, times, says):
    runs = [
        Run("vgg11", "baseline", 0, rising(70, 79, 80)),
        Run("vgg11", "wus", 0, rising(75, 78, 79.5)),
        Run("vgg11", "baseline", 1, rising(72, 84.5, 85)),
        Run("vgg11", "wus", 1, rising(60, 71, 83)),
    ]
    table = markdown(runs, TrainConfig(epochs=3), target)
    assert [cells(table, "vgg11", name)[6] for name in ("baseline", "wus")] == times
    assert says in table


@pytest.mark.parametrize("target", [0.0, 101.0])
def test_an_impossible_target_is_refused(tmp_path, target):
    with pytest.raises(ConfigError, match="target must be in percent"):
        compare(CompareConfig(base=tiny.CONFIG), tmp_path / "out", target=target)
    assert not (tmp_path / "out").exists()


def test_several_networks_have_an_average():
    other = [Run("alexnet", run.method, run.seed, run.history) for run in RUNS[:2]]
    table = markdown([*RUNS[:2], *other], TrainConfig(epochs=2))
    assert cells(table, "**average**", "wus")[:6] == ["2", "79.00", "14.0", "30.0", "38", "0.40"]
    assert "one seed" in table


def test_a_comparison_trains_every_method_and_the_controls(tmp_path, small):
    config = CompareConfig(base=tiny.CONFIG, models=("vgg11", "alexnet"), seeds=2)
    lines = []
    runs = compare(config, tmp_path, say=lines.append)
    assert {(r.model, r.seed) for r in runs} == {(m, s) for m in config.models for s in (0, 1)}
    for run in runs:
        assert len(run.history) <= 4 if run.control else len(run.history) == 4
    assert sum(run.control for run in runs) == 8
    by_name = {(run.model, run.method, run.seed): run.history for run in runs}
    first = [
        by_name["vgg11", method, 0][0]["train_loss"] for method in ("baseline", "wus", "wus+lr")
    ]
    assert first[0] == first[1] == first[2]
    assert lines == [(tmp_path / "table.md").read_text()]
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    table = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [(row["network"], row["method"], int(row["seed"])) for row in table] == [
        (run.model, run.method, run.seed) for run in runs
    ]


def test_the_control_gets_the_time_of_the_method(tmp_path, small, monkeypatch):
    original = Trainer.run_epoch

    def run_epoch(self):
        record = original(self)
        record["train_seconds"] = 1.0 if record["skipped"] else 4.0
        return record

    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)
    config = CompareConfig(
        base=tiny.CONFIG.replace(epochs=8, max_window=9, warmup=0, schedule="constant"),
        methods=("wus",),
    )
    baseline, wus, control = compare(config, tmp_path)
    assert [record["skipped"] for record in wus.history] == [False] * 2 + [True] * 6
    # 2 * 4 + 6 * 1 = 14 of 32 seconds are 3.5 of 8 epochs.
    assert len(control.history) == 4
    assert not any(record["skipped"] for record in baseline.history)


def test_fused_full_steps_are_a_control_of_their_own(tmp_path, small, monkeypatch):
    original = Trainer.run_epoch

    def run_epoch(self):
        record = original(self)
        full = 4.0 if self.config.method == "baseline" else 2.0
        record["train_seconds"] = 1.0 if record["skipped"] else full
        return record

    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)
    base = tiny.CONFIG.replace(epochs=8, max_window=9, warmup=0, schedule="constant", full="fused")
    methods = ("baseline", "fused", "wus")
    runs = compare(CompareConfig(base=base, methods=methods), tmp_path)
    # WUS takes 2 * 2 + 6 * 1 = 10 s, fused 16, the baseline 32.
    assert {run.method: (len(run.history), run.seconds) for run in runs} == {
        "baseline": (8, 32.0),
        "fused": (8, 16.0),
        "wus": (8, 10.0),
        "baseline in the time of fused": (4, 16.0),
        "baseline in the time of wus": (2, 8.0),
        "fused in the time of wus": (5, 10.0),
    }


def test_an_interrupted_comparison_resumes_and_repeats_nothing(tmp_path, small, monkeypatch):
    config = CompareConfig(base=tiny.CONFIG, control=False)
    original, epochs = Trainer.run_epoch, []

    def run_epoch(self):
        if len(epochs) == 5:
            raise KeyboardInterrupt
        epochs.append(self.config.method)
        return original(self)

    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)
    with pytest.raises(KeyboardInterrupt):
        compare(config, tmp_path)
    assert epochs == ["baseline", "wus", "wus+lr", "baseline", "wus"]
    monkeypatch.setattr(Trainer, "run_epoch", original)
    runs = compare(config, tmp_path, resume=True)
    whole = compare(config, tmp_path / "whole")
    losses = [[[r["train_loss"] for r in run.history] for run in part] for part in (runs, whole)]
    assert losses[0] == losses[1]

    monkeypatch.setattr(Trainer, "__init__", lambda *a, **k: pytest.fail("trained again"))
    assert [r.history for r in compare(config, tmp_path, resume=True)] == [r.history for r in runs]


def torn(text):
    return text[:-40]


@pytest.mark.parametrize(
    "damage",
    [torn, lambda text: '{"step": 1}\n' + text, lambda text: text + text, lambda text: ""],
    ids=["torn", "foreign", "twice", "empty"],
)
@pytest.mark.filterwarnings("ignore::wus_ext.training.RunWarning")
def test_damaged_metrics_are_mended_and_nothing_is_trained_again(
    tmp_path, small, monkeypatch, damage
):
    config = CompareConfig(base=tiny.CONFIG, control=False)
    runs = compare(config, tmp_path)
    paths = sorted(tmp_path.rglob("metrics.jsonl"))
    whole = [path.read_text() for path in paths]
    for path, text in zip(paths, whole, strict=True):
        path.write_text(damage(text))
    monkeypatch.setattr(Trainer, "__init__", lambda *a, **k: pytest.fail("trained again"))
    assert [r.history for r in compare(config, tmp_path, resume=True)] == [r.history for r in runs]
    assert [path.read_text() for path in paths] == whole


def test_of_a_finished_run_the_checkpoints_may_be_removed(tmp_path, small, monkeypatch):
    config = CompareConfig(base=tiny.CONFIG, control=False)
    runs = compare(config, tmp_path)
    for path in tmp_path.rglob("*.pt"):
        path.unlink()
    monkeypatch.setattr(Trainer, "__init__", lambda *a, **k: pytest.fail("trained again"))
    assert [r.history for r in compare(config, tmp_path, resume=True)] == [r.history for r in runs]
    metrics = next(tmp_path.rglob("metrics.jsonl"))
    metrics.write_text(torn(metrics.read_text()))
    with pytest.raises(DataError, match=r"last\.pt is missing"):
        compare(config, tmp_path, resume=True)


def test_a_run_of_other_settings_is_not_taken_for_one_of_the_comparison(tmp_path, small):
    config = CompareConfig(base=tiny.CONFIG, control=False)
    compare(config, tmp_path)
    path = tmp_path / "vgg11" / "wus-seed0" / "config.json"
    path.write_text(path.read_text().replace('"lr": 0.05', '"lr": 0.5'))
    with pytest.raises(ConfigError, match=r"cannot resume .*wus-seed0: lr is 0\.5 there, 0\.05 he"):
        compare(config, tmp_path, resume=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "expected names with values, got list"),
        ('{"seeds": "2"}', "seeds must be an integer, got '2'"),
        ('{"control": "no"}', "control must be true or false"),
        ('{"train_gamma": "no"}', "train_gamma must be true or false"),
    ],
)
def test_unreadable_settings_are_named(tmp_path, content, message):
    (tmp_path / "compare.json").write_text(content)
    with pytest.raises(ConfigError, match=rf"compare\.json is not readable: {message}"):
        read_compare(tmp_path)


def test_a_comparison_locks_its_folder_and_leaves_it(tmp_path, small, monkeypatch):
    original, seen = Trainer.run_epoch, []

    def run_epoch(self):
        seen.append(free(tmp_path))
        return original(self)

    monkeypatch.setattr(Trainer, "run_epoch", run_epoch)
    compare(CompareConfig(base=tiny.CONFIG, methods=("baseline",)), tmp_path)
    assert seen == [False] * 4
    assert not list(tmp_path.rglob(".lock"))


@pytest.mark.parametrize("name", ["compare.json", "table.md", "table.csv", "plot.png"])
def test_what_cannot_be_written_is_named(tmp_path, small, monkeypatch, name):
    config = CompareConfig(base=tiny.CONFIG, methods=("baseline",))
    fails_for(name, monkeypatch)
    with pytest.raises(StorageError, match=rf"cannot write .*{name}: No space left on device"):
        compare(config, tmp_path / "out")
    monkeypatch.undo()
    assert (tmp_path / "out").exists() == (name != "compare.json")


def test_a_resumed_comparison_may_get_more_seeds(tmp_path, small):
    one = CompareConfig(base=tiny.CONFIG, methods=("baseline",), control=False)
    two = dataclasses.replace(one, seeds=2)
    first = compare(one, tmp_path)
    both = compare(two, tmp_path, resume=True)
    assert [run.seed for run in both] == [0, 1]
    assert both[0].history == first[0].history
    assert read_compare(tmp_path) == two


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"models": ()}, "models must be one or more"),
        ({"models": ("vgg11", "vgg11")}, "models must be one or more different"),
        ({"methods": ("sgd",)}, "method must be one of"),
        ({"base": TrainConfig(epochs=-1)}, "epochs must be at least 1"),
    ],
    ids=["seeds", "no-model", "twice", "method", "base"],
)
def test_a_bad_comparison_is_refused_before_any_work(tmp_path, changes, message):
    config = CompareConfig(**{"base": tiny.CONFIG, **changes})
    with pytest.raises(ConfigError, match=message):
        compare(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_does_not_fit_is_refused(tmp_path, small):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    config = CompareConfig(base=tiny.CONFIG, seeds=2)
    with pytest.raises(ConfigError, match="is not empty"):
        compare(config, tmp_path / "other")
    with pytest.raises(ConfigError, match="no comparison to resume"):
        compare(config, tmp_path / "other", resume=True)
    (tmp_path / "compare.json").write_text(json.dumps(config.to_dict()))
    contradiction = CompareConfig(base=tiny.CONFIG.replace(lr=0.5), seeds=1)
    with pytest.raises(
        ConfigError, match=r"seeds is 2 there, 1 here; lr is 0\.05 there, 0\.5 here"
    ):
        compare(contradiction, tmp_path, resume=True)


class EveryOther:
    """A policy of its own: every second epoch skips."""

    layers = None

    def __init__(self, model):
        self.model, self.epochs = model, 0

    @property
    def skipping(self):
        return self.epochs % 2 == 1

    def step(self, accuracy):
        self.epochs += 1
        wus_ext.set_skip(self.model, self.skipping)
        return self.skipping

    def state_dict(self):
        return {"epochs": self.epochs}


def test_a_method_is_a_row_of_the_table(tmp_path, small, monkeypatch):
    """Trainer, command line, table and picture take it from there."""
    row = Method(
        name="every-other",
        label="every other",
        colour="#CC79A7",
        about="skips every second epoch",
        build=lambda model, scheduler, **settings: EveryOther(model),
    )
    monkeypatch.setitem(METHODS, row.name, row)
    runs = compare(CompareConfig(base=tiny.CONFIG, methods=(row.name,)), tmp_path)
    by_method = {run.method: run for run in runs}
    assert list(by_method) == ["baseline", row.name, f"baseline in the time of {row.name}"]
    assert [r["skipped"] for r in by_method[row.name].history] == [False, True, False, True]
    assert cells((tmp_path / "table.md").read_text(), "vgg11", row.name)[4] == "50"
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)
    parsed = parser().parse_args(["train", "--method", row.name])
    assert parsed.method == row.name


def test_the_picture_draws_what_runs_share_once():
    """WUS is drawn from where it parts with the fused run, and skipped epochs are dots."""
    figure = pytest.importorskip("matplotlib.figure").Figure()
    fused = rising(50, 60, 70, 72)
    wus = [*fused[:2], *({**r, "skipped": True} for r in rising(50, 60, 71, 71.5)[2:])]
    baseline = [{**record, "train_seconds": 20} for record in fused]  # another time: another line
    runs = [
        Run("vgg11", name, 0, history)
        for name, history in (("baseline", baseline), ("fused", fused), ("wus", wus))
    ]
    _curves(axes := figure.subplots(), runs)
    lines = {
        (line.get_color(), line.get_marker()): list(line.get_ydata()) for line in axes.get_lines()
    }
    colour = {name: METHODS[name].colour for name in ("fused", "wus")}
    assert lines[colour["fused"], "None"] == [50, 60, 70, 72]
    assert lines[colour["wus"], "None"] == [60, 71, 71.5]
    assert lines[colour["wus"], "o"] == [71, 71.5]
    assert lines[colour["fused"], "o"] == []
