"""Every kind of step on a model, measured on copies of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from ..conversion.convert import convert, packed_bytes, revert
from ..conversion.modules import stock_class
from ..conversion.windows import set_skip
from ..engine.engine import Engine
from ..engine.parameters import is_converted
from ..nn import DropIn, is_bias
from .report import Layer, Profile, Step
from .saved import peak_bytes, saving
from .timing import interleaved, spread

__all__ = ["profile"]


def profile(
    model: nn.Module,
    example: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    loss: Callable[[Any], Tensor] | None = None,
    rounds: int = 5,
    bf16: bool = False,
    **settings: Any,
) -> Profile:
    """What stock's steps and this package's cost on a model: time, memory, and layer by layer.

    Steps are measured on copies, by turns, in training mode and without an optimizer: gradients
    set to None, forward, loss, backward. The model, its gradients and torch's random numbers are
    left as they were; some seven copies of it take memory meanwhile.

    Args:
        model: any module, converted or not.
        example: its input: a tensor, a tuple of arguments or a dict of keyword arguments; of the
            shape, layout and type that training will use.
        loss: a scalar from the model's output; default: the mean of every floating-point tensor in
            it, summed.
        rounds: steps of each kind that are timed, from 1 up (default 5).
        bf16: times steps under ``torch.autocast`` in bfloat16 as well (default False).
        settings: of :func:`wus_ext.convert`.

    Returns:
        A :class:`wus_ext.Profile`: ``print`` it.

    Raises:
        ValueError: if ``rounds`` is less than one, ``example`` holds no tensor, or the output
            nothing that a loss could be made of; or what :func:`wus_ext.convert` raises.

    >>> model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
    >>> result = wus_ext.profile(model, torch.randn(2, 3, 8, 8), rounds=1)
    >>> sorted(result.steps)[:3]
    ['evaluation', 'fused full', 'input gradients']
    >>> result.layers[0].chain
    'conv relu'
    """
    if rounds < 1:
        raise ValueError(f"rounds: expected a number from 1 up, got {rounds!r}")
    args, kwargs = _arguments(example)
    device = next(iter(_tensors((args, kwargs)))).device
    settings.pop("full", None)
    with torch.random.fork_rng(enabled=True):
        runs = {
            kind: _Run(kind, _prepared(model, kind, settings), args, kwargs, loss, device)
            for kind in _kinds(bf16)
        }
        layers = _layers(runs["skip"])
        seconds = interleaved(runs, rounds, warmup=1)  # a window's first step transforms weights
        steps = {kind: run.measured(seconds[kind]) for kind, run in runs.items()}
    root = stock_class(type(model)).__name__
    return Profile(root, device.type, torch.get_num_threads(), steps, layers)


KINDS = (
    "stock full",
    "stock frozen",
    "skip",
    "input gradients",
    "fused full",
    "stock evaluation",
    "evaluation",
)


def _kinds(bf16: bool) -> Iterator[str]:
    yield from KINDS
    if bf16:
        yield from (f"{kind} bf16" for kind in KINDS if "evaluation" not in kind)


def _prepared(model: nn.Module, kind: str, settings: dict[str, Any]) -> nn.Module:
    """A copy of the model, ready for one kind of step."""
    copied = copy.deepcopy(model)
    if is_converted(copied):
        revert(copied)
    copied.zero_grad()
    copied.train("evaluation" not in kind)
    kind = kind.removesuffix(" bf16")
    if kind == "stock frozen":
        for name, parameter in copied.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and is_bias(name))
    elif not kind.startswith("stock"):
        fused = kind in ("fused full", "evaluation")
        convert(copied, full="fused" if fused else "stock", **settings)
        if not fused:
            set_skip(copied, True, skip_biases=kind == "input gradients")
    return copied


class _Run:
    """One kind of step; each call runs one."""

    def __init__(
        self,
        kind: str,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        loss: Callable[[Any], Tensor] | None,
        device: torch.device,
    ) -> None:
        self.kind, self.model, self.device = kind, model, device
        self.args, self.kwargs = args, kwargs
        self._loss = loss or _mean
        if kind.startswith("input gradients"):
            self.args, self.kwargs = _requiring_gradients((args, kwargs))

    def __call__(self) -> None:
        self.model.zero_grad(set_to_none=True)
        if "evaluation" in self.kind:
            with torch.no_grad():
                self.model(*self.args, **self.kwargs)
        else:
            self.forward().backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forward(self) -> Tensor:
        """The loss, with its graph."""
        low: AbstractContextManager[Any] = nullcontext()
        if self.kind.endswith("bf16"):
            low = torch.autocast(self.device.type, torch.bfloat16)
        with low:
            return self._loss(self.model(*self.args, **self.kwargs))

    def measured(self, seconds: list[float]) -> Step:
        """What the step costs."""
        self.model.zero_grad(set_to_none=True)
        peak = peak_bytes(self, self.device)
        transformed = packed_bytes(self.model) if is_converted(self.model) else 0
        saved = 0
        if "evaluation" not in self.kind:
            inputs = list(_tensors((self.args, self.kwargs)))
            with saving([*self.model.parameters(), *self.model.buffers(), *inputs]) as count:
                loss = self.forward()
                saved = count()
            loss.backward()
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.model.zero_grad(set_to_none=True)
        milliseconds = median(seconds) * 1e3
        return Step(self.kind, milliseconds, spread(seconds), saved, transformed, gradients, peak)


def _layers(run: _Run) -> list[Layer]:
    """How the layers of a skip step run."""
    names = {module: name for name, module in run.model.named_modules()}
    root: Any = run.model
    engine: Engine = root._skip_engine
    with engine.recording() as chains, engine.explaining() as notes:
        run.forward()
    layers = [
        Layer(names[layer], chain, notes.algorithms.get(layer, ""), "") for layer, chain in chains
    ]
    fused = {layer for layer, _ in chains}
    for module, name in names.items():
        has_form = isinstance(module, (nn.Conv2d, nn.Linear)) and isinstance(module, DropIn)
        if has_form and module not in fused:
            hooked = "a hook of its own sees it" if module._forward_hooks else ""
            note = hooked or notes.reasons.get(module, "not called in the model's forward")
            layers.append(Layer(name, "", "", note))
    return layers


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        arguments: tuple[tuple[Any, ...], dict[str, Any]] = (), dict(example)
    elif isinstance(example, (tuple, list)):
        arguments = tuple(example), {}
    else:
        arguments = (example,), {}
    if next(iter(_tensors(arguments)), None) is None:
        raise ValueError(
            "example: expected a tensor, a tuple of arguments or a dict of keyword arguments, with "
            f"a tensor among them, got {type(example).__name__}"
        )
    return arguments


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(list(vars(value).values()))


def _requiring_gradients(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.is_floating_point())
    if isinstance(value, Mapping):
        return {key: _requiring_gradients(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(map(_requiring_gradients, value))
    return value


def _mean(output: Any) -> Tensor:
    means = [tensor.float().mean() for tensor in _tensors(output) if tensor.requires_grad]
    if not means:
        raise ValueError(
            "loss: the model's output holds no tensor with a gradient; give a loss that makes one"
        )
    return torch.stack(means).sum()
