"""The folder of a run: nothing lost, nothing taken for what it is not, nothing in silence."""

import csv
import json
import os

import pytest
import torch

from wus_ext.training import (
    ConfigError,
    DataError,
    RunWarning,
    StorageError,
    TrainConfig,
    load_checkpoint,
)
from wus_ext.training.runfolder import RunFolder

from . import tiny
from .rights import without_override
from .run_folders import LAST, METHODS, change, refuses, torn, unchanged, worse
from .test_lock import held_by_another
from .tiny import trainer, weights


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
