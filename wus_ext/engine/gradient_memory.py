"""The memory of large weight gradients, kept from one full step to the next.

The C library hands a block of 32 MiB or more back to the system as soon as it is freed, and the
next step gets it in pages that are cleared one by one, which takes longer than the product that
fills them. So the block stays with its layer, until a skip window begins.
"""

from __future__ import annotations

import math
from threading import Lock
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

__all__ = ["gradient_memory", "release"]

#: The largest size up to which glibc may come to keep freed blocks (DEFAULT_MMAP_THRESHOLD_MAX).
LARGE_BYTES = 32 << 20


class _Block(NamedTuple):
    memory: Tensor
    address: int

    def serves(self, like: Tensor, size: tuple[int, ...]) -> bool:
        return (
            self.memory.shape == size
            and self.memory.dtype == like.dtype
            and self.memory.data_ptr() == self.address  # neither resized nor moved, to be shared
            and torch.ops.wus.storage_users(self.memory) == 1
        )


_kept: WeakKeyDictionary[nn.Module, _Block] = WeakKeyDictionary()
_lock = Lock()


def gradient_memory(layer: nn.Module, like: Tensor, size: tuple[int, ...]) -> Tensor | None:
    """An uninitialised tensor for the gradient of a layer's weight, which nothing else shares.

    Args:
        layer: whose memory it is.
        like: has its type and device.
        size: of the gradient.

    Returns:
        A contiguous tensor, in the memory of the layer's last gradient if no tensor is left there;
        None where the allocator may be trusted: on GPUs, and below 32 MiB.
    """
    nbytes = like.element_size() * math.prod(size)
    if like.device.type != "cpu" or nbytes < LARGE_BYTES:
        return None
    with _lock:
        block = _kept.get(layer)
        if block is None or not block.serves(like, size):
            memory = like.new_empty(size)
            block = _kept[layer] = _Block(memory, memory.data_ptr())
        return block.memory.detach()  # autograd makes it the weight's .grad without a copy


def release(layer: nn.Module) -> None:
    """Gives the memory of this layer's last gradient back, as soon as that is gone."""
    _kept.pop(layer, None)
