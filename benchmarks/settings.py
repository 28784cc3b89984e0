"""Skip settings against shorter training: the section "Settings tried" of docs/results.md.

    python benchmarks/settings.py --data-dir DIR --seeds 3 --plot settings.png
    python benchmarks/settings.py --data-dir DIR --rows "constant 0.005" "F12 S"

DIR holds CIFAR-10 as image files, train/<class>/* and test/<class>/*; only train is read. A small
batch-norm network trains on 5,000 of its images; accuracies are those on 4,000 others at the end
of a run. ``--rows`` takes names of settings and of schedules. Runs of a seed share the epochs that
they begin with; a seed of all rows takes about 290 epochs. Finished runs are kept in ``--out``, so
that an interrupted search goes on from them; a row that was changed there must be deleted first.

Costs are counted, not timed: in full epochs, a skip step at r = 0.25 and 0.5 of a full step. Where
only some layers skip, the saving is their share of all multiplications.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.nn.functional as F
from common import machine, table
from settings_plot import bars, draw
from settings_rows import LR, ROWS, WIDTHS, Epoch, Row
from torch import Tensor, nn

import wus_ext
from wus_ext.training import DataError
from wus_ext.training.augment import Normalize, crop_and_flip
from wus_ext.training.files import write_atomic
from wus_ext.training.folder import scan_folder

TRAIN, HELD_OUT, BATCH = 5000, 4000, 64
STEPS = TRAIN // BATCH
SKIP_COSTS = (0.25, 0.5)


def network(classes: int = 10) -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = (3, *WIDTHS)
    for i, width in enumerate(WIDTHS):
        stride = 2 if i == 0 else 1
        layers += [
            nn.Conv2d(inputs[i], width, 3, stride=stride, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        if i in (0, 2, 4):
            layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(4 * WIDTHS[-1], classes)]
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


class Data:
    """Images for training, uint8, and held-out ones, normalised; both class-balanced."""

    def __init__(self, root: Path) -> None:
        split, _, classes = scan_folder(root)
        each = (TRAIN + HELD_OUT) // len(classes)
        generator = torch.Generator().manual_seed(7)
        of_class = [(split.labels == label).nonzero().flatten() for label in range(len(classes))]
        chosen = [own[torch.randperm(len(own), generator=generator)[:each]] for own in of_class]
        chosen = split.select(torch.stack(chosen, 1).flatten()).in_memory()
        images, labels = chosen.images.contiguous(), chosen.labels
        self.images, self.labels = images[:TRAIN], labels[:TRAIN]
        scaled = self.images.float().div(255)
        self.normalize = Normalize(scaled.mean((0, 2, 3)), scaled.std((0, 2, 3)))
        held_out = self.normalize(images[TRAIN:]).contiguous(memory_format=torch.channels_last)
        self.held_out = list(zip(held_out.split(500), labels[TRAIN:].split(500), strict=True))


class Trainer:
    """The network and its optimizer, an epoch at a time."""

    def __init__(self, data: Data, seed: int, gamma: bool) -> None:
        torch.manual_seed(1000 + seed)
        self.data, self.seed = data, seed
        self.model = wus_ext.convert(network(), skip_gamma=not gamma)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4
        )

    def state(self) -> tuple[dict, dict]:
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict()))

    def load(self, state: tuple[dict, dict]) -> None:
        model, optimizer = copy.deepcopy(state)
        self.model.load_state_dict(model)
        self.optimizer.load_state_dict(optimizer)

    def train(self, number: int, epoch: Epoch) -> float:
        """Returns the accuracy on the batches as they were learnt, in percent."""
        self.model.train()
        if epoch.fresh:
            for parameter in self.model.parameters():
                if parameter.dim() > 1:
                    self.optimizer.state[parameter].pop("momentum_buffer", None)
        # A tuple of whole numbers has the same hash in every process.
        generator = torch.Generator().manual_seed(hash((self.seed, number)) % 2**31)
        order = torch.randperm(TRAIN, generator=generator)
        steps = max(1, round(STEPS * epoch.part))
        right, skipping = 0, False
        for i in range(steps):
            skips = epoch.steps[i % len(epoch.steps)] == "S"
            if skips != skipping:
                layers = epoch.layers or None
                wus_ext.set_skip(self.model, skips, layers=layers)
                skipping = skips
            batch = order[i * BATCH : (i + 1) * BATCH]
            right += self._step(batch, generator, epoch.lr((i + 0.5) / STEPS), epoch, skips)
        wus_ext.set_skip(self.model, False)
        return 100 * right / (steps * BATCH)

    def _step(
        self, batch: Tensor, generator: torch.Generator, lr: float, epoch: Epoch, skips: bool
    ) -> int:
        images = self.data.normalize(crop_and_flip(self.data.images[batch], generator))
        labels = self.data.labels[batch]
        for group in self.optimizer.param_groups:
            group["lr"] = lr * (epoch.bias_rate if skips else 1)
        self.optimizer.zero_grad(set_to_none=True)
        output = self.model(images)
        F.cross_entropy(output, labels).backward()
        self.optimizer.step()
        return int((output.detach().argmax(1) == labels).sum())

    @torch.no_grad()
    def accuracy(self) -> float:
        self.model.eval()
        right = sum(int((self.model(x).argmax(1) == y).sum()) for x, y in self.data.held_out)
        return 100 * right / HELD_OUT


@dataclass(frozen=True)
class Run:
    """A finished run, kept in a file."""

    #: Small letters: parts of an epoch; P: a pattern.
    letters: str
    accuracy: float
    costs: tuple[float, ...]

    @classmethod
    def of(cls, epochs: Sequence[Epoch], accuracy: float) -> Run:
        letters = ""
        for epoch in epochs:
            letter = epoch.steps if len(epoch.steps) == 1 else "P"
            letters += letter if epoch.part == 1 else letter.lower()
        costs = tuple(sum(epoch.cost(r) for epoch in epochs) for r in SKIP_COSTS)
        return cls(letters, accuracy, costs)

    @classmethod
    def read(cls, path: Path) -> Run:
        fields = json.loads(path.read_text())
        return cls(fields["letters"], fields["accuracy"], tuple(fields["costs"]))

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, lambda file: file.write(json.dumps(asdict(self)).encode()))


def train_missing(rows: Mapping[str, Row], seeds: int, data_dir: Path | None, out: Path) -> None:
    """Train and keep the runs that are not there yet; what several begin with is trained once."""
    data = None
    for seed, gamma in product(range(seeds), (False, True)):
        left = {
            name: row
            for name, row in rows.items()
            if row.gamma == gamma and not file_of(out, name, seed).exists()
        }
        if left:
            if data_dir is None:
                raise DataError(f"--data-dir is needed: {len(left)} runs of seed {seed} are left")
            data = data or Data(data_dir)
            _train_on(Trainer(data, seed, gamma), left, [], [], out)


def _train_on(
    trainer: Trainer,
    rows: Mapping[str, Row],
    done: list[Epoch],
    accuracies: list[float],
    out: Path,
) -> None:
    branches: dict[Epoch | None, dict[str, Row]] = {}
    for name, row in rows.items():
        branches.setdefault(row.next(done, accuracies), {})[name] = row
    for name in branches.pop(None, {}):
        run = Run.of(done, trainer.accuracy())
        run.write(file_of(out, name, trainer.seed))
        print(f"{name}, seed {trainer.seed}: {run.letters} {run.accuracy:.2f} %", flush=True)
    state = trainer.state()
    for epoch, group in branches.items():
        trainer.load(state)
        accuracy = trainer.train(len(done), epoch)
        _train_on(trainer, group, [*done, epoch], [*accuracies, accuracy], out)


def file_of(out: Path, name: str, seed: int) -> Path:
    return out / name / f"{seed}.json"


@dataclass(frozen=True)
class Mean:
    """A setting over its seeds."""

    name: str
    schedule: str
    letters: str
    accuracies: tuple[float, ...]
    costs: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        return fmean(self.accuracies)

    @property
    def control(self) -> bool:
        return self.letters.lower() == "f" * len(self.letters)


def means(out: Path) -> Iterator[Mean]:
    """What is in ``out``, in the order of ROWS."""
    for schedule, rows in ROWS.items():
        for name in rows:
            runs = [Run.read(path) for path in sorted((out / name).glob("*.json"))]
            if runs:
                letters = " ".join(dict.fromkeys(run.letters for run in runs))
                costs = tuple(map(fmean, zip(*(run.costs for run in runs), strict=True)))
                yield Mean(name, schedule, letters, tuple(r.accuracy for r in runs), costs)


class Controls:
    """Accuracy over cost of what never skips.

    A schedule's curve is linear between its controls, of those that cost the same the best, and
    level behind the dearest. The best of all at a cost is the highest curve there, or the best
    control that costs less.
    """

    def __init__(self, results: Sequence[Mean]) -> None:
        self.curves: dict[str, list[tuple[float, float]]] = {}
        for schedule in dict.fromkeys(mean.schedule for mean in results):
            best: dict[float, float] = {}
            for mean in results:
                if mean.control and mean.schedule == schedule:
                    cost = mean.costs[0]
                    best[cost] = max(mean.accuracy, best.get(cost, 0.0))
            self.curves[schedule] = sorted(best.items())

    def at(self, cost: float, schedule: str) -> float | None:
        curve = self.curves[schedule]
        for (a, low), (b, high) in pairwise(curve):
            if a <= cost <= b:
                return low + (high - low) * (cost - a) / (b - a)
        return curve[-1][1] if curve and cost >= curve[-1][0] else None

    def best(self, cost: float) -> float | None:
        there = [value for name in self.curves if (value := self.at(cost, name)) is not None]
        cheaper = [accuracy for curve in self.curves.values() for c, accuracy in curve if c <= cost]
        return max(there + cheaper, default=None)


HEADER = ["setting", "epochs", "seeds", "accuracy, %"] + [
    f"r = {r}: {what}" for r in SKIP_COSTS for what in ("cost", "same schedule", "best control")
]


def line(mean: Mean, controls: Controls) -> list[str]:
    spread = f" ± {stdev(mean.accuracies):.1f}" if len(mean.accuracies) > 1 else ""
    cells = [mean.name, mean.letters, str(len(mean.accuracies)), f"{mean.accuracy:.1f}{spread}"]
    for cost in mean.costs:
        values = (controls.at(cost, mean.schedule), controls.best(cost))
        shown = ["-" if mean.control or v is None else f"{v:.1f}" for v in values]
        cells += [f"{cost:.2f}", *shown]
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, help="needed where something is left to train")
    parser.add_argument("--seeds", type=int, default=2, help="0 shows what is there (default: 2)")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/settings"))
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw a PNG, of what is in --out")
    parser.add_argument("--threads", type=int, default=2, help="they alter roundings (default: 2)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    names = [name for rows in ROWS.values() for name in rows]
    if unknown := set(args.rows) - {*ROWS, *names}:
        known = "\n  ".join([*ROWS, *names])
        parser.error(f"--rows: no {', '.join(sorted(unknown))}; there are\n  {known}")
    chosen = {
        name: row if isinstance(row, Row) else Row(epochs=row)
        for schedule, rows in ROWS.items()
        for name, row in rows.items()
        if {name, schedule} & set(args.rows)
    }
    try:
        train_missing(chosen, args.seeds, args.data_dir, args.out)
    except DataError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted; the same command goes on from here\n")
    results = list(means(args.out))
    controls = Controls(results)
    print(f"\n{machine()}\n")
    print(table(HEADER, [line(mean, controls) for mean in results if mean.name in chosen]))
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        shown = list(bars(results, controls))
        if not shown:
            parser.error("--plot: none of its settings has a control in --out yet")
        write_atomic(args.plot, lambda file: draw(shown, file))


if __name__ == "__main__":
    main()
