"""The folder of a run: nothing lost, nothing taken for what it is not, nothing in silence."""

import contextlib
import csv
import errno
import json
import os
import resource
import shutil
import signal
import warnings

import pytest
import torch
from torch import nn

from wus_ext.training import (
    ConfigError,
    DataError,
    RunWarning,
    StorageError,
    TrainConfig,
    load_checkpoint,
)
from wus_ext.training.checkpoint import pack_checkpoint
from wus_ext.training.runfolder import RunFolder

from . import tiny
from .rights import without_override
from .test_lock import held_by_another
from .tiny import trainer, weights

METHODS = ["baseline", "fused", "wus", "wus+lr"]
LAST = "last.pt"


def snapshot(folder):
    """Every file of the run, to the byte."""
    return {
        path.name: path.read_bytes() if path.is_file() else None
        for path in folder.iterdir()
        if path.name != ".lock"
    }


@contextlib.contextmanager
def unchanged(folder):
    before = snapshot(folder)
    yield
    assert snapshot(folder) == before


def refuses(folder, message, error=DataError, **settings):
    """Resuming fails with one line and changes nothing."""
    with unchanged(folder), pytest.raises(error, match=message) as caught:
        trainer(out=folder, resume=True, **settings)
    assert "\n" not in str(caught.value)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def change(folder, **values):
    """As if the run had stored other values: whole, with the right checksum."""
    state = load_checkpoint(folder / LAST)
    for name, value in values.items():
        if value is None:
            del state[name]
        else:
            state[name] = value
    (folder / LAST).write_bytes(pack_checkpoint(state))


@pytest.fixture
def run(tmp_path):
    """The folder of a run that stopped after three epochs of four."""
    stopped = trainer(out=tmp_path)
    for _ in range(3):
        stopped.run_epoch()
    del stopped
    return tmp_path


# What it holds


def test_a_run_folder_holds_settings_metrics_and_checkpoints(tmp_path):
    run = trainer(out=tmp_path / "run")
    run.run()
    folder = tmp_path / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.pt", "config.json", "last.pt", "metrics.csv", "metrics.jsonl"
    ]  # fmt: skip
    content = json.loads((folder / "config.json").read_text())
    assert TrainConfig.from_dict(content["config"]) == run.config
    assert RunFolder(folder).history() == run.history
    for name, epoch in (("last.pt", 4), ("best.pt", run.best_epoch)):
        assert torch.load(folder / name, weights_only=True)["epoch"] == epoch
    accuracies = [record["test_accuracy"] for record in run.history]
    assert run.best_epoch == 1 + accuracies.index(max(accuracies))


def test_the_metrics_are_a_table_too(run):
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    history = RunFolder(run).history()
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3]
    assert [float(row["test_loss"]) for row in rows] == [r["test_loss"] for r in history]
    assert {row["validation_accuracy"] for row in rows} == {""}
    assert list(rows[0]) == list(history[0])
    (run / "metrics.csv").write_text("epoch\n1\n")
    trainer(out=run, resume=True).run()
    assert len((run / "metrics.csv").read_text().splitlines()) == 5


def test_the_epoch_before_is_kept_until_the_run_is_finished(tmp_path):
    run = trainer(out=tmp_path)
    for epoch in (1, 2, 3):
        run.run_epoch()
        assert load_checkpoint(tmp_path / LAST)["epoch"] == epoch
        assert (tmp_path / "previous.pt").exists() == (epoch > 1)
        if epoch > 1:
            assert load_checkpoint(tmp_path / "previous.pt")["epoch"] == epoch - 1
    run.run_epoch()
    assert not (tmp_path / "previous.pt").exists()


def test_damage_of_the_last_checkpoint_is_never_that_of_all(tmp_path):
    """A link is damaged with its file."""
    run = trainer(out=tmp_path)
    run.run_epoch()
    while not run.finished:
        run.run_epoch()
        others = [tmp_path / name for name in ("previous.pt", "best.pt")]
        others = [path for path in others if path.exists()]
        assert not all(path.samefile(tmp_path / LAST) for path in others)
    assert [path.name for path in others] == ["best.pt"]


