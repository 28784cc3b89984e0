"""Writes that end early: full disks, kills, interrupts. Nothing is lost."""

import contextlib
import os
import signal

import pytest
import torch

from tests.training.run_folders import fails_for, largest_file
from wus_ext.training import (
    RunWarning,
    StorageError,
    load_checkpoint,
)
from wus_ext.training.runfolder import RunFolder

from .run_folders import LAST, change, snapshot, unchanged, worse
from .tiny import trainer, weights


def test_what_a_killed_write_left_behind_is_removed(run):
    for name in ("last.pt", "best.pt", "previous.pt", "metrics.jsonl", "config.json"):
        (run / f".{name}.tmp").write_bytes(b"half")
    trainer(out=run, resume=True)
    assert not [name for name in snapshot(run) if name.startswith(".")]


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
