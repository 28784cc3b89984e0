"""The forms of a weight that an algorithm runs on: kept for a skip window, or made for each use."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor

from ..packed_weights import PackedWeights
from ..support import Unchanged
from .weight import Weight

__all__ = ["Copies", "Form", "packed_nbytes"]

ops = torch.ops.wus


class Form(NamedTuple):
    """A form of weights, as the operators pack it.

    Attributes:
        name: of the operator, without ``_pack``.
        scheme: of Winograd's forms.
    """

    name: str
    scheme: int | None = None

    @property
    def _rest(self) -> tuple[int, ...]:
        return () if self.scheme is None else (self.scheme,)

    def pack(self, weight: Tensor, dgrad: bool) -> Tensor:
        """The weight for the forward pass or for the data gradient."""
        return getattr(ops, f"{self.name}_pack")(weight, dgrad, *self._rest)

    def pack_(self, packed: Tensor, weight: Tensor, dgrad: bool) -> Tensor:
        """The same in the place of what was packed before."""
        return getattr(ops, f"{self.name}_pack_")(packed, weight, dgrad, *self._rest)

    def shape(self, weight: Tensor, dgrad: bool) -> torch.Size:
        """Of what is packed, float32."""
        return _shape(self, weight.shape, dgrad)


@cache
def _shape(form: Form, weight: torch.Size, dgrad: bool) -> torch.Size:
    return form.pack(torch.empty(weight, device="meta"), dgrad).shape


def packed_nbytes(weight: Tensor, form: Form) -> int:
    """Bytes of a weight's two packed copies, for the forward pass and the data gradient."""
    return sum(4 * form.shape(weight, dgrad).numel() for dgrad in (False, True))


class Copies(NamedTuple):
    """A weight packed for the forward pass and for the data gradient, to be used at once."""

    forward: Callable[[], Tensor]
    dgrad: Callable[[], Tensor]

    @classmethod
    def kept(
        cls, packed: PackedWeights, form: Form, weight: Weight, backward: bool
    ) -> Copies | None:
        """Made once for as long as the weight stands still, or None over the memory budget."""
        folded = weight.folded is not None
        names: list[Hashable] = [(form, folded, direction) for direction in ("forward", "dgrad")]
        if not packed.fits(weight.layer, names, lambda: packed_nbytes(weight.own, form)):
            return None

        def copy(name: Hashable, dgrad: bool) -> Callable[[], Tensor]:
            made = packed.get(
                weight.layer, name, weight.sources, lambda: form.pack(weight.make(), dgrad)
            )
            return lambda: made

        forward = copy(names[0], False)
        return cls(forward, copy(names[1], True) if backward else forward)

    @classmethod
    def passing(cls, packed: PackedWeights, form: Form, weight: Weight) -> Copies | None:
        """Made for each use, in memory that all layers share, or None over the memory budget."""
        shapes = [form.shape(weight.own, dgrad) for dgrad in (False, True)]
        if not packed.lends(4 * max(shape.numel() for shape in shapes)):
            return None
        unchanged = Unchanged(weight.make())

        def copy(dgrad: bool) -> Tensor:
            return form.pack_(packed.borrow(shapes[dgrad]), unchanged(), dgrad)

        return cls(partial(copy, False), partial(copy, True))