def test_of_a_run_that_ends_with_its_best_epoch_both_files_remain(run):
    change(run, best_epoch=1, history=worse(load_checkpoint(run / LAST)["history"]))
    with pytest.warns(RunWarning, match="did not agree"):
        resumed = trainer(out=run, resume=True)
    resumed.run()
    assert resumed.best_epoch == 4
    assert not (run / "previous.pt").exists()
    assert not (run / LAST).samefile(run / "best.pt")
    assert (run / LAST).read_bytes() == (run / "best.pt").read_bytes()


def worse(history):
    """So that the next epoch is the best."""
    return [{**record, "test_accuracy": 0.0} for record in history]


@pytest.mark.parametrize("amp", ["off", "fp16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stop", [0, 1, 3])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path, method, amp, stop):
    whole = trainer(method=method, amp=amp)
    whole.run()
    first = trainer(out=tmp_path, method=method, amp=amp)
    for _ in range(stop):
        first.run_epoch()
    torch.rand(7)
    second = trainer(out=tmp_path, method=method, amp=amp, resume=True)
    assert len(second.history) == stop
    second.run()
    assert torch.equal(weights(second), weights(whole))
    timeless = [
        {k: v for k, v in r.items() if "second" not in k} for r in second.history + whole.history
    ]
    assert timeless[:4] == timeless[4:]
    assert method in ("baseline", "fused") or any(record["skipped"] for record in whole.history)


def test_resuming_a_finished_run_does_nothing(tmp_path):
    done = trainer(out=tmp_path)
    done.run()
    with unchanged(tmp_path):
        again = trainer(out=tmp_path, resume=True)
        assert again.finished
        assert again.run() == done.history


# Who may write


@pytest.mark.parametrize(
    ("prepare", "resume", "error", "message"),
    [
        (lambda out: trainer(out=out), False, ConfigError, "already holds a run"),
        (lambda out: (out / "thesis.txt").write_text(""), False, ConfigError, "is no run"),
        (lambda out: None, True, ConfigError, "no run to resume"),
        (
            lambda out: trainer(out=out, lr=0.1, seed=3),
            True,
            ConfigError,
            "lr is 0.1 there, 0.05 here; seed is 3 there, 0 here",
        ),
    ],
    ids=["existing", "foreign", "absent", "contradiction"],
)
def test_a_folder_that_does_not_fit_is_refused(tmp_path, prepare, resume, error, message):
    prepare(tmp_path)
    with pytest.raises(error, match=message):
        trainer(out=tmp_path, resume=resume)


def test_a_run_is_not_resumed_while_another_process_trains_it(run):
    with held_by_another(run):
        refuses(run, r"is in use by another run \(process 123 on elsewhere\)", ConfigError)
    assert trainer(out=run, resume=True).run()[-1]["epoch"] == 4


def test_no_run_begins_where_another_process_is_about_to(tmp_path):
    folder = tmp_path / "run"
    with held_by_another(folder), pytest.raises(ConfigError, match="is in use by another run"):
        trainer(out=folder)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_run_that_began_in_between_is_not_written_over(tmp_path, monkeypatch):
    """Between the look into the folder and the lock."""
    acquire = RunFolder.__init__.__globals__["FolderLock"].acquire

    def late(lock):
        monkeypatch.undo()
        other = trainer(out=lock.path)
        other.run_epoch()
        other.folder.release()
        acquire(lock)

    monkeypatch.setattr("wus_ext.training.lock.FolderLock.acquire", late)
    with pytest.raises(ConfigError, match="already holds a run"):
        trainer(out=tmp_path / "run")
    assert load_checkpoint(tmp_path / "run" / LAST)["epoch"] == 1


def test_an_earlier_trainer_of_the_process_does_not_write_any_more(run):
    first = trainer(out=run, resume=True)
    second = trainer(out=run, resume=True)
    with unchanged(run), pytest.raises(StorageError, match="belongs to a later run"):
        first.run_epoch()
    second.run_epoch()
    assert len(RunFolder(run).history()) == 4


