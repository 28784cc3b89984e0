"""The trainer in several processes; every function runs in each of them."""

from __future__ import annotations

import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.training import tiny
from wus_ext.distributed import processes
from wus_ext.training import ConfigError, DataError, Trainer, TrainingError

from .replicas import same_everywhere


@contextmanager
def alone():
    """As if this process were the only one."""
    with (
        mock.patch.object(processes, "count", return_value=1),
        mock.patch.object(processes, "rank", return_value=0),
    ):
        yield


def build(classes, norm=False):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=4),
        nn.BatchNorm2d(4) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 8 * 8, classes),
    )


def build_with_norm(classes):
    return build(classes, norm=True)


def trainer(build=build, **options):
    names = ("out", "resume", "data")
    own = {name: options.pop(name) for name in names if name in options}
    own.setdefault("data", tiny.data(train=100, test=11, validation=9))
    settings = {"device": "cpu", "validation": 0.1, **options}
    return Trainer(tiny.CONFIG.replace(**settings), build=build, **own)


def shared_folder():
    return Path(processes.from_first(tempfile.mkdtemp))


def check_the_trainer_gives_the_weights_of_one_process_with_the_whole_batch():
    world = dist.get_world_size()
    options = {"skip_layers": ("0",), "full_every": 2, "bias_lr": 2.0, "window_momentum": "reset"}
    for method, given in (("baseline", {}), ("wus", {}), ("wus+lr", {}), ("wus", options)):
        together = trainer(method=method, **given)
        together.run()
        with alone():
            single = trainer(method=method, batch_size=tiny.CONFIG.batch_size * world, **given)
            single.run()
        same_everywhere(together.model)
        pairs = zip(together.model.parameters(), single.model.parameters(), strict=True)
        for mine, expected in pairs:
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)
        for mine, expected in zip(together.history, single.history, strict=True):
            for key in ("skipped", "test_accuracy", "validation_accuracy", "lr"):
                assert mine[key] == expected[key], key
            for key in ("train_loss", "test_loss", "validation_loss"):
                assert mine[key] == pytest.approx(expected[key], rel=1e-4), key
        assert any(record["skipped"] for record in together.history) == (method != "baseline")


def check_the_trainer_resumes_bit_for_bit():
    folder = shared_folder()
    options = {"full_every": 3, "train_gamma": True, "bias_lr": 2.0}
    whole = trainer(build_with_norm, out=folder / "whole", **options)
    whole.run()
    first = trainer(build_with_norm, out=folder / "parts", **options)
    first.run_epoch(), first.run_epoch()
    dist.barrier()
    second = trainer(build_with_norm, out=folder / "parts", resume=True, **options)
    assert len(second.history) == 2
    second.run()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name
    same_everywhere(second.model)
    for buffer in second.model.buffers():
        assert len({tuple(b.flatten().tolist()) for b in processes.gather(buffer)}) == 1
    elsewhere = {**whole.state_dict(), "processes": 9}
    with pytest.raises(ConfigError, match="it trained in 9 processes, here are"):
        second._load_state_dict(elsewhere)


def check_the_trainer_fails_everywhere_or_nowhere():
    folder = shared_folder()
    trainer(out=folder / "run").run_epoch()
    with pytest.raises(ConfigError, match="already holds a run"):
        trainer(out=folder / "run")
    missing = mock.Mock(side_effect=DataError("nothing there"))
    with (
        mock.patch("wus_ext.training.trainer.load_data", missing),
        pytest.raises(DataError, match="nothing there") as caught,
    ):
        trainer(data=None)
    assert getattr(caught.value, "raised_by_first", False) == (dist.get_rank() > 0)
    if dist.get_world_size() > 1:
        with pytest.raises(DataError, match="too few for"):
            trainer(data=tiny.data(train=1)).run_epoch()
    with pytest.raises(TrainingError, match="use a lower --lr"):
        trainer(lr=1e30).run()
