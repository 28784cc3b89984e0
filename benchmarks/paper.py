"""The runs of docs/results.md that share epochs: which there are, and when they skip."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from branches import Epoch, Kept, Missing, Record, Runs, Store
from settings import network as small_network

import wus_ext
from wus_ext.training import TrainConfig, load_data

DATASETS = ("cifar10", "cifar100")
SMALL = ("small", "choice")
EPOCHS = 30
MILESTONES = (0.5, 0.75)
#: Thresholds, patience and longest windows to choose from, on validation images.
CHOICE = ((1.0, 2, 3), (2.0, 1, 3), (2.0, 2, 3), (3.0, 1, 1), (3.0, 1, 3), (3.0, 2, 3))
#: Images of the runs on which settings are chosen: for training and validation together, for test;
#: and the part for validation.
CHOICE_IMAGES = {"limit_train": 9000, "validation": 4 / 9, "limit_test": 100}
CHOSEN = (3.0, 1, 1)
AVERAGED = 5


Costs = tuple[float, float, float]


@dataclass(frozen=True)
class Scale:
    """How large the runs are on a device, and what their epochs cost there.

    Args:
        rate: the constant learning rate, and the one that schedules begin with.
        config: of the training.
        images: as CHOICE_IMAGES.
        keep: as of Runs.
        costs: of an epoch in stock's full ones: full="fused", skipped, and of the forward passes
            that estimate running statistics.
        estimates: of the costs, before the runs, from which the lengths of rivals follow; None:
            these are the costs.
    """

    rate: float
    config: dict[str, Any]
    images: dict[str, Any]
    keep: int
    costs: dict[str, Costs]
    estimates: dict[str, Costs] | None = None

    def constant(self, epochs: int) -> tuple[Epoch, ...]:
        return (Epoch(self.rate),) * epochs

    def stepped(self, epochs: int) -> tuple[Epoch, ...]:
        """A tenth of the rate from half of the run on, a hundredth from three quarters on."""
        return tuple(
            Epoch(self.rate * 0.1 ** sum(done >= round(part * epochs) for part in MILESTONES))
            for done in range(epochs)
        )


SCALES = {
    # Costs: README.
    "cpu": Scale(
        rate=0.02,
        config={"batch_size": 64, "device": "cpu"},
        images={"limit_train": 6000, "validation": 1 / 6, "limit_test": 2000},
        keep=1,
        costs={
            "small": (0.46, 0.23, 0.13),
            "alexnet": (0.62, 0.32, 0.13),
            "vgg11_bn": (0.46, 0.23, 0.13),
            "vgg16_bn": (0.45, 0.25, 0.13),
            "resnet18": (0.54, 0.31, 0.13),
        },
    ),
    # All images. Costs: of stock compiled and recorded, results/nvidia-h200.md.
    "cuda": Scale(
        rate=0.05,
        config={"batch_size": 512, "device": "cuda", "amp": "bf16", "cuda_graphs": True},
        images={"validation": 0.1},
        keep=3,
        costs={
            "alexnet": (0.99, 0.53, 0.2),
            "vgg11_bn": (0.86, 0.55, 0.2),
            "vgg16_bn": (0.89, 0.61, 0.2),
            "resnet18": (1.01, 0.75, 0.25),
        },
        estimates={
            "alexnet": (0.84, 0.45, 0.15),
            "vgg11_bn": (0.83, 0.56, 0.2),
            "vgg16_bn": (0.89, 0.58, 0.2),
            "resnet18": (1.0, 0.77, 0.25),
        },
    ),
}


@dataclass(frozen=True)
class Unit:
    """One network, dataset and seed; SMALL is the network of settings.py."""

    network: str
    dataset: str
    seed: int
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.dataset}-{self.network}-seed{self.seed}"

    @property
    def scale(self) -> Scale:
        return SCALES[self.device]

    def config(self, data_dir: Path, images: dict[str, Any]) -> TrainConfig:
        return TrainConfig(
            model="vgg11" if self.network in SMALL else self.network,
            dataset="folder",
            data_dir=str(data_dir / self.dataset),
            method="fused",
            seed=self.seed,
            lr=self.scale.rate,
            **self.scale.config,
            **images,
        )


#: The one on which settings are chosen.
CHOICE_UNIT = Unit("choice", "cifar10", 0)


@contextmanager
def claimed(folder: Path) -> Iterator[bool]:
    """Whether no other process works there."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def open_runs(unit: Unit, data_dir: Path, out: Path, images: dict[str, Any]) -> Runs:
    config = unit.config(data_dir, images)
    build = small_network if unit.network in SMALL else None
    return Runs(
        config, load_data(config), Store(out / str(unit)), keep=unit.scale.keep, build=build,
        say=lambda line: print(unit, line, flush=True),
    )  # fmt: skip


