"""The program that a converted model runs in a skip step, derived from it by torch.fx.

With ``full="fused"`` it runs in full steps as well.

The model's own ``forward`` is traced once, with every layer a leaf; chains of layers that belong
together become one call of :mod:`wus_ext.engine.chains`. The program holds no parameters: it runs
on the model's own layers. It is made again when the model changes (a layer replaced, a hook added,
train/eval switched), and where tracing fails there is none and the model runs layer by layer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from .chains import ConvChain
from .fusion import fuse
from .options import SkipOptions
from .packed_weights import PackedWeights
from .support import in_a_transform
from .tracing import ambient, has_hooks, trace

logger = logging.getLogger("wus_ext")


class Program:
    """The fused form of a model's forward pass of one tensor.

    Args:
        forward: the model's own, unbound ``forward``.
        model: the model, for tracing only; each call is handed it again.
        options: how chains run.
        packed: where chains keep transformed weights.

    Raises:
        Exception: whatever tracing raises for a model that torch.fx cannot read.
    """

    def __init__(
        self,
        model: nn.Module,
        forward: Callable[..., Any],
        options: SkipOptions,
        packed: PackedWeights,
    ) -> None:
        graph = trace(model, forward)
        self.chains = fuse(model, graph, options, packed)
        self._scope = _Scope(self.chains)
        code = graph.python_code("self")
        namespace = dict(code.globals)
        exec(compile(code.src, f"<skip program of {type(model).__name__}>", "exec"), namespace)
        self._run = namespace["forward"]

    def __call__(self, model: nn.Module, input: Tensor) -> Any:
        channels_last = _is_channels_last(input) or any(
            _is_channels_last(chain.conv.weight)
            for chain in self.chains.values()
            if isinstance(chain, ConvChain)
        )
        return self._run(self._scope.on(model), input, channels_last)


class ProgramCache:
    """A converted model's programs and transformed weights; a copy of the model starts anew.

    There is one program for each state of the model (training, evaluation, hooks) and of its
    surroundings (autocast, no_grad), or None where it cannot be traced.
    """

    MOST_PROGRAMS = 8

    def __init__(self, options: SkipOptions) -> None:
        self.options = options
        self.packed = PackedWeights(options.memory_budget)
        self._programs: dict[tuple, Program | None] = {}

    def __deepcopy__(self, memo: dict) -> ProgramCache:
        return ProgramCache(self.options)

    def __reduce__(self) -> tuple:
        return (ProgramCache, (self.options,))

    def program(
        self, model: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Program | None:
        """The program for this call, or None where the model must run layer by layer."""
        if (
            not self.options.fuse
            or in_a_transform()
            or kwargs
            or len(args) != 1
            or type(args[0]) is not Tensor
            or nn.modules.module._has_any_global_hook()
        ):
            return None
        now = (signature(model), ambient())
        if now not in self._programs:
            if len(self._programs) == self.MOST_PROGRAMS:
                self._programs.clear()
            self._programs[now] = self._derive(model, forward)
        return self._programs[now]

    def _derive(self, model: nn.Module, forward: Callable[..., Any]) -> Program | None:
        try:
            program = Program(model, forward, self.options, self.packed)
        except Exception as error:  # torch.fx and user code may raise anything
            logger.info("%s runs layer by layer: %s", type(model).__name__, error)
            return None
        logger.info("%s: fused %d chains", type(model).__name__, len(program.chains))
        return program

    def end_window(self, layers: Collection[nn.Module] | None = None) -> None:
        """Weights of these layers, or all, are about to change: drops what was made of them."""
        if self.options.full == "fused":
            self.packed.expire(layers)
        elif layers is None:
            self.packed.clear()
        else:
            self.packed.drop(layers)


class _Scope:
    """What ``self`` is to the program's code: the chains, and the model for all else."""

    def __init__(self, chains: dict[str, Any]) -> None:
        self.__dict__.update(chains)

    def on(self, model: nn.Module) -> _Scope:
        scope = _Scope(self.__dict__)
        scope.__dict__["_wus_model"] = model
        return scope

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_wus_model"], name)


def signature(model: nn.Module) -> tuple:
    """What a program depends on: the layers, their types and modes, and who has hooks."""
    return tuple(
        (id(module), type(module), module.training, has_hooks(module)) for module in model.modules()
    )


def _is_channels_last(tensor: Tensor) -> bool:
    return (
        tensor.dim() == 4
        and tensor.is_contiguous(memory_format=torch.channels_last)
        and not tensor.is_contiguous()
    )
