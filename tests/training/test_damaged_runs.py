"""Damaged files of a run: named, mended where the rest holds it, else refused."""

import json
import os
import shutil
import warnings

import pytest
import torch

from wus_ext.training import (
    DataError,
    RunWarning,
    load_checkpoint,
)
from wus_ext.training.checkpoint import pack_checkpoint
from wus_ext.training.runfolder import RunFolder

from .run_folders import LAST, change, flip, refuses, snapshot, torn, unchanged
from .tiny import trainer, weights


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
