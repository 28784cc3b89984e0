"""Tracing a model's forward pass, every layer a leaf; an error where a graph would not do.

A graph does not record what surrounds a call (no_grad, autocast, hooks of saved tensors), nor
tensors that ``forward`` makes itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import nn as skip_nn

# torch.fx patches torch.nn.Module for all threads while it traces.
_one_at_a_time = threading.Lock()


class _Tracer(fx.Tracer):
    traced_func_name = "_forward_of_one_tensor"
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._outside = self._surroundings()

    def create_proxy(self, *args: Any, **kwargs: Any) -> fx.Proxy:
        if self._surroundings() != self._outside:
            raise fx.proxy.TraceError(
                "forward runs a part under no_grad, autocast, saved-tensor hooks or checkpoint"
            )
        return super().create_proxy(*args, **kwargs)

    @staticmethod
    def _surroundings() -> tuple:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return (*ambient(), hooks)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and not isinstance(a, nn.Parameter):
            raise fx.proxy.TraceError("forward makes a tensor that tracing would take for constant")
        return super().create_arg(a)

    def is_leaf_module(self, module: nn.Module, qualname: str) -> bool:
        return (
            isinstance(module, skip_nn.SkipLayer)
            or has_hooks(module)
            or super().is_leaf_module(module, qualname)
        )


def trace(model: nn.Module, forward: Callable[..., Any]) -> fx.Graph:
    """The graph of ``forward(model, input)``; other arguments have their defaults."""

    def _forward_of_one_tensor(self: nn.Module, input: Tensor) -> Any:
        return forward(self, input)

    cls = type(model)
    with _one_at_a_time:
        cls._forward_of_one_tensor = _forward_of_one_tensor
        try:
            return _Tracer().trace(model)
        finally:
            del cls._forward_of_one_tensor


def ambient() -> tuple:
    """What a ``with`` statement inside forward may change and a graph does not record."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")),
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches this module's calls; then it is called, never fused."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
