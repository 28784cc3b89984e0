"""Models that can skip: ``convert``, ``revert``.

In a skip step biases train and every other parameter is a constant: no gradient is computed for
it, and nothing is saved for one. Biases can be constants too, and some layers can train in full
while others skip. ``convert`` prepares a model in place, as
``torch.nn.utils.parametrize`` does, by giving its layers and its root subclasses of their own
classes: parameters, buffers, hooks, ``state_dict`` keys and optimizers stay what they were.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from torch import nn
from torch.nn.parameter import is_lazy

from ..distributed.ddp import adopt_wrapper, make_skip_aware, make_stock, set_wrappers
from ..engine.engine import Engine
from ..engine.gradient_memory import release
from ..engine.options import SkipOptions
from ..engine.parameters import skippable_parameters
from ..nn import DROP_INS, NORMS, SkipLayer
from .modules import SkipModel, SkipModule, injected, stock_class
from .windows import (
    check_module,
    clear_state,
    is_script,
    note_windows,
    set_skip,
    unwrap,
    window_of_all,
)

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger("wus_ext")


def convert(
    model: Model,
    *,
    skip_gamma: bool = True,
    norm: str = "batch",
    algo: str | Mapping[str, str] = "auto",
    memory_budget: int | Literal["auto"] | None = "auto",
    fuse: bool = True,
    full: str = "stock",
) -> Model:
    """Makes a model skip-aware, in place; full steps stay stock PyTorch unless asked otherwise.

    ``Conv2d``, ``Linear`` and normalisation layers become the drop-ins of :mod:`wus_ext.nn`
    wherever they appear, also twice; any other layer stays stock and has its weights detached in
    skip steps. Weights at ``requires_grad=False`` stand still in every step that takes gradients,
    full ones too: frozen layers run as in a skip step (see docs/migration.md). May be called before
    or after the optimizer is made, and again after layers were added. What was converted is logged
    (logger ``wus_ext``, level INFO); see :func:`describe`.

    Args:
        model: any module, wrapped in ``DistributedDataParallel`` or not.
        skip_gamma: whether the scale of normalisation layers counts as a weight and is skipped
            (default True) or trains in skip steps as biases do.
        norm: statistics of batch norm in skip steps while training: ``"batch"`` (default, as
            stock; running statistics keep updating) or ``"frozen"`` (running statistics, which
            stand still, at less cost).
        algo: convolutions of the CPU's skip steps in float32: ``"direct"`` (oneDNN), ``"f2"``,
            ``"f4"`` (Winograd, where a layer allows) or ``"auto"`` (default: the fastest for each
            layer by its numbers, the same in every run) or ``"measure"`` (the fastest by trying,
            once for each layer and shape of input). What was measured decides how a run rounds:
            :func:`measured` hands it on, and what it gave is a value here, too. Rounding of
            ``"f2"`` is that of oneDNN, of ``"f4"`` up to 6e-6 relative.
        memory_budget: bytes that the transformed copies of weights may take. Default ``"auto"``:
            as many as a step holds less than stock's, in what is saved for backward and, where
            stock makes them, in gradients of weights; what does not fit is transformed for each
            use, in memory that all layers share, as large as the largest needs. A number: layers
            that do not fit run with a smaller transform or directly. None: no limit, as fast as
            possible.
        fuse: whether chains of layers may run as one (default True). False runs layer by layer.
        full: what runs where weights train: ``"stock"`` (default: stock PyTorch, bit for bit) or
            ``"fused"``: on the CPU in float32 and bfloat16, and on a GPU, the skip step's chains
            and convolutions, in float32 with weight gradients by Winograd; equal to stock's up to
            the rounding of ``algo`` and of the type, without second derivatives. Elsewhere, and
            under ``torch.compile`` or ``torch.func``, full steps stay stock.

    Returns:
        The same object.

    Raises:
        TypeError: if ``model`` is no ``nn.Module`` or is a TorchScript module.
        ValueError: if ``model`` holds a lazy layer that has not seen an input yet, a setting is
            none of the above.

    Warns:
        UserWarning: if there was nothing to convert, or no bias that a skip step could train.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> wus_ext.convert(model) is model
        True
        >>> print(wus_ext.describe(model))
        Sequential: 1 Conv2d; in a skip step 1 weight tensor (216 values) stands still and 1 bias \
