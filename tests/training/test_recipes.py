"""Fine-tuning by one word: ``--train biases``, ``--freeze-backbone``."""

import pytest
import torch
from torch import nn

from wus_ext.cli import main
from wus_ext.training import ConfigError
from wus_ext.training.compare import CompareConfig, compare
from wus_ext.training.runfolder import RunFolder

from . import tiny
from .command import patched
from .test_options import moved, same, trainer, values

HEAD = {"5.weight", "5.bias"}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"method": "biases"}, {"0.bias", "1.bias", *HEAD}),
        ({"method": "biases", "train_gamma": True}, {"0.bias", "1.bias", "1.weight", *HEAD}),
        ({"method": "biases", "skip_layers": ("0",)}, {"0.bias", "1.weight", "1.bias", *HEAD}),
        ({"method": "head"}, HEAD),
        ({"method": "head", "skip_layers": ("0",)}, {"1.weight", "1.bias", *HEAD}),
    ],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_what_trains_from_the_first_epoch_on(settings, expected, optimizer):
    run = trainer(optimizer=optimizer, full_every=2, **settings)
    for _ in range(2):
        assert moved(run) == expected
    assert [r["skipped_steps"] for r in run.history] == [1.0, 1.0]
    kept = [p for p in run.model.parameters() if p in run.optimizer.state]
    assert len(kept) == len(expected)


def test_statistics_of_batch_norm_stand_still_with_the_backbone():
    run = trainer(method="head")
    before = run.model[1].running_mean.clone()
    run.run_epoch()
    assert torch.equal(run.model[1].running_mean, before)
    other = trainer(method="biases")
    other.run_epoch()
    assert not torch.equal(other.model[1].running_mean, before)


@pytest.mark.parametrize("method", ["biases", "head"])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(tmp_path, method):
    whole, first = trainer(method=method), trainer(method=method, out=tmp_path)
    whole.run()
    for _ in range(2):
        first.run_epoch()
    second = trainer(method=method, out=tmp_path, resume=True)
    second.run()
    assert same(second, whole)
    assert values(second).keys() == values(whole).keys()


@pytest.mark.parametrize(
    ("arguments", "method"),
    [
        (["--train", "biases"], "biases"),
        (["--train", "head"], "head"),
        (["--freeze-backbone"], "head"),
        (["--freeze-backbone", "--method", "head"], "head"),
    ],
)
def test_a_recipe_is_a_method(tmp_path, monkeypatch, arguments, method):
    patched(monkeypatch)
    out = tmp_path / "run"
    arguments = [*arguments, "--epochs", "2", "--batch-size", "8", "--out", str(out)]
    assert main(["train", *arguments]) == 0
    assert RunFolder(out).read_config().method == method
    assert all(record["skipped"] for record in RunFolder(out).history())
    assert main(["train", "--resume", "--out", str(out)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train", "biases", "--method", "wus"], "--train biases is --method biases: leave the"),
        (["--freeze-backbone", "--train", "biases"], "--freeze-backbone is --method head: leave"),
    ],
)
def test_contradictions_are_refused(capsys, tmp_path, arguments, message):
    assert main(["train", *arguments, "--out", str(tmp_path / "run")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_gamma_does_not_train_in_a_frozen_backbone():
    with pytest.raises(ConfigError, match="a layer that trains is not frozen, and method 'head'"):
        trainer(method="head", train_gamma=True)


def test_a_comparison_of_recipes(tmp_path, monkeypatch):
    monkeypatch.setattr("wus_ext.training.compare.load_data", lambda config: tiny.data())
    patched(monkeypatch)
    config = CompareConfig(base=tiny.CONFIG, methods=("biases", "head"), control=False)
    runs = compare(config, tmp_path)
    assert [run.method for run in runs] == ["baseline", "biases", "head"]
    assert [run.skipped for run in runs] == [0.0, 100.0, 100.0]


# A network in which nothing would train


def biasless(classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 4, bias=False), nn.Linear(4, classes, bias=False)
    )


@pytest.mark.filterwarnings("ignore:convert")
def test_a_network_without_biases_is_refused_before_it_trains(tmp_path):
    with pytest.raises(ConfigError, match="has no bias, so nothing would train in a skip window"):
        trainer(build=biasless, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert moved(trainer(build=biasless, method="biases")) == {"2.weight"}
    assert moved(trainer(build=biasless, method="baseline")) == {"1.weight", "2.weight"}