def settings(choice: tuple[float, int, int], **more: Any) -> dict[str, Any]:
    threshold, patience, max_window = choice
    return {"threshold": threshold, "patience": patience, "max_window": max_window, **more}


class Skipping:
    """Chooses a run's next epoch as WUS or WUS+LR does, watching the training accuracy.

    Args:
        path: the run without skipping.
        options: of the policy.
    """

    def __init__(self, path: Sequence[Epoch], **options: Any) -> None:
        self.path, self.options = path, options

    def __call__(self, done: Sequence[Epoch], records: Sequence[Record]) -> Epoch:
        accuracies = [record["train_accuracy"] for record in records]
        return replace(self.path[len(done)], skip=self._skips(accuracies))

    def _skips(self, accuracies: Sequence[float]) -> bool:
        """The package's own policy decides, on a model that stands for the network."""
        model = wus_ext.convert(torch.nn.Linear(1, 1))
        rates = [epoch.rate for epoch in self.path]
        if len(set(rates)) == 1:
            policy = wus_ext.WUS(model, **self.options)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
            scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda done: rates[min(done, len(rates) - 1)]
            )
            optimizer.step()
            policy = wus_ext.WUSLR(model, scheduler, **self.options)
        for accuracy in accuracies:
            policy.step(accuracy)
        return policy.skipping


def choose(runs: Runs, epochs: int = EPOCHS) -> None:
    """The settings to choose from, at a constant rate."""
    flat = CHOICE_UNIT.scale.constant(epochs)
    runs.along(flat)
    for choice in CHOICE:
        for ending in ({}, {"total_epochs": epochs, "final_window": 1}):
            runs.decided(epochs, Skipping(flat, **settings(choice), **ending))


@dataclass(frozen=True)
class Entry:
    """A line of the results: a run, its cost in stock's full epochs and its epochs' records."""

    method: str
    path: tuple[Epoch, ...]
    cost: float
    records: tuple[Record, ...]

    @property
    def last(self) -> float:
        """Test accuracy after the last epoch."""
        return self.records[-1]["test_accuracy"]

    @property
    def best(self) -> float:
        """Test accuracy after the epoch that is best on the validation images."""
        return max(self.records, key=lambda record: record["validation_accuracy"])["test_accuracy"]

    @property
    def skipped(self) -> float:
        """Percentage of epochs."""
        return 100 * sum(epoch.skip for epoch in self.path) / len(self.path)