def test_a_finished_run_is_locked_no_more(tmp_path):
    run = trainer(out=tmp_path)
    run.run()
    with held_by_another(tmp_path):
        assert run.finished


@pytest.mark.parametrize(
    "fail",
    [
        {"build": lambda classes: 1 / 0},
        {"device": "cuda:99"},
        {"batch_size": 2**70},
    ],
    ids=["network", "device", "size"],
)
def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path, fail):
    with pytest.raises((ConfigError, ZeroDivisionError)):
        trainer(out=tmp_path / "runs" / "run", **fail)
    assert list(tmp_path.iterdir()) == []


def test_a_read_only_folder_is_refused_at_once(run):
    os.chmod(run, 0o555)
    try:
        with without_override():
            refuses(run, r"cannot write to .*\(Permission denied\): choose another", ConfigError)
    finally:
        os.chmod(run, 0o755)


# Damage


def test_a_damaged_checkpoint_is_named_and_the_one_before_continues_exactly(run):
    whole = trainer()
    whole.run()
    flip(run / LAST)
    with unchanged(run), pytest.raises(DataError, match=r"last\.pt is damaged") as caught:
        trainer(out=run, resume=True)
    message, _, command = str(caught.value).rpartition(": ")
    assert f"{run / 'previous.pt'} is whole, to continue after epoch 2" in message
    copy, source, target = command.split()
    assert copy == "cp"
    shutil.copy(source, target)
    with pytest.warns(RunWarning, match=r"metrics\.jsonl did not agree"):
        resumed = trainer(out=run, resume=True)
    assert len(resumed.history) == 2
    resumed.run()
    assert torch.equal(weights(resumed), weights(whole))
    assert len(RunFolder(run).history()) == 4


def test_only_a_whole_checkpoint_is_recommended(run):
    best = load_checkpoint(run / "best.pt")["epoch"]
    flip(run / LAST)
    flip(run / "previous.pt")
    refuses(run, rf"best\.pt is whole, to continue after epoch {best}: cp ")
    flip(run / "best.pt")
    refuses(run, r"there is no whole previous\.pt or best\.pt either: choose another --out")


def test_of_a_finished_run_the_best_epoch_is_left(tmp_path):
    done = trainer(out=tmp_path)
    done.run()
    flip(tmp_path / LAST)
    refuses(tmp_path, rf"best\.pt is whole, to continue after epoch {done.best_epoch}: cp ")
    shutil.copy(tmp_path / "best.pt", tmp_path / LAST)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)
        again = trainer(out=tmp_path, resume=True)
    again.run()
    assert torch.equal(weights(again), weights(done))


def test_a_damaged_best_checkpoint_is_said(run):
    state = load_checkpoint(run / LAST)
    if state["best_epoch"] == state["epoch"]:
        change(run, best_epoch=state["epoch"] - 1)
    flip(run / "best.pt")
    with pytest.warns(RunWarning, match=r"best\.pt is damaged.* it held epoch \d, the best so far"):
        trainer(out=run, resume=True)
    (run / "best.pt").unlink()
    with pytest.warns(RunWarning, match=r"best\.pt is missing"):
        trainer(out=run, resume=True)


def test_the_best_checkpoint_is_mended_if_the_last_is_the_best(tmp_path):
    """It may be of an epoch before: the process was killed between two files."""
    trainer(out=tmp_path).run_epoch()
    for content in (None, b"half", pack_checkpoint({"epoch": 0})):
        (tmp_path / "best.pt").unlink()
        if content:
            (tmp_path / "best.pt").write_bytes(content)
        trainer(out=tmp_path, resume=True)
        assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 1


@pytest.mark.parametrize("left", [["metrics.jsonl"], ["previous.pt"], ["best.pt"], None])
def test_a_missing_checkpoint_is_no_reason_to_start_over(run, left):
    (run / LAST).unlink()
    for name in {"metrics.jsonl", "previous.pt", "best.pt"} - set(left or snapshot(run)):
        (run / name).unlink()
    refuses(run, r"last\.pt is missing; ")


