"""Linear layers' products: with a weight that stands still, and with one that trains."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._build import build_info
from .._torch import packed_linear, packed_linear_weight
from ..nn import SkipLayer
from .gradient_memory import LARGE_BYTES, gradient_memory
from .packed_weights import PackedWeights
from .support import Unchanged, is_batched, on_gpu

__all__ = ["Products"]

ops = torch.ops.wus

#: Below this many values per weight torch's own products are as fast.
LARGE = 1 << 18
#: Batches for which a product in blocks of the weight was measured to be faster than torch's.
BLOCK_BATCHES = range(32, 257)
VECTORS = build_info()["cpu_capability"] != "generic"


def only_torch(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch's products are the only ones for a weight, and need no memory of ours."""
    nbytes = weight.numel() * dtype.itemsize
    return on_gpu(weight) or (dtype != torch.float32 and nbytes < LARGE_BYTES)


class Products:
    """x @ weight.T, grad @ weight and grad.T @ x of one step of a linear layer.

    Args:
        weight: the layer's, detached, or a copy in another type.
        packed: the weight as oneDNN packed it, for the first product.
        transposed: for the second.
        linear: the layer, where its weight trains.
    """

    def __init__(
        self,
        weight: Tensor,
        packed: Tensor | None = None,
        transposed: Tensor | None = None,
        linear: SkipLayer | None = None,
    ) -> None:
        self.weight = weight
        self.packed = packed
        self.transposed = transposed
        self.linear = linear
        self._unchanged = Unchanged(weight)

    @classmethod
    def training(cls, linear: SkipLayer, weight: Tensor, dtype: torch.dtype) -> Products:
        """Of a step after which the layer's weight changes, in the input's type."""
        return cls(weight.detach().to(dtype), linear=linear)

    @classmethod
    def frozen(
        cls,
        linear: SkipLayer,
        weight: Tensor,
        input: Tensor,
        packed: PackedWeights,
        backward: bool,
    ) -> Products:
        """Of a weight that stands still: packed once for a skip window, where that pays."""
        sources, weight = (weight,), weight.detach()
        if weight.dtype != input.dtype:
            name = ("cast", input.dtype, True)
            return cls(packed.get(linear, name, sources, lambda: weight.to(input.dtype)))
        if (
            on_gpu(weight)
            or weight.dtype != torch.float32
            or not linear.skip_wgrad  # to check a copy costs as much as it saves
            or weight.numel() < LARGE
            or not torch.backends.mkldnn.enabled
            or not torch.backends.mkldnn.is_available()
        ):
            return cls(weight)
        rows = input.size(0)

        def fits(name: str) -> bool:
            if packed.budget == "auto":  # one copy takes what the gradient would, whatever is kept
                return name == "forward"
            return packed.fits(linear, (name,), lambda: weight.nbytes)

        def copy(name: str, weight: Tensor) -> Tensor | None:
            if not fits(name):
                return None
            return packed.get(
                linear, name, sources, lambda: packed_linear_weight(weight.contiguous(), rows)
            )

        return cls(weight, copy("forward", weight), copy("dgrad", weight.t()) if backward else None)

    def forward(self, input: Tensor, bias: Tensor | None) -> Tensor:
        """input @ weight.T + bias."""
        if self.packed is not None:
            return packed_linear(input.contiguous(), self.packed, bias)
        bias = None if bias is None else bias.to(input.dtype)
        if suits_blocks(input, self.weight):
            return ops.linear_forward(input, self.weight, bias)
        return F.linear(input, self.weight, bias)

    def dgrad(self, grad: Tensor) -> Tensor:
        """The input's gradient."""
        if self.transposed is not None:
            return packed_linear(grad.contiguous(), self.transposed, None)
        weight = self._unchanged()
        return ops.linear_dgrad(grad, weight) if suits_blocks(grad, weight) else grad @ weight

    def wgrad(self, grad: Tensor, input: Tensor) -> Tensor:
        """The weight's gradient, in the input's type."""
        if is_batched(grad):
            return grad.t() @ input
        assert self.linear is not None
        size = (grad.size(1), input.size(1))
        return torch.mm(grad.t(), input, out=gradient_memory(self.linear, grad, size))


def suits_blocks(input: Tensor, weight: Tensor) -> bool:
    """Whether a product with a weight as it is is better done by the kernels of this package."""
    return (
        VECTORS
        and weight.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and weight.is_contiguous()
        and weight.numel() >= LARGE
        and len(input) in BLOCK_BATCHES
        and not is_batched(input)
    )