tensor (8 values) trains
    """
    check_module(model)
    choices: Mapping[str, str] = {}
    if isinstance(algo, Mapping):
        choices = _checked_choices(algo)
        algo = "measure"
    options = SkipOptions(skip_gamma, norm, algo, memory_budget, fuse, full)
    set_wrappers(model, make_skip_aware)
    root = unwrap(model)
    for name, module in root.named_modules():
        if any(map(is_lazy, (*module._parameters.values(), *module._buffers.values()))):
            raise ValueError(
                f"model: the lazy layer {name!r} has no parameters yet; run one forward pass "
                "before convert"
            )
    joins = window_of_all(root)
    _change_classes(root)
    for module in root.modules():
        if isinstance(module, SkipModule):
            module.skip_gamma = skip_gamma
        if isinstance(module, NORMS) and isinstance(module, SkipLayer):
            module.__dict__["frozen_statistics"] = norm == "frozen"
    if isinstance(root, SkipModel):
        root._skip_engine = Engine(options, choices)
        root._before_step = adopt_wrapper
    if joins is not None:  # layers that were added in a window of all layers join it
        set_skip(root, True, skip_biases=joins)
    else:
        note_windows(root, skippable_parameters(root))
    logger.info("converted %s", describe(root))
    _warn_if_pointless(root)
    return model


def _change_classes(root: nn.Module) -> None:
    """Gives every module its class: of all, or where one cannot have it, of none."""
    new = [(module, _converted_class(module, module is root)) for module in root.modules()]
    before = [(module, type(module)) for module in root.modules()]
    try:
        for module, cls in new:
            module.__class__ = cls
    except TypeError as error:
        rigid = type(module).__name__
        for changed, cls in before:
            if type(changed) is not cls:
                changed.__class__ = cls
        raise TypeError(
            f"model: the class {rigid!r} of one of its modules cannot be given a "
            f"subclass at run time ({error}); nothing was converted"
        ) from error


def _converted_class(module: nn.Module, is_root: bool) -> type:
    cls = type(module)
    stock = stock_class(cls)
    if stock in DROP_INS:
        return DROP_INS[stock]
    if is_script(module):
        return cls
    if is_root and not isinstance(module, SkipModel):
        return injected(SkipModel, stock)
    if isinstance(module, SkipLayer):
        return cls
    has_code = cls.__module__.partition(".")[0] != "torch" or module._forward_hooks
    return injected(SkipModule, stock) if module._parameters or has_code else cls


def revert(model: Model) -> Model:
    """Undoes :func:`convert`, in place: every layer is stock PyTorch's again.

    Layers built from :mod:`wus_ext.nn` become their stock classes too. Parameters, buffers, hooks
    and optimizers stay what they are.

    Args:
        model: any module, converted or not.

    Returns:
        The same object.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.

    Example:
        >>> model = wus_ext.revert(wus_ext.convert(torch.nn.Linear(3, 2)))
        >>> type(model) is torch.nn.Linear
        True
    """
    check_module(model)
    for owner in skippable_parameters(model):
        clear_state(owner)
        release(owner)
    for module in model.modules():
        if isinstance(module, SkipLayer):
            clear_state(module)
            for name in ("skip_gamma", "frozen_statistics", "_skip_engine", "_before_step"):
                module.__dict__.pop(name, None)
            module.__class__ = stock_class(type(module))
    set_wrappers(model, make_stock)
    return model


def packed_bytes(model: nn.Module) -> int:
    """Bytes that transformed copies of the weights of a converted model take right now.

    They are made in the first skip step of a window and dropped when it ends. What is transformed
    for one use lies in memory that all layers share, which counts.

    Args:
        model: any module, wrapped or not.

    Returns:
        Bytes; 0 for a model that is not converted.

    Example:
        >>> wus_ext.packed_bytes(wus_ext.convert(torch.nn.Linear(3, 2)))
        0
    """
    return sum(
        module._skip_engine.packed.nbytes()
        for module in model.modules()
        if isinstance(module, SkipModel) and module._skip_engine is not None
    )


def measured(model: nn.Module) -> dict[str, str]:
    """What ``algo="measure"`` has found so far: the fastest algorithm for each kind of call.

    Plain text, fit for JSON. A model that is converted with it computes like this one, to the bit
    where shapes and the number of threads are the same; what it does not name is measured.

    Args:
        model: any module, wrapped or not.

    Returns:
        Names of algorithms by layer and shape; empty for a model that is not converted, was
        converted with another ``algo``, or has run no fused step yet.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU())
        >>> model = wus_ext.convert(model, algo="measure")
        >>> with wus_ext.skip_weight_updates(model):
        ...     model(torch.randn(2, 8, 9, 9)).sum().backward()
        >>> choices = wus_ext.measured(model)
        >>> list(choices)[0]
        '2 x 8 x 9 x 9, to 8, groups 1, kernel 3x3, stride 1x1, padding 0x0, dilation 1x1'
        >>> wus_ext.measured(wus_ext.convert(model, algo=choices)) == choices
        True
    """
    return {
        call: name
        for module in model.modules()
        if isinstance(module, SkipModel) and module._skip_engine is not None
        for call, name in module._skip_engine.measured.names.items()
    }


def _checked_choices(choices: Mapping[str, str]) -> Mapping[str, str]:
    for call, name in choices.items():
        if not isinstance(call, str) or not isinstance(name, str):
            raise ValueError(
                "algo: expected what wus_ext.measured gives, names of algorithms by calls, "
                f"got {call!r}: {name!r}"
            )
    return choices


def describe(model: nn.Module) -> str:
    """What a skip step of ``model`` trains and what stands still, in one line.

    Args:
        model: any module, converted or not, wrapped or not.

    Returns:
        A sentence that counts layers, tensors and values.

    Raises:
        TypeError: if ``model`` is no ``nn.Module`` or is a TorchScript module.

    Example:
        >>> print(wus_ext.describe(wus_ext.convert(torch.nn.Linear(3, 2))))
        Linear: 1 Linear; in a skip step 1 weight tensor (6 values) stands still and 1 bias tensor \
