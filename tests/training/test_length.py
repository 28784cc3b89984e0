"""How long a run is: early stopping, and runs that become longer."""

import json

import pytest
import torch

from wus_ext.cli import main
from wus_ext.training import ConfigError, RunWarning, load_checkpoint
from wus_ext.training.length import last_epoch, stopped_at
from wus_ext.training.runfolder import RunFolder

from . import tiny
from .command import SETTINGS, patched
from .tiny import trainer, weights


def records(*accuracies):
    return [{"validation_accuracy": accuracy} for accuracy in accuracies]


@pytest.mark.parametrize(
    ("accuracies", "patience", "epoch"),
    [
        ((50, 60, 60, 59), 2, 4),
        ((50, 60, 60), 2, None),
        ((50, 60, 60, 59, 99), 2, 4),
        ((50, 40, 51, 40, 52), 2, None),
        ((0, 0), 1, 2),
        ((50, 40, 30), None, None),
        ((), 1, None),
    ],
)
def test_a_run_stops_after_epochs_without_a_better_one(accuracies, patience, epoch):
    assert stopped_at(records(*accuracies), patience) == epoch


def falling(monkeypatch, *accuracies):
    """Evaluations of the validation part give these, one after the other."""
    from wus_ext.training import trainer as module

    original = module.Trainer._evaluate

    def evaluate(self, split):
        result = original(self, split)
        if split is self.data.validation:
            object.__setattr__(result, "accuracy", accuracies[len(self.history)])
        return result

    monkeypatch.setattr(module.Trainer, "_evaluate", evaluate)


STOPS = {"early_stop": 2, "validation": 0.1, "epochs": 9, "threshold": 0.0}


def stopping(**settings):
    return trainer(data=tiny.data(validation=6), **{**STOPS, **settings})


def test_the_trainer_stops_and_its_checkpoint_is_finished(monkeypatch, tmp_path):
    falling(monkeypatch, 50, 60, 60, 59)
    run = stopping(method="baseline", out=tmp_path)
    assert len(run.run()) == 4
    assert run.finished
    assert run.best_epoch == 2
    assert not (tmp_path / "previous.pt").exists()
    again = stopping(method="baseline", out=tmp_path, resume=True)
    assert again.finished
    assert again.run() == run.history


@pytest.mark.parametrize("resumed", [False, True])
def test_a_run_that_stops_early_still_ends_in_its_window(monkeypatch, tmp_path, resumed):
    falling(monkeypatch, 50, 60, 60, 59, 70, 80)
    settings = {"method": "wus", "schedule": "constant", "final_window": 2}
    run = stopping(out=tmp_path, **settings)
    if resumed:
        for _ in range(4):
            run.run_epoch()
        run = stopping(out=tmp_path, resume=True, **settings)
    assert [r["skipped"] for r in run.run()] == [False] * 4 + [True] * 2
    assert last_epoch(run.config, run.history) == 6


def test_the_last_epoch_is_never_behind_the_end(monkeypatch):
    falling(monkeypatch, 50, 40, 30, 20)
    run = stopping(method="wus", schedule="constant", final_window=2, epochs=4)
    assert len(run.run()) == 4


def test_the_command_says_that_it_stopped(monkeypatch, tmp_path, capsys):
    falling(monkeypatch, 50, 40, 30)
    patched(monkeypatch)
    monkeypatch.setattr(tiny, "data", lambda original=tiny.data: original(validation=6))
    arguments = [
        "--validation",
        "0.1",
        "--early-stop",
        "2",
        "--epochs",
        "8",
        "--method",
        "baseline",
    ]
    assert main(["train", *SETTINGS, *arguments, "--out", str(tmp_path)]) == 0
    said = "stopped before epoch 4 of 8: no better validation accuracy in 2 epochs"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"early_stop": 0, "validation": 0.1}, "early_stop must be at least 1, got 0"),
        ({"early_stop": 3}, "early_stop needs a validation fraction above 0"),
    ],
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        tiny.CONFIG.replace(**settings).validate()


# Longer runs

