"""The memory of large weight gradients, kept from one full step to the next.

The C library hands a block of 32 MiB or more back to the system as soon as it is freed, and the
next step gets it in pages that are cleared one by one, which takes longer than the product that
fills them. So the block stays with its layer, until a skip window begins.
"""

from __future__ import annotations

from threading import Lock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["gradient_memory", "release"]

#: The largest size up to which glibc may come to keep freed blocks (DEFAULT_MMAP_THRESHOLD_MAX).
LARGE_BYTES = 32 << 20

_kept: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
_lock = Lock()


def gradient_memory(layer: nn.Module) -> Tensor:
    """An uninitialised tensor like ``layer.weight``, contiguous, that nothing else shares.

    A large one on the CPU takes the memory of the last one, once every tensor there is gone.
    """
    weight = layer.weight
    if weight.device.type != "cpu" or weight.nbytes < LARGE_BYTES:
        return torch.empty_like(weight, memory_format=torch.contiguous_format)
    with _lock:
        kept = _kept.get(layer)
        if (
            kept is None
            or kept.shape != weight.shape
            or kept.dtype != weight.dtype
            or torch.ops.wus.storage_users(kept) > 1
        ):
            kept = torch.empty_like(weight, memory_format=torch.contiguous_format)
            _kept[layer] = kept
        # Not a view: autograd makes it the weight's .grad without a copy.
        return torch.empty(0, dtype=weight.dtype).set_(kept)


def release(layer: nn.Module) -> None:
    """Gives the memory of this layer's last gradient back, as soon as that is gone."""
    _kept.pop(layer, None)
