import math

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext.training import (
    ConfigError,
    TrainConfig,
    Trainer,
    TrainingError,
    load_checkpoint,
    train,
)

from . import tiny
from .tiny import trainer, weights

METHODS = ["baseline", "fused", "wus", "wus+lr"]


# What the methods do


def test_the_baseline_is_made_of_stock_layers():
    run = trainer(method="baseline")
    assert {type(m) for m in run.model} == {
        nn.Conv2d, nn.ReLU, nn.Flatten, nn.Dropout, nn.Linear
    }  # fmt: skip
    assert run.policy is None
    assert not any(record["skipped"] for record in run.run())


def test_named_networks_start_from_the_same_weights_under_each_method():
    runs = [
        Trainer(TrainConfig(model="vgg11_bn", method=method, limit_train=10, limit_test=10))
        for method in METHODS
    ]
    assert any(isinstance(m, nn.BatchNorm2d) for m in runs[0].model.modules())
    assert all(type(m).__module__.startswith("torch.nn") for m in runs[0].model.features)
    for run in runs[1:]:
        assert torch.equal(weights(run), weights(runs[0]))


@pytest.mark.parametrize("settings", [{"method": "fused"}, {"method": "wus", "full": "fused"}])
def test_fused_full_steps_train_as_stock_ones(settings):
    baseline, fused = trainer(method="baseline"), trainer(warmup=4, **settings)
    assert wus_ext.is_skipping(fused.model) is False
    for theirs, mine in zip(baseline.run(), fused.run(), strict=True):
        assert not mine["skipped"]
        assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
    assert fused.model._skip_engine.options.full == "fused"
    torch.testing.assert_close(weights(fused), weights(baseline), rtol=1e-4, atol=1e-5)


def test_methods_agree_until_the_first_skipped_epoch():
    baseline, wus = trainer(method="baseline"), trainer(method="wus", warmup=2)
    for _ in range(2):
        baseline.run_epoch(), wus.run_epoch()
        assert torch.equal(weights(baseline), weights(wus))
    assert wus.policy.skipping
    assert wus.run_epoch()["skipped"]
    baseline.run_epoch()
    assert not torch.equal(weights(baseline), weights(wus))


def test_a_skipped_epoch_trains_biases_only():
    run = trainer(method="wus")
    while not run.policy.skipping:
        run.run_epoch()
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    assert run.run_epoch()["skipped"]
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.endswith("weight"), name


def test_wus_lr_reopens_at_a_drop_and_wus_does_not():
    step = {
        "schedule": "step",
        "milestones": (0.5,),
        "epochs": 6,
        "max_window": 9,
        "patience": 1,
        "warmup": 0,
    }
    wus = [record["skipped"] for record in trainer(method="wus", **step).run()]
    wus_lr = trainer(method="wus+lr", **step).run()
    assert wus == [False, False, True, True, True, True]
    assert [record["skipped"] for record in wus_lr] == [False, False, True, False, True, True]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("cosine", [(1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)]),
        ("step", [1.0, 1.0, 0.1, 0.01]),
    ],
)
def test_every_method_follows_the_schedule(method, schedule, rates):
    if (method, schedule) == ("wus+lr", "constant"):
        with pytest.raises(ConfigError, match="needs the schedule"):
            trainer(method=method, schedule=schedule)
        return
    history = trainer(method=method, schedule=schedule).run()
    assert [record["lr"] for record in history] == pytest.approx([0.05 * r for r in rates])


def test_the_policy_watches_what_it_is_told_to():
    settings = {"data": tiny.data(validation=6), "validation": 0.1}
    train_history = trainer(watch="train", **settings)
    validation = trainer(watch="validation", **settings)
    train_history.run(), validation.run()
    for run, key in ((train_history, "train_accuracy"), (validation, "validation_accuracy")):
        assert run.policy.history == [record[key] for record in run.history]


def test_training_learns():
    history = trainer(method="baseline", epochs=8).run()
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["test_accuracy"] >= 80


def test_train_is_the_short_form():
    history = train(tiny.CONFIG.replace(epochs=2), data=tiny.data(), build=tiny.build)
    assert [record["epoch"] for record in history] == [1, 2]
    assert all(record["train_seconds"] > 0 and record["step_seconds"] > 0 for record in history)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision(amp):
    run = trainer(amp=amp, epochs=2)
    assert math.isfinite(run.run()[-1]["train_loss"])
    assert run.scaler.is_enabled() == (amp == "fp16")


class Explodes(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.fc = nn.Linear(3072, classes)
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        return self.fc(x.flatten(1)) * (float("nan") if self.calls > 5 else 1.0)


def test_nan_stops_and_keeps_the_last_good_epoch(tmp_path):
    run = trainer(out=tmp_path, build=Explodes)
    with pytest.raises(TrainingError, match=r"NaN in epoch 2: use a lower --lr .*keeps epoch 1"):
        run.run()
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "lenet"}, "model must be one of alexnet, .*got 'lenet'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be an integer"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"lr": 0.0}, "lr must be positive, got 0.0"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"weight_decay": -1.0}, "weight_decay must be at least 0"),
        ({"milestones": (0.5, 2.0)}, r"milestones must be fractions in \(0, 1\), got 2.0"),
        ({"limit_train": 0}, "limit_train must be at least 1"),
        ({"validation": 1.0}, r"validation must be in \[0, 1\)"),
        ({"watch": "validation"}, "needs a validation fraction"),
        ({"method": "wus+lr", "schedule": "constant"}, "needs the schedule"),
        ({"max_window": 0}, "max_window must be at least 1, got 0"),
        ({"lr_drop": 1.0}, r"lr_drop must be in \(0, 1\)"),
        ({"device": "toaster"}, "device must be auto, cpu or cuda, got 'toaster'"),
        ({"device": "meta"}, "device must be auto, cpu or cuda, got 'meta'"),
        ({"device": "cuda:99"}, "'cuda:99' is not present"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_bad_setting_is_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings).validate()