def test_a_run_that_stored_nothing_starts_from_the_beginning(tmp_path):
    trainer(out=tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert trainer(out=tmp_path, resume=True).history == []
    (tmp_path / "metrics.jsonl").unlink()
    assert trainer(out=tmp_path, resume=True).history == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "is not the state of a run"),
        ([1, 2], "is not the state of a run"),
        ({"weight": torch.zeros(3)}, "is not the state of a run"),
        ({"format": 2}, "is not the state of a run: config is missing"),
        ({"format": 99}, "has format 99, this version reads 2"),
    ],
    ids=["empty", "list", "weights", "format", "future"],
)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "torch"])
def test_a_foreign_checkpoint_is_refused(run, content, message, packed):
    if packed:
        (run / LAST).write_bytes(pack_checkpoint(content))
    else:
        torch.save(content, run / LAST)
    refuses(run, rf"last\.pt {message}.*previous\.pt is whole")


STATE = ("config", "epoch", "best_epoch", "history", "model", "optimizer", "scaler")


@pytest.mark.parametrize("name", STATE)
@pytest.mark.parametrize("value", [None, "text"], ids=["missing", "text"])
def test_a_checkpoint_without_a_part_is_refused(run, name, value):
    change(run, **{name: value})
    refuses(run, rf"last\.pt is not the state of a run: {name} is (missing|'text')")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 2}, "it has 3 records, epoch 2 and best epoch"),
        ({"best_epoch": 9}, "it has 3 records, epoch 3 and best epoch 9"),
        ({"history": [{"epoch": 1}] * 3}, "the record of epoch 1 lacks lr"),
        ({"history": ["torn"] * 3}, "expected the record of epoch 1, got 'torn'"),
        ({"config": {"lr": "fast"}}, "lr must be a number, got 'fast'"),
        ({"config": {"colour": 1}}, "unknown setting: colour"),
        ({"processes": "many"}, "processes is 'many'"),
        ({"policy": 3}, "policy is 3"),
    ],
    ids=["epoch", "best", "records", "torn", "value", "setting", "processes", "policy"],
)
def test_a_checkpoint_that_contradicts_itself_is_refused(run, values, message):
    change(run, **values)
    refuses(run, rf"last\.pt is not the state of a run: {message}")


def other_network(classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, classes))


@pytest.mark.parametrize(
    "part",
    [
        {"model": {}},
        {"model": {"0.weight": "text"}},
        {"optimizer": {}},
        {"optimizer": {"state": {}, "param_groups": [{"params": [0]}]}},
        {"policy": {"settings": {}}},
        {"scheduler": "none"},
        {"scaler": {"scale": 1}},
    ],
    ids=lambda part: next(iter(part)),
)
def test_a_state_that_does_not_fit_is_refused(run, part):
    settings = {"amp": "fp16"} if "scaler" in part else {}
    if settings:
        config = json.loads((run / "config.json").read_text())
        config["config"] |= settings
        (run / "config.json").write_text(json.dumps(config))
        change(run, config=config["config"])
    change(run, **part)
    refuses(run, r"last\.pt (does not fit the settings \(|is not the state of a run)", **settings)


def test_the_state_of_another_network_is_refused(run):
    refuses(run, r"last\.pt does not fit the settings \(.*size|key", build=other_network)


def test_momentum_of_another_shape_is_refused(run):
    state = load_checkpoint(run / LAST)["optimizer"]
    state["state"][0]["momentum_buffer"] = torch.zeros(7)
    change(run, optimizer=state)
    refuses(run, r"does not fit the settings \(ValueError: momentum_buffer of \[7\]\)")


# Settings


EDITS = {"lr": 0.5, "seed": 7, "limit_train": 20, "model": "alexnet", "amp": "bf16"}


@pytest.mark.parametrize("name", EDITS)
def test_settings_and_checkpoint_must_agree(run, name):
    path = run / "config.json"
    content = json.loads(path.read_text())
    before, content["config"][name] = content["config"][name], EDITS[name]
    path.write_text(json.dumps(content))
    message = (
        rf"cannot resume .*: {name} is {EDITS[name]!r} in .*config\.json, {before!r} in "
        r".*last\.pt; put config\.json back"
    )
    refuses(run, message, ConfigError, **{name: EDITS[name]})


