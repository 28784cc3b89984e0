"""Which algorithm a convolution runs by, and the copies of its weight that it runs on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..options import SkipOptions
from ..packed_weights import PackedWeights
from ..support import on_gpu
from .algorithm import Algorithm, Direct, OnGpu, Strided
from .geometry import Geometry, schemes, suits_strided
from .winograd import Winograd

__all__ = ["choose", "packed_nbytes"]

ops = torch.ops.wus


def choose(
    conv: nn.Conv2d,
    geometry: Geometry,
    weight: Callable[[], Tensor],
    sources: tuple[Tensor, ...],
    options: SkipOptions,
    packed: PackedWeights,
    backward: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Algorithm:
    """The algorithm for one layer: what `options.algo` asks for, as far as layer and budget allow.

    Args:
        dtype: of the input, to which autocast may have cast it.
        weight: gives the weight, or one with a frozen normalisation folded in.
        sources: the tensors that `weight` was made from; when one changes, so does the copy.
        backward: whether a data gradient will be asked for.
    """
    if on_gpu(conv.weight):
        return OnGpu(geometry, _cast(conv, weight, sources, packed, dtype))
    for scheme in schemes(conv, geometry, options.algo):
        pack = partial(ops.winograd_pack, scheme=int(scheme))
        again = partial(ops.winograd_pack_, scheme=int(scheme))
        key = (conv, scheme)
        if copies := _packed(packed, key, conv.weight, weight, sources, pack, backward, again):
            return Winograd(conv, geometry, scheme, *copies)
    if suits_strided(conv, geometry, options.algo):
        pack = ops.strided_pack
        if copies := _packed(packed, (conv, None), conv.weight, weight, sources, pack, backward):
            return Strided(conv, geometry, *copies)
    if sources == (conv.weight,):
        return Direct(geometry, conv.weight.detach())
    key = (conv, "folded")
    if packed.fits([key], lambda: conv.weight.nbytes):
        return Direct(geometry, packed.get(key, sources, weight))
    return Direct(geometry, weight())


def _cast(
    conv: nn.Conv2d,
    weight: Callable[[], Tensor],
    sources: tuple[Tensor, ...],
    packed: PackedWeights,
    dtype: torch.dtype,
) -> Tensor:
    """The weight as cuDNN wants it: of the input's type, channels_last."""
    own = conv.weight.detach()
    layout = torch.channels_last
    if sources == (conv.weight,) and own.dtype == dtype and own.is_contiguous(memory_format=layout):
        return own
    key = (conv, "cast", dtype, len(sources))
    return packed.get(key, sources, lambda: weight().to(dtype).contiguous(memory_format=layout))


def _packed(
    packed: PackedWeights,
    key: tuple,
    shaped: Tensor,
    weight: Callable[[], Tensor],
    sources: tuple[Tensor, ...],
    pack: Callable[..., Tensor],
    backward: bool,
    again: Callable[..., Tensor] | None = None,
) -> tuple[Tensor, Tensor | None] | None:
    """A weight packed for the forward pass and the data gradient, or None over the budget.

    `again` packs it where it was packed before, unless a normalisation is folded in.
    """
    keys = [(*key, len(sources), direction) for direction in ("forward", "dgrad")]
    if not packed.fits(keys, lambda: packed_nbytes(shaped, pack)):
        return None

    in_place = again is not None and len(sources) == 1

    def copy(key: tuple, dgrad: bool) -> Tensor:
        return packed.get(
            key,
            sources,
            lambda: pack(weight(), dgrad),
            (lambda old: again(old, weight(), dgrad)) if in_place else None,
        )

    return copy(keys[0], False), copy(keys[1], True) if backward else None


def packed_nbytes(weight: Tensor, pack: Callable[..., Tensor]) -> int:
    """Bytes of a weight's two packed copies, for the forward pass and the data gradient."""
    shape_only = torch.empty_like(weight, device="meta")
    return sum(pack(shape_only, dgrad).nbytes for dgrad in (False, True))
