"""Runs that share the epochs they begin with: each epoch is trained once and kept on disk.

An epoch depends on the seed, its number and the epochs before it only. So a run is a path of
epochs, two runs that begin alike share their prefix to the bit, and one that was interrupted goes
on after its last finished epoch.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import wus_ext
from wus_ext.training import Data, TrainConfig
from wus_ext.training.loop import evaluate, train_epoch
from wus_ext.training.methods import build_model
from wus_ext.training.optimizers import build_optimizer
from wus_ext.training.seeding import mix

__all__ = ["Epoch", "Kept", "Missing", "Record", "Runs", "Store", "text"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Epoch:
    """What one epoch does.

    Args:
        rate: the learning rate.
        skip: whether weights stand still.
        end: the rate that the epoch falls to, step by step; None: it is constant.
    """

    rate: float
    skip: bool = False
    end: float | None = None

    def at(self, progress: float) -> float:
        return self.rate if self.end is None else self.rate + (self.end - self.rate) * progress

    def __str__(self) -> str:
        falls = "" if self.end is None else f">{self.end:g}"
        return f"{'S' if self.skip else 'F'}{self.rate:g}{falls}"


Path_ = Sequence[Epoch]


def text(path: Path_) -> str:
    return " ".join(map(str, path))


class Store:
    """The records of a folder, a JSON line each, by name; and checkpoints, which may be dropped."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "epochs.jsonl"
        self.records: dict[str, Record] = {}
        if self.file.exists():
            for line in self._whole_lines():
                record = json.loads(line)
                self.records[record["path"]] = record

    def _whole_lines(self) -> list[str]:
        """What was written before an interruption cut a line off."""
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            self.file.write_bytes(whole)
        return whole.decode().splitlines()

    def add(self, name: str, record: Record) -> Record:
        record = {"path": name, **record}
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records[name] = record
        return record

    def save(self, path: Path_, state: dict[str, Any]) -> None:
        """Keep the state at the end of ``path``; never half of it."""
        temporary = self.folder / "epoch.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self._checkpoint(path))

    def load(self, path: Path_) -> dict[str, Any] | None:
        """The state at the end of ``path``, if it was kept."""
        file = self._checkpoint(path)
        return torch.load(file, weights_only=True) if file.exists() else None

    def _checkpoint(self, path: Path_) -> Path:
        digest = hashlib.sha256(text(path).encode()).hexdigest()[:16]
        return self.folder / f"epoch{len(path):03}-{digest}.pt"

    def drop_checkpoints(self) -> None:
        for file in self.folder.glob("epoch*.pt"):
            file.unlink()


class Missing(Exception):
    """An epoch that was not trained yet."""


class Kept:
    """What a store holds of the runs of one network, seed and dataset."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def along(self, path: Path_) -> list[Record]:
        """The records of a path's epochs."""
        return [self.record(path[:end]) for end in range(1, len(path) + 1)]

    def decided(
        self, epochs: int, following: Callable[[list[Epoch], list[Record]], Epoch]
    ) -> tuple[Epoch, ...]:
        """The path of a run whose every epoch is chosen after those before it."""
        path: list[Epoch] = []
        records: list[Record] = []
        while len(path) < epochs:
            path.append(following(path, records))
            records.append(self.record(path))
        return tuple(path)

    def record(self, path: Path_) -> Record:
        """The record of the last epoch of ``path``."""
        return self._named(text(path))

    def statistics(self, path: Path_, average: int = 1) -> Record:
        """After ``path``: weights averaged over its last epochs, running statistics anew.

        That is stochastic weight averaging; of one epoch, the statistics alone.
        """
        return self._named(_averaged(path, average))

    def _named(self, name: str) -> Record:
        if name not in self.store.records:
            raise Missing(name)
        return self.store.records[name]


def _averaged(path: Path_, average: int) -> str:
    return f"{text(path)} | average {average}"


