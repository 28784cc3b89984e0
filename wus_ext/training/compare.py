"""The paper's experiment: the same network, weights and data order under each method."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import torch

from ..methods.table import BASELINE, METHODS, SKIPPING
from .config import RELOCATABLE, TrainConfig
from .data import Data, load_data
from .errors import ConfigError, usable
from .files import write_atomic
from .lock import FolderLock
from .loop import train_epoch
from .methods import check_layers
from .progress import Progress
from .report import write_report
from .run import Run
from .runfolder import RunFolder, is_free
from .settings import check_types, differences, from_plain, reading
from .trainer import Trainer

__all__ = ["CompareConfig", "compare"]


@dataclass(frozen=True)
class CompareConfig:
    """What to compare.

    Args:
        base: the settings that all runs share; its model, method and seed do not matter.
        models: networks, see :data:`~wus_ext.training.config.MODELS`.
        methods: any of :data:`~wus_ext.methods.table.METHODS`. The baseline always runs:
            everything is measured against it.
        seeds: runs of each, with the seeds 0, 1, ...
        control: also train the baseline, and ``fused`` if it is one of the methods, for only as
            long as each method took.
    """

    base: TrainConfig
    models: tuple[str, ...] = ("vgg11",)
    methods: tuple[str, ...] = (BASELINE, *SKIPPING)
    seeds: int = 1
    control: bool = True

    def validate(self) -> None:
        """Check every setting of every run.

        Raises:
            ConfigError: naming the first setting that is wrong.
        """
        check_types(self)
        if self.seeds < 1:
            raise ConfigError(f"seeds must be at least 1, got {self.seeds!r}")
        if self.base.early_stop is not None:
            raise ConfigError("early_stop is not for comparisons: they train all runs to the end")
        for name in ("models", "methods"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(f"{name} must be one or more different names, got {list(values)}")
        if len({self.base.replace(model=model).model_name() for model in self.models}) != len(
            self.models
        ):
            raise ConfigError(f"models must differ in more than punctuation, got {self.models}")
        for model in self.models:
            for method in self.methods:
                config = self.base.replace(model=model, method=method)
                config.validate()
                check_layers(config)

    def ordered_methods(self) -> list[str]:
        """The methods in the order of the table, the baseline first."""
        return [name for name in METHODS if name in self.methods or name == BASELINE]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        base = self.base.to_dict()
        for name in ("model", "method", "seed"):
            del base[name]
        return {
            "models": list(self.models),
            "methods": self.ordered_methods(),
            "seeds": self.seeds,
            "control": self.control,
            **base,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CompareConfig:
        """The inverse of :meth:`to_dict`.

        Raises:
            ConfigError: a name is no setting, or a value is none of its.
        """
        own = {"models", "methods", "seeds", "control"}
        base = TrainConfig.from_dict({k: v for k, v in values.items() if k not in own})
        return from_plain(cls, {"base": base, **{k: values[k] for k in own & values.keys()}})


def compare(
    config: CompareConfig,
    out: str | Path,
    *,
    resume: bool = False,
    target: float | None = None,
    say: Callable[[str], None] | None = None,
) -> list[Run]:
    """Train every network with every method and write ``table.md``, ``table.csv``, ``plot.png``.

    The methods of a network take turns, an epoch each, so that a machine that slows down does so
    for all of them alike; times are wall-clock times. The controls run afterwards, for their
    length depends on the others' times.

    Args:
        config: what to compare.
        out: folder for the results; each run has its own folder inside.
        resume: continue the comparison in ``out``; finished runs are not repeated. Seeds may be
            added, all else stays as it was.
        target: test accuracy in percent whose time the table gives; by default the baseline's of
            the same network and seed, less 1.
        say: receives the lines to print; ``None`` is silent.

    Returns:
        All runs, the controls included.

    Raises:
        ConfigError, DataError, MissingExtra, StorageError, TrainingError: as :class:`Trainer`.
    """
    config.validate()
    if target is not None and not 0 < target <= 100:
        raise ConfigError(f"target must be in percent, above 0 and at most 100, got {target}")
    out = Path(out).expanduser()
    _check(out, config, resume)
    with FolderLock(out):
        _check(out, config, resume)  # another process may have come between
        return _compare(config, out, target, say)


def _compare(
    config: CompareConfig, out: Path, target: float | None, say: Callable[[str], None] | None
) -> list[Run]:
    bases = [config.base.replace(model=model) for model in config.models]
    data = _load(bases[0], say)
    text = json.dumps(config.to_dict(), indent=2) + "\n"
    write_atomic(out / "compare.json", lambda file: file.write(text.encode()))
    runs: list[Run] = []
    for before, shared in pairwise([bases[0], *bases]):
        model = shared.model
        if _images(shared) != _images(before):
            data = _load(shared, say)
        for seed in range(config.seeds):
            base = shared.replace(seed=seed)
            methods = {name: base.replace(method=name) for name in config.ordered_methods()}
            histories = _train_in_turns(methods, out, data, verbose=say is not None)
            trained = [Run(model, name, seed, history) for name, history in histories.items()]
            runs += trained
            if config.control:
                runs += _controls(base, trained, out, data, verbose=say is not None)
    table = write_report(runs, config.base, out, target)
    if say:
        say(table)
    return runs


def _load(config: TrainConfig, say: Callable[[str], None] | None) -> Data:
    data = load_data(config)
    if say and data.about:
        say(data.about)
    return data


def _images(config: TrainConfig) -> object:
    """What makes the images of one network other than those of another."""
    return config.pixels(), config.normalisation() == "pretrained" and config.model


def read_compare(out: str | Path) -> CompareConfig:
    """The settings of the comparison in ``out``.

    Raises:
        ConfigError: there is none.
    """
    path = Path(out).expanduser() / "compare.json"
    with usable(path.parent):
        if not path.is_file():
            raise ConfigError(f"no comparison to resume in {path.parent}: it has no compare.json")
    with reading(path) as values:
        return CompareConfig.from_dict(values)


def _check(out: Path, config: CompareConfig, resume: bool) -> None:
    if not resume:
        with usable(out):
            free = is_free(out)
        if not free:
            raise ConfigError(
                f"{out} is not empty: continue the comparison there with --resume, or choose "
                "another --out"
            )
        return
    saved, wanted = read_compare(out).to_dict(), config.to_dict()
    added = saved["seeds"] < wanted["seeds"]
    ignore = RELOCATABLE | {"seeds"} if added else RELOCATABLE
    if found := differences(saved, wanted, ("there", "here"), ignore=ignore):
        raise ConfigError(f"cannot resume {out}: {'; '.join(found)}")


def _train_in_turns(
    configs: dict[str, TrainConfig], out: Path, data: Data, *, verbose: bool
) -> dict[str, list[dict[str, Any]]]:
    """Train runs that have the same network and seed; returns their histories by name."""
    folders = {
        name: out / config.model_name() / f"{name.replace('+', '-')}-seed{config.seed}"
        for name, config in configs.items()
    }
    histories: dict[str, list[dict[str, Any]]] = {}
    trainers: dict[str, Trainer] = {}
    for name, config in configs.items():
        history = RunFolder(folders[name]).finished(config)
        if history is not None:
            histories[name] = history
        else:
            label = f"{config.model} {name} seed {config.seed}"
            trainers[name] = Trainer(
                config,
                out=folders[name],
                resume=RunFolder(folders[name]).exists(),
                data=data,
                progress=Progress(label) if verbose else None,
            )
            histories[name] = trainers[name].history
            _warm_up(trainers[name])
    # A run that was interrupted ahead of the others waits for them.
    while unfinished := [trainer for trainer in trainers.values() if not trainer.finished]:
        min(unfinished, key=lambda trainer: len(trainer.history)).run_epoch()
    trainers.clear()
    gc.collect()
    return histories


def _warm_up(trainer: Trainer) -> None:
    """Let libraries choose and compile their kernels, so that the first to train does not pay."""
    model = copy.deepcopy(trainer.model)
    config = trainer.config
    batches = trainer.data.training_batches(config.batch_size, config.seed, 0, trainer.device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batch = islice(batches, 1)
    train_epoch(model, batch, optimizer, device=trainer.device, amp=config.amp)


def _controls(
    base: TrainConfig, runs: Sequence[Run], out: Path, data: Data, *, verbose: bool
) -> list[Run]:
    """What never skips, given only each other method's time: what training less reaches."""
    by_method = {run.method: run for run in runs}
    controls = []
    for full in (name for name in by_method if METHODS[name].build is None):
        for name, run in by_method.items():
            if name in (BASELINE, full):
                continue
            share = run.typical_seconds() / by_method[full].typical_seconds()
            epochs = max(1, min(base.epochs, round(base.epochs * share)))
            if epochs == base.epochs:
                history = by_method[full].history
            else:
                config = base.replace(method=full, epochs=epochs)
                label = f"{full}-{epochs}-epochs"
                history = _train_in_turns({label: config}, out, data, verbose=verbose)[label]
            controls.append(Run(base.model, f"{full} in the time of {name}", base.seed, history))
    return controls
