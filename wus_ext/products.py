"""Linear layers' products with frozen weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packing import PackedWeights
from .support import Unchanged, on_gpu

__all__ = ["FrozenProduct"]


class FrozenProduct:
    """x @ weight.T and grad @ weight, with the weight packed by oneDNN where that pays."""

    #: Below this many values per weight a packed copy gains nothing.
    WORTH_PACKING = 1 << 18

    def __init__(self, weight: Tensor, packed: tuple[Tensor, ...]) -> None:
        self.weight = weight
        self.packed = packed
        self._unchanged = Unchanged(weight)

    @classmethod
    def of(
        cls, linear: nn.Linear, input: Tensor, packed: PackedWeights, backward: bool
    ) -> FrozenProduct:
        weight = linear.weight.detach()
        if weight.dtype != input.dtype:
            key = (linear, "cast", input.dtype)
            return cls(packed.get(key, (linear.weight,), lambda: weight.to(input.dtype)), ())
        keys = [(linear, direction) for direction in ("forward", "dgrad")]
        if (
            on_gpu(weight)
            or weight.numel() < cls.WORTH_PACKING
            or not torch.backends.mkldnn.enabled
            or not torch.backends.mkldnn.is_available()
            or not packed.fits(keys, lambda: 2 * weight.nbytes)
        ):
            return cls(weight, ())
        reorder = torch.ops.mkldnn._reorder_linear_weight
        rows, sources = input.size(0), (linear.weight,)
        copies = [packed.get(keys[0], sources, lambda: reorder(weight.contiguous(), rows))]
        if backward:
            copies.append(
                packed.get(keys[1], sources, lambda: reorder(weight.t().contiguous(), rows))
            )
        return cls(weight, tuple(copies))

    def forward(self, input: Tensor, bias: Tensor | None) -> Tensor:
        if not self.packed:
            return F.linear(input, self.weight, None if bias is None else bias.to(input.dtype))
        return self._product(input, self.packed[0], bias)

    def dgrad(self, grad: Tensor) -> Tensor:
        if not self.packed:
            return grad @ self._unchanged()
        return self._product(grad, self.packed[1], None)

    @staticmethod
    def _product(input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
        pointwise = torch.ops.mkldnn._linear_pointwise
        return pointwise(input.contiguous(), packed, bias, "none", [], "")
