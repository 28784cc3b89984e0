"""How a converted model's steps run: the settings of :func:`wus_ext.convert`."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from .._build import build_info

NORMS = ("batch", "frozen")
ALGORITHMS = ("auto", "measure", "direct", "f2", "f4")
FULL = ("stock", "fused")
#: Each with the entry of build_info() that says whether this build has it.
EPILOGUES = {"plain": None, "cublaslt": "cuda", "cudnn": "cudnn_frontend"}


@dataclass(frozen=True)
class SkipOptions:
    """Settings of a converted model's steps.

    Args:
        skip_gamma: the scale of normalisation layers counts as a weight (default True).
        norm: statistics that batch norm uses in skip steps while training: ``"batch"`` (default,
            as stock, running statistics keep updating) or ``"frozen"`` (running statistics, which
            stand still; the layer folds into its convolution and saves nothing).
        algo: convolution algorithm of the CPU's skip steps in float32: ``"direct"`` (oneDNN),
            ``"f2"`` and ``"f4"`` (Winograd F(2x2, 3x3) and F(4x4, 3x3), where a layer allows),
            ``"auto"`` (default: the fastest for each layer by its numbers, the same in every run),
            ``"measure"`` (the fastest by trying, once for each layer and shape; what was chosen
            decides how the run rounds, and :func:`wus_ext.measured` hands it on to the next run).
        memory_budget: bytes that transformed copies of weights may take together. Default
            ``"auto"``: as many as a skip step holds less than stock's full step does, in gradients
            and in what is saved for backward; what does not fit is transformed for each use.
            A number: layers that do not fit run with a smaller transform or directly. None: no
            limit, as fast as possible.
        fuse: whether chains of layers may run as one (default True).
        epilogues: what may mask a layer's data gradient for the ReLU of the layer below and sum it
            for that layer's bias, where one layer feeds another. ``"cublaslt"``: linear layers on a
            GPU, where cuBLASLt has such products; under autocast it rounds bias gradients to
            autocast's type, as stock does, and its ReLU may turn NaN into 0, which stock's does
            not. ``"cudnn"``: convolutions of stride 1 on a GPU, with channels in eights; each shape
            is tried in its first backward pass and taken where it is right and faster, so that runs
            may differ in rounding; not used where cuDNN is off or must be deterministic.
            ``"plain"``: the same order of work with the kernels that are used anyway, results bit
            for bit the same. Default: none; on an H200 they gained little.
        full: what runs where weights train: ``"stock"`` (default: stock PyTorch, bit for bit) or
            ``"fused"``, on the CPU in float32 and on a GPU: the same chains and convolutions as in
            skip steps, on the CPU with weight gradients by Winograd as well; equal to stock's up to
            rounding.

    Raises:
        ValueError: for a value that is none of these, or an epilogue that this build does not have;
            the message names the setting.
    """

    skip_gamma: bool = True
    norm: str = "batch"
    algo: str = "auto"
    memory_budget: int | Literal["auto"] | None = "auto"
    fuse: bool = True
    epilogues: Collection[str] = ()
    full: str = "stock"

    def __post_init__(self) -> None:
        for name, allowed in (("norm", NORMS), ("algo", ALGORITHMS), ("full", FULL)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
        for name in ("skip_gamma", "fuse"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name}: expected True or False, got {value!r}")
        object.__setattr__(self, "epilogues", _checked_epilogues(self.epilogues))
        if self.norm == "frozen" and not self.skip_gamma:
            raise ValueError(
                "norm='frozen' needs skip_gamma=True: a layer that trains is not frozen"
            )
        if self.full == "fused" and not self.fuse:
            raise ValueError("full='fused' needs fuse=True: full steps run the fused chains")
        budget = self.memory_budget
        if budget not in (None, "auto") and (not isinstance(budget, int) or budget < 0):
            raise ValueError(
                "memory_budget: expected a number of bytes from 0 up, 'auto', or None, "
                f"got {budget!r}"
            )


def _checked_epilogues(names: Collection[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Collection):
        raise ValueError(
            f"epilogues: expected a collection of names out of {', '.join(EPILOGUES)}, "
            f"got {names!r}"
        )
    for name in names:
        if name not in EPILOGUES:
            raise ValueError(f"epilogues: {name!r} is not one of {', '.join(EPILOGUES)}")
        needed = EPILOGUES[name]
        if needed is not None and build_info()[needed] is None:
            raise ValueError(
                f"epilogues: {name!r} is not part of this build of wus_ext: "
                f"wus_ext.build_info()[{needed!r}] is None"
            )
    return tuple(name for name in EPILOGUES if name in names)
