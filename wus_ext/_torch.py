"""What this package asks torch by names that torch keeps to itself, checked with 2.11 to 2.14.

Each is a function here, so that another version of torch changes one file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def in_a_transform() -> bool:
    """Whether the code around transforms functions: vmap, grad, jvp, forward-mode AD, ..."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def is_batched_by_autograd(tensor: Tensor) -> bool:
    """Whether a tensor stands for several, as in a backward pass of a batch of gradients."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def is_traced() -> bool:
    """Whether torch.jit traces what runs now."""
    return torch._C._get_tracing_state() is not None


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """A function that torch.compile leaves as it is, behind a break of the graph."""
    return torch._disable_dynamo(function)  # type: ignore[attr-defined]


def after_backward(callback: Callable[[], None]) -> None:
    """Has `callback` called when the backward pass that runs now has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(callback)


def packed_linear_weight(weight: Tensor, rows: int) -> Tensor:
    """A linear layer's weight as oneDNN packs it for inputs of `rows` rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def packed_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input @ weight.T + bias of a weight that :func:`packed_linear_weight` made."""
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
