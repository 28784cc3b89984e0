"""Which algorithm a convolution runs by, and the copies of its weight that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..options import SkipOptions
from ..packed_weights import PackedWeights
from ..support import on_gpu
from .algorithm import Algorithm, Direct, OnGpu, Strided
from .depthwise import Depthwise
from .geometry import Geometry, schemes, suits_depthwise, suits_pointwise, suits_strided
from .pointwise import Pointwise
from .winograd import Winograd

__all__ = ["Weight", "choose", "packed_nbytes"]

ops = torch.ops.wus


class Weight(NamedTuple):
    """A layer's weight, or one with a frozen normalisation folded in.

    Attributes:
        layer: whose it is.
        own: the layer's, detached.
        sources: what it is made from; when one changes, so does what is made of it.
        folded: makes it; None: it is the layer's own.
    """

    layer: nn.Module
    own: Tensor
    sources: tuple[Tensor, ...]
    folded: Callable[[], Tensor] | None = None

    def __call__(self) -> Tensor:
        return self.own if self.folded is None else self.folded()


def choose(
    weight: Weight,
    geometry: Geometry,
    options: SkipOptions,
    packed: PackedWeights,
    backward: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Algorithm:
    """The algorithm for one layer: what `options.algo` asks for, as far as layer and budget allow.

    Args:
        dtype: of the input, to which autocast may have cast it.
        backward: whether a data gradient will be asked for.
    """
    if on_gpu(weight.own):
        return OnGpu(geometry, _cast(weight, packed, dtype))
    for scheme in schemes(geometry, options.algo):
        pack = partial(ops.winograd_pack, scheme=int(scheme))
        again = partial(ops.winograd_pack_, scheme=int(scheme))
        if copies := _packed(packed, scheme, weight, pack, backward, again):
            return Winograd(geometry, scheme, *copies)
    if suits_strided(geometry, options.algo) and (
        copies := _packed(packed, "strided", weight, ops.strided_pack, backward)
    ):
        return Strided(geometry, *copies)
    if suits_pointwise(geometry, options.algo):
        pack, again = ops.pointwise_pack, ops.pointwise_pack_
        if copies := _packed(packed, "pointwise", weight, pack, backward, again):
            return Pointwise(geometry, *copies)
    kind = Depthwise if suits_depthwise(geometry, options.algo) else Direct
    if weight.folded is None:
        return kind(geometry, weight.own)
    if packed.fits(weight.layer, ["folded"], lambda: weight.own.nbytes):
        return kind(geometry, packed.get(weight.layer, "folded", weight.sources, weight))
    return kind(geometry, weight())


def _cast(weight: Weight, packed: PackedWeights, dtype: torch.dtype) -> Tensor:
    """The weight as cuDNN wants it: of the input's type, channels_last."""
    own, layout = weight.own, torch.channels_last
    if weight.folded is None and own.dtype == dtype and own.is_contiguous(memory_format=layout):
        return own
    name = ("cast", dtype, weight.folded is None)
    return packed.get(
        weight.layer,
        name,
        weight.sources,
        lambda: weight().to(dtype).contiguous(memory_format=layout),
    )


def _packed(
    packed: PackedWeights,
    scheme: Hashable,
    weight: Weight,
    pack: Callable[..., Tensor],
    backward: bool,
    again: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """A weight packed for the forward pass and the data gradient, or None over the budget.

    `again` packs it where it was packed before, unless a normalisation is folded in.
    """
    folded = weight.folded is not None
    names = [(scheme, folded, direction) for direction in ("forward", "dgrad")]
    if not packed.fits(weight.layer, names, lambda: packed_nbytes(weight.own, pack)):
        return None

    def copy(name: Hashable, dgrad: bool) -> Tensor:
        return packed.get(
            weight.layer,
            name,
            weight.sources,
            lambda: pack(weight(), dgrad),
            (lambda old: again(old, weight(), dgrad)) if again and not folded else None,
        )

    return copy(names[0], False), copy(names[1], True) if backward else None


def packed_nbytes(weight: Tensor, pack: Callable[..., Tensor]) -> int:
    """Bytes of a weight's two packed copies, for the forward pass and the data gradient."""
    shape_only = torch.empty_like(weight, device="meta")
    return sum(pack(shape_only, dgrad).nbytes for dgrad in (False, True))
