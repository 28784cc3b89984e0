"""Which tensors the fused kernels take, in which type, and where they must not run."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from .._build import build_info
from .._torch import in_a_transform, is_batched_by_autograd

#: Types of the fused kernels' tensors, by device.
TYPES: dict[str, tuple[torch.dtype, ...]] = {"cpu": (torch.float32, torch.bfloat16)}
if build_info()["cuda"] is not None:
    TYPES["cuda"] = (torch.float32, torch.float16, torch.bfloat16)

#: Whose operators the chains of ``csrc/chains`` call.
KERNELS = "wus"


@overload
def single(tensor: Tensor) -> Tensor: ...
@overload
def single(tensor: Tensor | None) -> Tensor | None: ...
def single(tensor: Tensor | None) -> Tensor | None:
    """In float32, in which norms, biases and their gradients are computed."""
    return tensor if tensor is None or tensor.dtype == torch.float32 else tensor.float()


def on_gpu(tensor: Tensor) -> bool:
    """Whether the kernels for GPUs, and the algorithms that suit those, are to be used."""
    return tensor.device.type == "cuda"


def takes(tensor: Tensor) -> bool:
    """Whether the fused kernels take a tensor as it is."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype in TYPES.get(tensor.device.type, ())
        and tensor.layout == torch.strided
        and tensor.numel() > 0
    )


def is_batched(tensor: Tensor) -> bool:
    """Whether a tensor stands for several, as in a backward pass of a batch of gradients."""
    return is_batched_by_autograd(tensor) or in_a_transform()


def dense(image: Tensor) -> Tensor:
    """An image, or its gradient, in channels_last."""
    if is_batched(image):  # the kernels are handed one after the other
        return image.contiguous()
    return image.contiguous(memory_format=torch.channels_last)


def version(tensor: Tensor) -> int | None:
    """A tensor's version, which operations in place raise; None in inference mode."""
    return None if tensor.is_inference() else tensor._version


class Unchanged:
    """A weight used as it is, which backward must find as forward left it."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight
        self._version = version(weight)

    def __call__(self) -> Tensor:
        if version(self._weight) != self._version:
            raise RuntimeError(
                f"a weight of shape {list(self._weight.shape)} that backward needs was modified by "
                "an inplace operation after the forward pass"
            )
        return self._weight
