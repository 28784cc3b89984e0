"""Which algorithm a convolution runs by, and the copies of its weight that it runs on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Protocol

import torch
from torch import Tensor

from ..._build import chains
from ..options import SkipOptions
from ..packed_weights import PackedWeights
from ..support import KERNELS, on_gpu
from .algorithm import Algorithm, Strided
from .copies import Copies, Form
from .depthwise import Depthwise
from .geometry import Geometry, schemes, suits_depthwise, suits_pointwise, suits_strided
from .measure import Call, Contender, Measured
from .pointwise import Pointwise
from .weight import Weight
from .winograd import Winograd

__all__ = ["cast", "choose", "library", "only_library", "pays_for_one_use"]

#: Pixels of an output, over the batch, from which packing a weight for one step pays: for one use
#: with gradients, whose memory is at hand, and for one without.
STEP_ROWS, LONE_ROWS = 128, 2048
#: Elements of a weight up to which its gradient is best made in the same pass as the input's.
SMALL_WEIGHT = 1 << 16


class Library(Protocol):
    """The library's own layer of given numbers, oneDNN's or cuDNN's (``chains.Library``).

    Attributes:
        name: for people.
    """

    name: str

    def takes(self, weight: Tensor, dtype: torch.dtype) -> bool:
        """Whether the weight is as the library wants it for inputs of a type."""

    def cast(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight as the library wants it."""

    def on(self, weight: Tensor) -> Algorithm:
        """The layer on a weight that it takes."""


@lru_cache(maxsize=1024)
def library(geometry: Geometry, gpu: bool, kernels: str) -> Library:
    """The library's own convolution, with our `kernels` around it."""
    g = geometry
    window = g.kernel_size, g.stride, g.padding, g.dilation
    sizes = g.input_size, g.output_size
    return chains.Convolution(*window, g.groups, *sizes, gpu, kernels)


def only_library(geometry: Geometry, algo: str, gpu: bool, dtype: torch.dtype) -> bool:
    """Whether there is nothing to choose from but the library's own convolution."""
    return gpu or (dtype != torch.float32 and not suits_depthwise(geometry, algo))


def choose(
    weight: Weight,
    geometry: Geometry,
    options: SkipOptions,
    packed: PackedWeights,
    measured: Measured,
    images: int,
    backward: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Algorithm:
    """The algorithm for one layer: what `options.algo` asks for, as far as layer and budget allow.

    Args:
        measured: so far, where `options.algo` is ``"measure"``.
        images: in the batch.
        backward: whether a data gradient will be asked for.
        dtype: of the input, to which autocast may have cast it.
    """
    gpu = on_gpu(weight.own)
    own = library(geometry, gpu, KERNELS)
    if dtype != torch.float32 and not gpu and suits_depthwise(geometry, options.algo):
        return Depthwise(geometry, weight.make())
    if only_library(geometry, options.algo, gpu, dtype):
        return own.on(cast(weight, packed, own, dtype))
    contenders = _contenders(weight, geometry, own, options, packed, images, backward)
    if options.algo == "measure":
        trains = weight.trains and torch.is_grad_enabled()
        call = Call(geometry, images, trains, backward)
        return measured.pick(call, contenders, weight, lambda: packed.drop((weight.layer,)))
    return next(made for _, make in contenders if (made := make()) is not None)


def pays_for_one_use(geometry: Geometry, algo: str, images: int) -> bool:
    """Whether a forward pass alone is faster than the library's on a weight packed for it."""
    strided = suits_strided(geometry, algo) and geometry.kernel_size == (3, 3)
    enough = algo != "auto" or _rows(geometry, images) >= LONE_ROWS
    return enough and (strided or bool(schemes(geometry, algo)))


def _rows(geometry: Geometry, images: int) -> int:
    """Pixels of the output."""
    return images * geometry.output_size[0] * geometry.output_size[1]


def _contenders(
    weight: Weight,
    geometry: Geometry,
    library: Library,
    options: SkipOptions,
    packed: PackedWeights,
    images: int,
    backward: bool,
) -> Iterator[Contender]:
    """What suits a layer, best first, the library's own convolution last."""
    auto = options.algo == "auto"
    rows = _rows(geometry, images)
    lone = weight.trains and not torch.is_grad_enabled()
    all_kept = options.memory_budget is None and not weight.trains
    # What is chosen must not depend on how much is kept by now: a resumed run starts with nothing.
    pays = not auto or all_kept or rows >= (LONE_ROWS if lone else STEP_ROWS)

    def packed_for(form: Form, algorithm: Callable[[Copies], Algorithm]) -> Algorithm | None:
        kept = None if weight.trains else Copies.kept(packed, form, weight, backward)
        copies = kept or Copies.passing(packed, form, weight)
        return algorithm(copies) if copies else None

    if pays:
        for scheme in schemes(geometry, options.algo):
            winograd = partial(Winograd, geometry, scheme)
            form = Form("winograd", int(scheme))
            yield Contender(Winograd.title(scheme), partial(packed_for, form, winograd))
        if suits_strided(geometry, options.algo):
            strided = partial(Strided, geometry)
            yield Contender(Strided.name, partial(packed_for, Form("strided"), strided))
        in_one_pass = not weight.trains or (weight.own.numel() <= SMALL_WEIGHT and not lone)
        if suits_pointwise(geometry, options.algo) and (in_one_pass or not auto):
            pointwise = partial(Pointwise, geometry)
            yield Contender(Pointwise.name, partial(packed_for, Form("pointwise"), pointwise))

    def unpacked() -> Tensor:
        if weight.folded is not None and packed.fits(
            weight.layer, ["folded"], lambda: weight.own.nbytes
        ):
            return packed.get(weight.layer, "folded", weight.sources, weight.make)
        return weight.make()

    if suits_depthwise(geometry, options.algo):
        yield Contender(Depthwise.name, lambda: Depthwise(geometry, unpacked()))
    yield Contender(library.name, lambda: library.on(unpacked()))


def cast(weight: Weight, packed: PackedWeights, library: Library, dtype: torch.dtype) -> Tensor:
    """The weight as the library takes it, in a type; a copy is kept in a window."""
    if weight.folded is None and library.takes(weight.own, dtype):
        return weight.own
    name = ("cast", dtype, weight.folded is None)
    return packed.get(
        weight.layer, name, weight.sources, lambda: library.cast(weight.make(), dtype)
    )
