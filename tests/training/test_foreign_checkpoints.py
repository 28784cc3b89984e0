"""A checkpoint that is not this run's is refused, and nothing changes."""

import json

import pytest
import torch
from torch import nn

from wus_ext.training import (
    ConfigError,
    load_checkpoint,
)
from wus_ext.training.checkpoint import pack_checkpoint

from .run_folders import LAST, change, refuses
from .tiny import trainer


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
