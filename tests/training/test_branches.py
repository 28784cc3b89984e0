"""Runs that share epochs (benchmarks/branches.py): the same weights as if each had run alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from . import tiny

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from branches import Epoch, Kept, Missing, Runs, Store, text

FULL, SKIP, FALLING = Epoch(0.05), Epoch(0.05, skip=True), Epoch(0.05, end=0.0)
CONFIG = tiny.CONFIG.replace(method="fused", seed=3)


def build(classes):
    layers = tiny.build(classes)
    return nn.Sequential(layers[0], nn.BatchNorm2d(4), *layers[1:])


def runs(folder, said=None, keep=1):
    data = tiny.data(validation=12)
    say = (lambda line: None) if said is None else said.append
    return Runs(CONFIG, data, Store(folder), keep=keep, build=build, say=say)


def accuracies(records):
    return [(record["train_loss"], record["test_accuracy"]) for record in records]


@pytest.mark.parametrize("keep", [1, 3, 10])
def test_a_branch_is_the_run_that_it_would_be_alone(tmp_path, keep):
    shared, paths = runs(tmp_path / "shared", keep=keep), []
    paths.append((FULL, FULL, FULL, FULL))
    paths.append((FULL, FULL, SKIP, FULL))
    paths.append((FULL, FULL, SKIP, SKIP))
    paths.append((FULL, FALLING))
    together = [accuracies(shared.along(path)) for path in paths]
    for number, path in enumerate(paths):
        alone = runs(tmp_path / str(number))
        assert accuracies(alone.along(path)) == together[number]
        assert torch.equal(alone.model[0].weight, _model_at(shared, path)[0].weight)


def _model_at(made, path):
    made._go_to(path)
    return made.model


def test_each_epoch_is_trained_once_and_never_again(tmp_path):
    said = []
    first = runs(tmp_path, said)
    first.along((FULL, FULL, SKIP))
    first.along((FULL, SKIP))
    first.along((FULL, FULL))
    assert len(said) == 4
    again = runs(tmp_path, said)
    again._train = lambda epoch: pytest.fail("trained again")
    assert accuracies(again.along((FULL, FULL, SKIP))) == accuracies(
        first.along((FULL, FULL, SKIP))
    )


@pytest.mark.parametrize("checkpoints", ["kept", "dropped"])
def test_an_interrupted_run_goes_on_to_the_same(tmp_path, checkpoints):
    """Killed while it wrote: the last line is cut off, and checkpoints may be gone."""
    path = (FULL, FULL, SKIP, FULL)
    whole = accuracies(runs(tmp_path / "whole").along(path))
    broken = runs(tmp_path / "broken")
    broken.along(path[:3])
    file = broken.store.file
    file.write_bytes(file.read_bytes()[:-20])
    if checkpoints == "dropped":
        broken.store.drop_checkpoints()
    rest = runs(tmp_path / "broken")
    assert len(rest.store.records) == 2
    assert accuracies(rest.along(path)) == whole
    assert list(rest.store.records) == [text(path[:end]) for end in range(1, 5)]


def test_a_policy_chooses_each_epoch_by_those_before_it(tmp_path):
    seen = []

    def following(done, records):
        assert len(done) == len(records)
        seen.append(len(records))
        return SKIP if len(done) == 2 else FULL

    path = runs(tmp_path).decided(4, following)
    assert path == (FULL, FULL, SKIP, FULL)
    assert len(seen) == 4
    kept = Kept(Store(tmp_path))
    assert kept.decided(4, following) == path
    with pytest.raises(Missing):
        kept.along((*path, FULL))


def test_the_learning_rate_falls_step_by_step(tmp_path):
    made, rates = runs(tmp_path), []
    step = made.optimizer.step

    def noted(*args, **kwargs):
        rates.append(made.optimizer.param_groups[0]["lr"])
        return step(*args, **kwargs)

    made.optimizer.step = noted
    made.along((FALLING,))
    assert rates == pytest.approx([0.05 * (1 - part) for part in (0.125, 0.375, 0.625, 0.875)])


def test_statistics_anew_and_averages(tmp_path):
    made, path = runs(tmp_path), (FULL, FULL, FULL)
    made.along(path)
    alone = made.statistics(path, 1)
    model = _model_at(made, path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    averaged = made.statistics(path, 2)
    assert alone["test_accuracy"] >= 0
    assert averaged["path"].endswith("| average 2")
    for name, tensor in _model_at(made, path).state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert Kept(Store(tmp_path)).statistics(path, 2) == averaged
