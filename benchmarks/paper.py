"""The runs of docs/results.md that share epochs: which there are, and when they skip."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from branches import Epoch, Record, Runs, Store
from settings import network as small_network

import wus_ext
from wus_ext.training import TrainConfig, load_data

DATASETS = ("cifar10", "cifar100")
EPOCHS = 30
RATE = 0.02
MILESTONES = (0.5, 0.75)
#: Thresholds, patience and longest windows to choose from, on validation images.
CHOICE = ((1.0, 2, 3), (2.0, 1, 3), (2.0, 2, 3), (3.0, 1, 1), (3.0, 1, 3), (3.0, 2, 3))
SHARED = {"dataset": "folder", "batch_size": 64, "lr": RATE, "method": "fused"}
#: Images: for training and validation together, for test; and the part for validation.
IMAGES = {"limit_train": 6000, "validation": 1 / 6, "limit_test": 2000}
CHOICE_IMAGES = {"limit_train": 9000, "validation": 4 / 9, "limit_test": 100}


def constant(epochs: int) -> tuple[Epoch, ...]:
    return (Epoch(RATE),) * epochs


def stepped(epochs: int) -> tuple[Epoch, ...]:
    """A tenth of the rate from half of the run on, a hundredth from three quarters on."""
    return tuple(Epoch(stepped_rate(done, epochs)) for done in range(epochs))


def stepped_rate(done: int, epochs: int) -> float:
    return RATE * 0.1 ** sum(done >= round(part * epochs) for part in MILESTONES)


#: The choice, and cost of a step in stock's full steps: full="fused", skipped, and a forward pass
#: in training mode (benchmarks/steps.py).
CHOSEN = (3.0, 1, 1)
COSTS = {
    "small": (0.45, 0.24, 0.15),
    "alexnet": (0.62, 0.32, 0.15),
    "vgg11_bn": (0.45, 0.24, 0.15),
    "vgg16_bn": (0.45, 0.25, 0.15),
    "resnet18": (0.54, 0.31, 0.15),
}
AVERAGED = 5


@dataclass(frozen=True)
class Unit:
    """One network, dataset and seed."""

    network: str
    dataset: str
    seed: int

    def __str__(self) -> str:
        return f"{self.dataset}-{self.network}-seed{self.seed}"

    def config(self, data_dir: Path, images: dict[str, Any]) -> TrainConfig:
        model = "vgg11" if self.network == "small" else self.network
        return TrainConfig(
            model=model, seed=self.seed, data_dir=str(data_dir / self.dataset), **SHARED, **images
        )


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
    build = (lambda classes: small_network()) if unit.network == "small" else None
    return Runs(
        config, load_data(config), Store(out / str(unit)), build=build,
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
    runs.along(constant(epochs))
    for choice in CHOICE:
        for ending in ({}, {"total_epochs": epochs, "final_window": 1}):
            runs.decided(epochs, Skipping(constant(epochs), **settings(choice), **ending))


def cost(network: str, path: Sequence[Epoch]) -> float:
    """Of a path on the engine, in stock's full epochs."""
    full, skip, _ = COSTS[network]
    return sum(skip if epoch.skip else full for epoch in path)


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


def entries(runs: Runs, network: str, epochs: int = EPOCHS) -> Iterator[Entry]:
    """All runs of a unit, in the order of the results; what is missing is trained."""
    full, _, forward = COSTS[network]

    def entry(method: str, path: Sequence[Epoch], *, stock: bool = False) -> Entry:
        path = tuple(path)
        price = float(len(path)) if stock else cost(network, path)
        return Entry(method, path, price, tuple(runs.along(path)))

    def averaged(method: str, path: Sequence[Epoch], count: int) -> Entry:
        path = tuple(path)
        records = (*runs.along(path), runs.statistics(path, count))
        return Entry(method, path, cost(network, path) + forward, records[-1:])

    flat, falling = constant(epochs), stepped(epochs)
    chosen = settings(CHOSEN)
    yield entry("stock", flat, stock=True)
    yield entry("fused", flat)
    wus = runs.decided(epochs, Skipping(flat, **chosen))
    yield entry("WUS", wus)
    ending = runs.decided(
        epochs, Skipping(flat, **chosen, total_epochs=epochs, final_window=1)
    )  # fmt: skip
    yield entry("WUS, ending in a window", ending)
    yield entry("fused, its last epoch skipped", (*flat[:-1], Epoch(RATE, skip=True)))
    yield entry("fused, its last epoch falling", (*flat[:-1], Epoch(RATE, end=0.0)))
    price = cost(network, ending)
    yield entry("stock in WUS's time", flat[: round(price)], stock=True)
    short = flat[: round(price / full)]
    yield entry("fused in WUS's time", short)
    yield entry("  its last epoch falling", (*short[:-1], Epoch(RATE, end=0.0)))
    yield entry("  its last epoch skipped", (*short, Epoch(RATE, skip=True)))
    yield averaged("  statistics anew", short, 1)
    yield averaged(f"  average of {AVERAGED} epochs", short, AVERAGED)

    yield entry("stock, steps", falling, stock=True)
    yield entry("fused, steps", falling)
    both = runs.decided(epochs, Skipping(falling, **chosen))
    yield entry("WUS+LR", both)
    price = cost(network, both)
    yield entry("stock in WUS+LR's time", stepped(round(price)), stock=True)
    yield entry("fused in WUS+LR's time", stepped(round(price / full)))


if __name__ == "__main__":
    import sys

    out, data_dir = Path(sys.argv[1]), Path(sys.argv[2])
    for name in sys.argv[3:]:
        network, dataset, seed = name.split("/")
        images = CHOICE_IMAGES if network == "small" else IMAGES
        unit = Unit(network, dataset, int(seed))
        with claimed(out / str(unit)) as mine:
            if mine:
                runs = open_runs(unit, data_dir, out, images)
                if network == "small":
                    choose(runs)
                else:
                    for entry in entries(runs, network):
                        print(unit, entry.method, entry.cost, entry.last, entry.best, entry.skipped)
                    runs.store.drop_checkpoints()
