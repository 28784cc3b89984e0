"""A training run: network, optimizer, schedule, policy and their state on disk."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..conversion.convert import convert, measured
from ..distributed import processes
from ..engine.parameters import skipped_now
from ..methods.table import METHODS
from .config import TrainConfig
from .data import Data, load_data
from .errors import ConfigError, DataError, RunWarning, TrainingError
from .length import final_window, last_epoch, stopped_at
from .loop import evaluate, train_epoch
from .methods import build_model, build_policy
from .networks import check_forward
from .optimizers import build_optimizer, check_state, momentum_of
from .progress import Progress
from .runfolder import RunFolder
from .schedules import build_scheduler
from .seeding import mix
from .skipping import skipped_epoch
from .state import FORMAT
from .tensorboard import Scalars
from .weights import load_weights

__all__ = ["Trainer", "train"]


class Trainer:
    """Trains one network with one method, an epoch at a time.

    All randomness of an epoch derives from the seed and the epoch's number, so a resumed run ends
    with the same weights as an uninterrupted one, bit for bit (same machine, same thread count).
    The global seed of torch is set at construction and at each epoch.

    In several processes (torch.distributed initialised, a trainer in each) every one trains on
    its part of each batch with ``DistributedDataParallel``, and the first keeps the files.

    Args:
        config: the settings.
        out: folder of the run; ``None`` keeps nothing on disk.
        resume: continue the run in ``out`` after its last finished epoch.
        data: the images, instead of loading those of ``config``.
        build: makes the network from the number of classes, instead of ``config.model``.
        progress: prints bars and lines; ``None`` is silent.

    Attributes:
        history: one record (a dict) per finished epoch, as in ``metrics.jsonl``.
        model, optimizer, scheduler, policy: what is trained, with what; the last two may be None.
        replica: the model, wrapped in ``DistributedDataParallel`` where there are several.

    Raises:
        ConfigError: a setting is wrong, or contradicts the run in ``out``, or another process
            trains there.
        DataError: the dataset or the checkpoint is not usable.
        StorageError: the first files of the run cannot be written.
        MissingExtra: the dataset needs a package that is not installed.

    >>> config = TrainConfig(
    ...     model="alexnet", limit_train=20, limit_test=10, epochs=1, batch_size=10
    ... )
    >>> trainer = Trainer(config)
    >>> record = trainer.run_epoch()
    >>> record["epoch"], record["skipped"], trainer.finished
    (1, False, True)
    """

    def __init__(
        self,
        config: TrainConfig,
        *,
        out: str | Path | None = None,
        resume: bool = False,
        data: Data | None = None,
        build: Callable[[int], nn.Module] | None = None,
        progress: Progress | None = None,
    ) -> None:
        config.validate()
        self.config, self.progress = config, progress
        self._scalars: Scalars | None = None
        self.device = config.torch_device()
        folder = self.folder = RunFolder(out) if out is not None else None
        state = None
        if folder is not None:
            state = processes.from_first(lambda: folder.open(config, resume=resume))
        try:
            self._set_up(data, build)
            if state is not None:
                self._load_state_dict(state)
            elif config.weights is not None:
                self._say(load_weights(self.model, config.weights, config.model))
            if folder is not None:
                processes.from_first(lambda: folder.begin(config, state))
                if config.tensorboard and processes.rank() == 0:
                    self._scalars = Scalars(folder.path / "tensorboard")
                    self._scalars.begin(self.history)
                self._finish()
        except BaseException:
            if folder is not None:
                folder.release()
            raise

    def _set_up(self, data: Data | None, build: Callable[[int], nn.Module] | None) -> None:
        config = self.config
        self.data = data or _load_once(config)
        torch.manual_seed(mix(config.seed, "weights"))
        self.model = build_model(config, len(self.data.classes), build).to(self.device)
        check_forward(self.model, self.data.sample(), len(self.data.classes), config.model)
        if config.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.replica = self._replicate()
        self.optimizer = build_optimizer(config, self.model)
        self.scheduler = build_scheduler(config, self.optimizer)
        self.policy = build_policy(config, self.replica, self.scheduler)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.history: list[dict[str, Any]] = []
        self.best_epoch = 0

    def _say(self, text: str) -> None:
        if self.progress:
            self.progress.say(text)

    def _replicate(self) -> nn.Module:
        """The model as it trains: one of several replicas, or itself."""
        if processes.count() == 1:
            return self.model
        device_ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(self.model, device_ids=device_ids)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done."""
        return len(self.history) >= last_epoch(self.config, self.history)

    def run(self) -> list[dict[str, Any]]:
        """Train the epochs that are left; returns :attr:`history`."""
        while not self.finished:
            self.run_epoch()
        return self.history

    def run_epoch(self) -> dict[str, Any]:
        """Train, evaluate and store one epoch; returns its record.

        Raises:
            TrainingError: the loss is no longer finite. The run's files keep the epoch before.
            StorageError: the epoch cannot be stored; so do they then.
        """
        config, data = self.config, self.data
        epoch = len(self.history) + 1
        skipped = self.policy is not None and self.policy.skipping
        rate = self.optimizer.param_groups[0]["lr"]
        # Dropout of its own for each process.
        rank = processes.rank()
        torch.manual_seed(mix(config.seed, "epoch", epoch, *([rank] if rank else [])))
        on_step = None
        if self.progress:
            steps = data.steps(config.batch_size)
            on_step = self.progress.begin(epoch, config.epochs, steps, skipped)
        try:
            with self._steps() as begin:
                training = train_epoch(
                    self.replica,
                    data.training_batches(config.batch_size, config.seed, epoch, self.device),
                    self.optimizer,
                    device=self.device,
                    amp=config.amp,
                    scaler=self.scaler,
                    label_smoothing=config.label_smoothing,
                    clip_grad_norm=config.clip_grad_norm,
                    on_step=on_step,
                    cuda_graphs=config.cuda_graphs,
                    begin=begin,
                )
        finally:
            if self.progress:
                self.progress.close()
        if not math.isfinite(training.loss):
            raise TrainingError(self._diverged(epoch, rate))

        self._share_buffers()
        validation = self._evaluate(data.validation) if data.validation else None
        test = self._evaluate(data.test)
        held_out = validation if config.watch == "validation" else None
        self._decide((held_out or training).accuracy)
        record = {
            "epoch": epoch,
            "lr": rate,
            "skipped": skipped,
            "skipped_steps": training.skipped,
            "train_loss": training.loss,
            "train_accuracy": training.accuracy,
            "validation_loss": validation.loss if validation else None,
            "validation_accuracy": validation.accuracy if validation else None,
            "test_loss": test.loss,
            "test_accuracy": test.accuracy,
            "train_seconds": training.seconds,
            "eval_seconds": test.seconds + (validation.seconds if validation else 0.0),
            "images_per_second": training.images / training.seconds,
            "step_seconds": training.step_seconds,
            "peak_bytes": training.peak_bytes,
            "packed_bytes": training.packed_bytes,
        }
        self._store(record)
        if self.progress:
            self.progress.end(record, config.epochs)
        return record

    def _steps(self) -> AbstractContextManager[Callable[[int], bool]]:
        """What to call before each step of the epoch; it says whether the step skips."""
        if self.policy is None or not self.policy.skipping:
            return nullcontext(lambda step: False)
        method = METHODS[self.config.method]
        return skipped_epoch(
            self.replica,
            self.optimizer,
            layers=self.policy.layers,
            full_every=None if method.always else self.config.full_every,
            bias_lr=self.config.bias_lr,
        )

    def _share_buffers(self) -> None:
        """Running statistics of the first process for all, as DistributedDataParallel has it."""
        if processes.count() > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)

    def _evaluate(self, split: Any) -> Any:
        batches = self.data.evaluation_batches(split, self.config.batch_size)
        return evaluate(self.model, batches, device=self.device, amp=self.config.amp)

    def _decide(self, accuracy: float) -> None:
        if self.scheduler is not None:
            self.scheduler.step()
        if self.policy is not None:
            self.optimizer.zero_grad()  # used by the last step: nothing that a window could lose
            stood_still = skipped_now(self.model).values()
            if not self.policy.step(accuracy) and self.config.window_momentum == "reset":
                # Zero is as good as none, which torch's fused SGD takes for all or nothing.
                for weight in stood_still:
                    momentum = momentum_of(self.optimizer, weight)
                    if momentum is not None:
                        momentum.zero_()

    def _store(self, record: dict[str, Any]) -> None:
        # Held-out images choose the best epoch; without a validation part that is the test part.
        watched = "test" if record["validation_accuracy"] is None else "validation"
        key = f"{watched}_accuracy"
        self.history.append(record)
        self._stop_early()
        best = not self.best_epoch or record[key] > self.history[self.best_epoch - 1][key]
        if best:
            self.best_epoch = record["epoch"]
        if self.folder and processes.rank() == 0:
            self.folder.save(self.state_dict(), best=best)
            if self._scalars:
                self._scalars.add(record)
            self._finish()

    def _stop_early(self) -> None:
        """Open the final window of a run that is to end before its time."""
        epoch = len(self.history)
        if final_window(self.config) and epoch == stopped_at(self.history, self.config.early_stop):
            finish = getattr(self.policy, "finish", None)
            if finish is not None:
                finish()

    def _finish(self) -> None:
        if self.folder and self.finished and processes.rank() == 0:
            self.folder.finish()
            if self._scalars:
                self._scalars.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next epoch depends on, as tensors and plain values."""
        return {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "processes": processes.count(),
            "classes": self.data.classes,
            "mean": self.data.normalize.mean,
            "std": self.data.normalize.std,
            "epoch": len(self.history),
            "best_epoch": self.best_epoch,
            "train_seconds": sum(record["train_seconds"] for record in self.history),
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "policy": self.policy.state_dict() if self.policy else None,
            "scaler": self.scaler.state_dict(),
            "measured": measured(self.model),
        }

    def _load_state_dict(self, state: dict[str, Any]) -> None:
        folder = self.folder
        assert folder is not None
        if state.get("processes", 1) != processes.count():
            raise ConfigError(
                f"cannot resume {folder.path}: it trained in {state['processes']} processes, "
                f"here are {processes.count()}"
            )
        if state["classes"] != self.data.classes:
            raise ConfigError(
                f"cannot resume {folder.path}: its classes are {', '.join(state['classes'])}, "
                f"those of the images here {', '.join(self.data.classes)}"
            )
        try:
            if choices := state.get("measured"):  # so that it rounds as before
                convert(self.model, **(self.config.skip_settings() | {"algo": choices}))
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            for owner, name in ((self.scheduler, "scheduler"), (self.policy, "policy")):
                if owner:
                    owner.load_state_dict(state[name])
            self.scaler.load_state_dict(state["scaler"])
            check_state(self.optimizer)
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise DataError(f"{folder.last} does not fit the settings ({reason})") from error
        self.history, self.best_epoch = state["history"], state["best_epoch"]

    def _diverged(self, epoch: int, rate: float) -> str:
        kept = f"; {self.folder.last} keeps epoch {epoch - 1}" if self.folder and epoch > 1 else ""
        return (
            f"the training loss of {self.config.model} ({self.config.method}) became infinite or "
            f"NaN in epoch {epoch}: use a lower --lr (it was {rate:.4g}){kept}"
        )


def _load_once(config: TrainConfig) -> Data:
    """Loads the data, in the first process before the others, so that one downloads."""
    loaded: list[Data] = []
    processes.from_first(lambda: loaded.append(load_data(config)))
    if loaded:
        return loaded[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunWarning)  # the first process has said it
        return load_data(config)


def train(config: TrainConfig, **options: Any) -> list[dict[str, Any]]:
    """Train as ``config`` says and return one record per epoch.

    Args:
        config: the settings.
        **options: those of :class:`Trainer`.

    Returns:
        A dict for each epoch: accuracies in percent, times in seconds, sizes in bytes.

    Raises:
        ConfigError, DataError, MissingExtra: as :class:`Trainer`.
        TrainingError, StorageError: as :meth:`Trainer.run_epoch`.

    >>> config = TrainConfig(
    ...     model="alexnet", limit_train=20, limit_test=10, epochs=2, batch_size=10
    ... )
    >>> [record["epoch"] for record in train(config)]
    [1, 2]
    """
    return Trainer(config, **options).run()