class Runs(Kept):
    """The same, but what is missing is trained.

    Args:
        config: network, seed, optimizer and data; its method, schedule and epochs do not matter.
        data: its images.
        store: what was trained before.
        keep: which states are kept, those of every `keep`-th epoch; the way from the one before is
            trained again where a run branches off in between.
        build: makes the network instead, given the number of classes.
        say: receives a line for each epoch trained.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data,
        store: Store,
        *,
        keep: int = 1,
        build: Callable[[int], nn.Module] | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        super().__init__(store)
        store.folder.mkdir(parents=True, exist_ok=True)
        self.config, self.data, self.keep, self.say = config, data, keep, say
        self.device = config.torch_device()
        torch.manual_seed(mix(config.seed, "weights"))
        self.model = build_model(config, len(data.classes), build).to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.optimizer = build_optimizer(config, self.model)
        self._start = self._state()
        self._done: tuple[Epoch, ...] = ()

    def record(self, path: Path_) -> Record:
        path = tuple(path)
        name = text(path)
        if name not in self.store.records:
            self._go_to(path[:-1])
            record = self._train(path[-1])
            if len(path) % self.keep == 0:
                self.store.save(path, self._state())
            self._note(name, record)
        return self.store.records[name]

    def statistics(self, path: Path_, average: int = 1) -> Record:
        path = tuple(path)
        name = _averaged(path, average)
        if name not in self.store.records:
            averaged = None
            for end in range(len(path) - average + 1, len(path) + 1):
                self._go_to(path[:end])
                if averaged is None:
                    averaged = AveragedModel(self.model)
                averaged.update_parameters(self.model)
            model = averaged.module
            _renew_statistics(model, self._batches(len(path) + 1))
            self._note(name, self._evaluated(model))
        return self.store.records[name]

    def _note(self, name: str, record: Record) -> None:
        self.store.add(name, record)
        self.say(f"{name.split(' | ')[0].count(' ') + 1:3} {name[-24:]:>24} {_shown(record)}")

    def _go_to(self, path: tuple[Epoch, ...]) -> None:
        """Brings model and optimizer to the end of ``path``, from the last checkpoint on it."""
        if path == self._done:
            return
        known, state = len(path), None
        while known and (state := self.store.load(path[:known])) is None:
            known -= 1
        self._load(state or self._start)
        self._done = path[:known]
        for epoch in path[known:]:
            self._train(epoch)

    def _train(self, epoch: Epoch) -> Record:
        number = len(self._done) + 1
        steps = self.data.steps(self.config.batch_size)

        def begin(step: int) -> bool:
            for group in self.optimizer.param_groups:
                group["lr"] = epoch.at((step + 0.5) / steps)
            return epoch.skip

        torch.manual_seed(mix(self.config.seed, "epoch", number))
        wus_ext.set_skip(self.model, epoch.skip)
        trained = train_epoch(
            self.model, self._batches(number), self.optimizer, device=self.device, begin=begin,
            amp=self.config.amp, cuda_graphs=self.config.cuda_graphs and epoch.end is None,
        )  # fmt: skip
        wus_ext.set_skip(self.model, False)
        self._done = (*self._done, epoch)
        return {
            "skipped": epoch.skip,
            "train_accuracy": trained.accuracy,
            "train_loss": trained.loss,
            "train_seconds": trained.seconds,
            "step_seconds": trained.step_seconds,
            **self._evaluated(self.model),
        }

    def _batches(self, number: int) -> Iterator:
        return self.data.training_batches(
            self.config.batch_size, self.config.seed, number, self.device
        )

    def _evaluated(self, model: nn.Module) -> Record:
        parts = {"validation": self.data.validation, "test": self.data.test}
        return {
            f"{name}_accuracy": evaluate(
                model,
                self.data.evaluation_batches(part, self.config.batch_size),
                device=self.device,
                amp=self.config.amp,
            ).accuracy
            for name, part in parts.items()
        }

    def _state(self) -> dict[str, Any]:
        return {
            "model": copy.deepcopy(self.model.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
        }

    def _load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))


@torch.no_grad()
def _renew_statistics(model: nn.Module, batches: Iterator) -> None:
    """Running statistics of batch norm as the mean over these batches."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    if norms:
        for images, _ in batches:
            model(images)


def _shown(record: Record) -> str:
    shown = {name: record.get(f"{name}_accuracy") for name in ("train", "validation", "test")}
    return ", ".join(f"{name} {value:.2f}" for name, value in shown.items() if value is not None)