def test_where_things_are_may_change(run):
    moved = {"data_dir": "elsewhere", "workers": 0, "memory_budget": 1.0, "download": False}
    assert len(trainer(out=run, resume=True, **moved).run()) == 4
    trainer(out=run, resume=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "Expecting property name"),
        ("[1]", "expected names with values, got list"),
        ("{}", "it lacks 'config'"),
        ('{"config": 3}', "settings must be names with values, got int"),
        ('{"config": {"train_gamma": "no"}}', "train_gamma must be true or false, got 'no'"),
        ('{"config": {"colour": 1}}', "unknown setting: colour"),
        ('{"config": {"lr": -1}}', "lr must be positive, got -1"),
        ("[" * 100_000, "recursion"),
        (b"\xff\xfe", "codec can't decode"),
    ],
    ids=["half", "list", "empty", "number", "value", "setting", "range", "deep", "binary"],
)
def test_unreadable_settings_are_named(run, content, message):
    path = run / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(run, rf"config\.json is not readable: .*{message}", ConfigError)


# Metrics


def torn(text):
    return text[: len(text) - 40]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: "", False),
        (torn, False),
        (lambda text: "".join(text.splitlines(keepends=True)[:2]), False),
        (lambda text: text + '{"epoch": 4, "torn', True),
        (lambda text: torn(text) + "\n", True),
        (lambda text: text + text, True),
        (lambda text: '{"step": 1}\n', True),
        (lambda text: "\0" * 99, True),
        (lambda text: text.replace('"epoch": 2', '"epoch": 5'), True),
    ],
    ids=["empty", "torn", "line-missing", "torn-next", "torn-line", "twice", "foreign", "zeros",
         "renumbered"],
)  # fmt: skip
def test_metrics_are_mended_from_the_checkpoint(run, damage, said):
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(damage(whole))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        resumed = trainer(out=run, resume=True)
    assert metrics.read_text() == whole
    assert any("metrics.jsonl did not agree with" in str(w.message) for w in caught) == said
    resumed.run()
    assert len(RunFolder(run).history()) == 4


def test_metrics_that_are_no_file_do_not_block(run):
    (run / "metrics.jsonl").unlink()
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(DataError, match=r"metrics\.jsonl is no file"):
        trainer(out=run, resume=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"epoch": 4, "torn', r"metrics\.jsonl is damaged in line 4: "),
        ('{"step": 1}', "expected the record of epoch 4, got {'step': 1}"),
        ("3", "expected the record of epoch 4, got 3"),
        ('{"epoch": 4}', "the record of epoch 4 lacks lr"),
    ],
)
def test_damaged_metrics_are_not_read(run, line, message):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(line)
    with pytest.raises(DataError, match=message):
        RunFolder(run).history()


@pytest.mark.parametrize(
    ("name", "value"), [("skipped", "no"), ("test_accuracy", None), ("peak_bytes", 1.5)]
)
def test_a_record_of_wrong_values_is_not_read(run, name, value):
    records = RunFolder(run).history()
    records[1][name] = value
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(DataError, match=f"in the record of epoch 2, {name} must be "):
        RunFolder(run).history()


def test_what_a_killed_write_left_behind_is_removed(run):
    for name in ("last.pt", "best.pt", "previous.pt", "metrics.jsonl", "config.json"):
        (run / f".{name}.tmp").write_bytes(b"half")
    trainer(out=run, resume=True)
    assert not [name for name in snapshot(run) if name.startswith(".")]


# Storing