CONSTANT = {"schedule": "constant", "final_window": 0, "method": "wus"}


@pytest.mark.parametrize("done", [2, 4])
def test_an_extended_run_is_the_longer_run(tmp_path, done):
    whole = trainer(epochs=6, **CONSTANT)
    whole.run()
    first = trainer(out=tmp_path, epochs=4, **CONSTANT)
    for _ in range(done):
        first.run_epoch()
    second = trainer(out=tmp_path, resume=True, epochs=6, **CONSTANT)
    assert RunFolder(tmp_path).read_config().epochs == 6
    second.run()
    assert torch.equal(weights(second), weights(whole))
    assert [r["skipped"] for r in second.history] == [r["skipped"] for r in whole.history]
    assert load_checkpoint(tmp_path / "last.pt")["config"]["epochs"] == 6


def test_a_run_that_was_extended_but_not_yet_trained_resumes(tmp_path):
    trainer(out=tmp_path, epochs=2, **CONSTANT).run()
    trainer(out=tmp_path, resume=True, epochs=5, **CONSTANT)
    assert load_checkpoint(tmp_path / "last.pt")["config"]["epochs"] == 2
    again = trainer(out=tmp_path, resume=True, epochs=5, **CONSTANT)
    assert len(again.run()) == 5


def test_a_run_may_also_become_shorter(tmp_path):
    first = trainer(out=tmp_path, epochs=9, **CONSTANT)
    for _ in range(3):
        first.run_epoch()
    assert len(trainer(out=tmp_path, resume=True, epochs=4, **CONSTANT).run()) == 4
    with pytest.raises(ConfigError, match="epochs is 4 there, 3 here, and 4 are trained already"):
        trainer(out=tmp_path, resume=True, epochs=3, **CONSTANT)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"schedule": "cosine"}, False),
        ({"schedule": "step", "milestones": (0.75,)}, True),
        ({"schedule": "step", "milestones": (0.25,)}, False),
        ({"schedule": "constant", "lr_warmup": 3}, True),
    ],
)
def test_a_run_whose_epochs_would_have_been_others_is_refused(tmp_path, settings, allowed):
    settings = {"method": "baseline", **settings}
    first = trainer(out=tmp_path, **settings)
    for _ in range(2):
        first.run_epoch()
    before = (tmp_path / "config.json").read_text()
    if allowed:
        assert len(trainer(out=tmp_path, resume=True, epochs=6, **settings).run()) == 6
        return
    with pytest.raises(
        ConfigError, match=r"epochs is 4 there, 6 here, and the learning rates"
    ) as e:
        trainer(out=tmp_path, resume=True, epochs=6, **settings)
    assert str(e.value).endswith(f"start another run with --weights {tmp_path}")
    assert (tmp_path / "config.json").read_text() == before


def test_before_its_first_epoch_a_run_may_have_any_length(tmp_path):
    trainer(out=tmp_path)
    assert len(trainer(out=tmp_path, resume=True, epochs=6).run()) == 6


def test_a_final_window_in_the_middle_is_said(tmp_path):
    settings = {**CONSTANT, "final_window": 1, "threshold": 0.0}
    trainer(out=tmp_path, **settings).run()
    with pytest.warns(RunWarning, match="so far skipped weights because they were to end it"):
        longer = trainer(out=tmp_path, resume=True, epochs=6, **settings)
    assert [r["skipped"] for r in longer.run()] == [False] * 3 + [True, False, True]


def test_the_command_extends_a_run(tmp_path, monkeypatch, capsys):
    patched(monkeypatch)
    out = str(tmp_path)
    constant = ["--schedule", "constant", "--final-window", "0"]
    assert main(["train", *SETTINGS, *constant, "--out", out]) == 0
    assert main(["train", "--resume", "--epochs", "6", "--out", out]) == 0
    assert "after 6 epochs" in capsys.readouterr().out
    assert json.loads((tmp_path / "config.json").read_text())["config"]["epochs"] == 6
    assert main(["train", "--resume", "--epochs", "5", "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "6 are trained already" in error