class Plan:
    """The runs of a unit, in the order of the results; each may need those before it.

    Args:
        runs: what trains them or, to look only, what holds them.
        unit: whose they are.
        epochs: length of the runs.
    """

    def __init__(self, runs: Kept, unit: Unit, epochs: int = EPOCHS) -> None:
        self.runs, self.epochs = runs, epochs
        self.scale = unit.scale
        self.costs = unit.scale.costs[unit.network]
        self.estimates = (unit.scale.estimates or unit.scale.costs)[unit.network]

    def entries(self) -> Iterator[Entry]:
        """Those that can be had, with their cost."""
        for made in (self._constant, self._rivals, self._stepped, self._stepped_rivals):
            with suppress(Missing):
                yield from made()

    def _constant(self) -> Iterator[Entry]:
        flat = self.scale.constant(self.epochs)
        last = flat[-1]
        yield self._stock("baseline", flat)
        yield self._run("fused", flat)
        yield self._run("WUS", self._decided(flat))
        yield self._run("WUS, ending in a window", self._ending())
        yield self._run("fused, last epoch skipped", (*flat[:-1], replace(last, skip=True)))
        yield self._run("fused, last epoch to rate 0", (*flat[:-1], replace(last, end=0.0)))

    def _rivals(self) -> Iterator[Entry]:
        """At the cost of WUS that ends in a window."""
        price, length = self._as_dear_as(self._ending())
        short = self.scale.constant(length)
        last = short[-1]
        yield self._stock("baseline in its time", self.scale.constant(price))
        yield self._run("fused in its time", short)
        yield self._run(
            "fused in its time, last epoch to rate 0", (*short[:-1], replace(last, end=0.0))
        )
        yield self._run("fused in its time, then one skipped", (*short, replace(last, skip=True)))
        yield self._averaged("fused in its time, statistics anew", short, 1)
        yield self._averaged(f"fused in its time, {AVERAGED} epochs averaged", short, AVERAGED)

    def _stepped(self) -> Iterator[Entry]:
        falling = self.scale.stepped(self.epochs)
        yield self._stock("baseline, steps", falling)
        yield self._run("fused, steps", falling)
        yield self._run("WUS+LR", self._decided(falling))

    def _stepped_rivals(self) -> Iterator[Entry]:
        price, length = self._as_dear_as(self._decided(self.scale.stepped(self.epochs)))
        yield self._stock("baseline, steps, in its time", self.scale.stepped(price))
        yield self._run("fused, steps, in its time", self.scale.stepped(length))

    def _ending(self) -> tuple[Epoch, ...]:
        return self._decided(
            self.scale.constant(self.epochs), total_epochs=self.epochs, final_window=1
        )

    def _decided(self, path: Sequence[Epoch], **more: Any) -> tuple[Epoch, ...]:
        return self.runs.decided(len(path), Skipping(path, **settings(CHOSEN), **more))

    def _cost(self, path: Sequence[Epoch]) -> float:
        return self._sum(path, self.costs)

    @staticmethod
    def _sum(path: Sequence[Epoch], costs: Costs) -> float:
        full, skip, _ = costs
        return sum(skip if epoch.skip else full for epoch in path)

    def _as_dear_as(self, path: Sequence[Epoch]) -> tuple[int, int]:
        """How many of stock's epochs, and of fused ones, cost what a run does."""
        price = self._sum(path, self.estimates)
        return round(price), round(price / self.estimates[0])

    def _stock(self, method: str, path: Sequence[Epoch]) -> Entry:
        """Stock PyTorch: the fused run's trajectory, up to rounding, at a cost of 1 an epoch."""
        return Entry(method, tuple(path), float(len(path)), tuple(self.runs.along(path)))

    def _run(self, method: str, path: Sequence[Epoch]) -> Entry:
        return Entry(method, tuple(path), self._cost(path), tuple(self.runs.along(path)))

    def _averaged(self, method: str, path: Sequence[Epoch], count: int) -> Entry:
        record = self.runs.statistics(path, count)
        return Entry(method, tuple(path), self._cost(path) + self.costs[2], (record,))


def train(units: Sequence[Unit], data_dir: Path, out: Path) -> None:
    """What is missing of these, but for those that another process works on."""
    for unit in units:
        with claimed(out / str(unit)) as free:
            if free and not (out / str(unit) / "done").exists():
                if unit == CHOICE_UNIT:
                    runs = open_runs(unit, data_dir, out, CHOICE_IMAGES)
                    choose(runs)
                else:
                    runs = open_runs(unit, data_dir, out, unit.scale.images)
                    for _ in Plan(runs, unit).entries():
                        pass
                runs.store.drop_checkpoints()
                (out / str(unit) / "done").touch()