@contextlib.contextmanager
def largest_file(size):
    """The system refuses to write more, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_epoch_before(run):
    resumed = trainer(out=run, resume=True)
    with (
        unchanged(run),
        largest_file(2000),
        pytest.raises(StorageError, match=r"cannot write .*last\.pt: File too large; ") as caught,
    ):
        resumed.run_epoch()
    assert f"; {run / LAST} keeps epoch 3, continue with --resume" in str(caught.value)
    whole = trainer()
    whole.run()
    again = trainer(out=run, resume=True)
    assert len(again.history) == 3
    again.run()
    assert torch.equal(weights(again), weights(whole))


def test_a_full_disk_in_the_first_epoch(tmp_path):
    run = trainer(out=tmp_path)
    with largest_file(2000), pytest.raises(StorageError, match="no epoch is stored yet"):
        run.run_epoch()
    assert len(trainer(out=tmp_path, resume=True).run()) == 4


def fails_for(name, monkeypatch, reason=errno.ENOSPC):
    """The file of this name cannot be replaced."""
    replace = os.replace

    def full(source, target):
        if os.path.basename(target) == name:
            raise OSError(reason, os.strerror(reason))
        replace(source, target)

    monkeypatch.setattr("os.replace", full)


@pytest.mark.parametrize(
    ("name", "kept"), [("previous.pt", 3), (LAST, 3), ("best.pt", 4), ("metrics.jsonl", 4)]
)
def test_whatever_cannot_be_written_is_named_with_what_is_kept(run, monkeypatch, name, kept):
    change(run, best_epoch=1, history=worse(load_checkpoint(run / LAST)["history"]))
    with pytest.warns(RunWarning, match="did not agree"):
        resumed = trainer(out=run, resume=True)
    fails_for(name, monkeypatch)
    message = rf"cannot write .*{name}: No space left on device; .*last\.pt keeps epoch {kept}"
    with pytest.raises(StorageError, match=message):
        resumed.run_epoch()
    monkeypatch.undo()
    assert load_checkpoint(run / LAST)["epoch"] == kept
    again = trainer(out=run, resume=True)
    assert len(again.run()) == 4
    assert load_checkpoint(run / "best.pt")["epoch"] == 4
    assert RunFolder(run).history() == again.history


def test_a_trainer_goes_on_once_there_is_room_again(run):
    resumed = trainer(out=run, resume=True, epochs=4)
    resumed.config = resumed.config.replace(epochs=5)
    with largest_file(2000), pytest.raises(StorageError):
        resumed.run_epoch()
    resumed.run_epoch()
    assert [record["epoch"] for record in RunFolder(run).history()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupt_while_files_are_written_waits_for_their_end(run, monkeypatch, at):
    """Whatever sync of a file or a folder it falls into."""
    resumed, calls, fsync = trainer(out=run, resume=True), [], os.fsync

    def sync(descriptor):
        fsync(descriptor)
        calls.append(descriptor)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("os.fsync", sync)
    with contextlib.suppress(KeyboardInterrupt):
        resumed.run_epoch()
    assert load_checkpoint(run / LAST)["epoch"] == 4
    assert len(RunFolder(run).history()) == 4
    assert len(calls) < at or signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_inside_torch_save_is_an_interrupt(run, monkeypatch):
    import io

    class Interrupted(io.BytesIO):
        def write(self, data):
            signal.raise_signal(signal.SIGINT)
            return super().write(data)

    resumed = trainer(out=run, resume=True)
    monkeypatch.setattr("wus_ext.training.checkpoint.io.BytesIO", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        resumed.run_epoch()
    assert load_checkpoint(run / LAST)["epoch"] == 4


def test_finished_says_what_a_comparison_need_not_train(run):
    folder, config = RunFolder(run), tiny.CONFIG
    assert RunFolder(run / "nowhere").finished(config) is None
    assert folder.finished(config) is None
    done = trainer(out=run, resume=True)
    done.run()
    whole = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(torn(whole) + "\n")
    with pytest.warns(RunWarning, match="did not agree"):
        assert folder.finished(config) == done.history
    assert (run / "metrics.jsonl").read_text() == whole
    with pytest.raises(ConfigError, match="seed is 0 there, 3 here"):
        folder.finished(config.replace(seed=3))
    (run / LAST).unlink()
    assert folder.finished(config) == done.history
    (run / "metrics.jsonl").write_text(torn(whole))
    with pytest.raises(DataError, match=r"last\.pt is missing"):
        folder.finished(config)


def test_a_trainer_says_that_it_is_resumed_in_other_processes(run):
    change(run, processes=3)
    refuses(run, "it trained in 3 processes, here are 1", ConfigError)