(2 values) trains
    """
    check_module(model)
    root = unwrap(model)
    kinds = Counter(
        stock_class(type(module)).__name__
        for module in root.modules()
        if isinstance(module, SkipLayer) and not isinstance(module, SkipModule)
    )
    layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no drop-in layer"
    skipped = _weights(root)
    trained = [p for p in root.parameters() if p.requires_grad and id(p) not in skipped]
    frozen = [p for p in skipped.values() if not p.requires_grad]
    always = f"; {_count(frozen, 'weight')} of them in every step" if frozen else ""
    return (
        f"{stock_class(type(root)).__name__}: {layers}; in a skip step "
        f"{_count(skipped.values(), 'weight')} {'stands' if len(skipped) == 1 else 'stand'} still "
        f"and {_count(trained, 'bias')} {'trains' if len(trained) == 1 else 'train'}{always}"
    )


def _count(parameters: Any, kind: str) -> str:
    parameters = list(parameters)
    values = sum(parameter.numel() for parameter in parameters)
    return f"{len(parameters)} {kind} tensor{'s' * (len(parameters) != 1)} ({values} values)"


def _weights(root: nn.Module) -> dict[int, nn.Parameter]:
    """Every parameter that counts as a weight, by id."""
    return {
        id(parameter): parameter
        for owner, own in skippable_parameters(root).items()
        for name, is_weight in own.items()
        if is_weight and (parameter := owner._parameters[name]) is not None
    }


def _warn_if_pointless(root: nn.Module) -> None:
    skipped = _weights(root)
    trained = {id(p) for p in root.parameters() if p.requires_grad}
    if not skipped:
        warnings.warn(
            f"convert: {type(root).__name__} has no weight to skip; nothing was converted",
            stacklevel=3,
        )
    elif trained and trained <= skipped.keys():
        warnings.warn(
            f"convert: {stock_class(type(root)).__name__} has no bias: a skip step trains nothing",
            stacklevel=3,
        )
