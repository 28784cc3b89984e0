"""Whether torch.func or forward-mode differentiation runs, which our operators do not know."""

from __future__ import annotations

import torch


def in_a_transform() -> bool:
    """Whether the code around transforms functions: vmap, grad, jvp, forward-mode AD, ..."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )
