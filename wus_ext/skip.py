"""Which steps are skip steps: ``convert``, ``revert``, ``set_skip``, ``skip_weight_updates``.

In a skip step biases train and every other parameter is a constant: no gradient is computed for
it, and nothing is saved for one. ``convert`` prepares a model in place, as
``torch.nn.utils.parametrize`` does, by giving its layers and its root subclasses of their own
classes: parameters, buffers, hooks, ``state_dict`` keys and optimizers stay what they were.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import nn

from . import processes
from .distributed import check_parameters, make_skip_aware, make_stock
from .injection import (
    NORMS,
    SkipModel,
    SkipModule,
    injected,
    is_parametrized_bias,
    stock_class,
    weights,
)
from .nn import DROP_INS, SkipLayer, is_bias
from .options import SkipOptions
from .program import ProgramCache

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger("wus_ext")

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def convert(
    model: Model,
    *,
    skip_gamma: bool = True,
    norm: str = "batch",
    algo: str = "auto",
    memory_budget: int | None = None,
    fuse: bool = True,
) -> Model:
    """Makes a model skip-aware, in place; full steps stay stock PyTorch, bit for bit.

    ``Conv2d``, ``Linear`` and normalisation layers become the drop-ins of :mod:`wus_ext.nn`
    wherever they appear, also twice; any other layer stays stock and has its weights detached in
    skip steps. May be called before or after the optimizer is made, and again after layers were
    added. What was converted is logged (logger ``wus_ext``, level INFO); see :func:`describe`.

    Args:
        model: any module, wrapped in ``DistributedDataParallel`` or not.
        skip_gamma: whether the scale of normalisation layers counts as a weight and is skipped
            (default True) or trains in skip steps as biases do.
        norm: statistics of batch norm in skip steps while training: ``"batch"`` (default, as
            stock; running statistics keep updating) or ``"frozen"`` (running statistics, which
            stand still, at less cost).
        algo: convolutions of the CPU's skip steps in float32: ``"direct"`` (oneDNN), ``"f2"``,
            ``"f4"`` (Winograd, where a layer allows) or ``"auto"`` (default: the fastest for each
            layer). Rounding of ``"f2"`` is that of oneDNN, of ``"f4"`` up to 6e-6 relative.
        memory_budget: bytes that the transformed copies of weights may take during a skip window;
            layers that do not fit run with a smaller transform or directly. Default None: no limit.
        fuse: whether chains of layers may run as one in skip steps (default True). Set it to False
            for a model whose ``forward`` depends on Python state other than ``training``.

    Returns:
        The same object.

    Raises:
        TypeError: if ``model`` is no ``nn.Module`` or is a TorchScript module.
        ValueError: if ``model`` holds a lazy layer that has not seen an input yet, or a setting is
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
    _check_module(model)
    options = SkipOptions(skip_gamma, norm, algo, memory_budget, fuse)
    _set_wrappers(model, make_skip_aware)
    root = _unwrap(model)
    for name, module in root.named_modules():
        if (
            isinstance(module, nn.modules.lazy.LazyModuleMixin)
            and module.has_uninitialized_params()
        ):
            raise ValueError(
                f"model: the lazy layer {name!r} has no parameters yet; run one forward pass "
                "before convert"
            )
    skipping = isinstance(root, SkipLayer) and root.skip_wgrad
    for path, module in root.named_modules():
        _convert_one(module, path, skip_gamma)
    inner = isinstance(root, SkipModule) and not isinstance(root, SkipModel)
    if inner or not isinstance(root, SkipLayer):
        root.__class__ = injected(SkipModel, stock_class(type(root)))
    for module in root.modules():
        if isinstance(module, SkipModule):
            module.skip_gamma = skip_gamma
        if isinstance(module, NORMS) and isinstance(module, SkipLayer):
            module.frozen_statistics = norm == "frozen"
    if isinstance(root, SkipModel):
        root._skip_programs = ProgramCache(options)
    if skipping:  # layers that were added in a skip window join it
        set_skip(root, True)
    logger.info("converted %s", describe(root))
    _warn_if_pointless(root)
    return model


def _convert_one(module: nn.Module, path: str, skip_gamma: bool) -> None:
    stock = stock_class(type(module))
    if isinstance(module, NORMS) and not skip_gamma:
        _set_flag(module, False)
        module.__class__ = stock
    elif stock in DROP_INS:
        module.__class__ = DROP_INS[stock]
    elif not isinstance(module, SkipLayer) and _runs_on_weights(module, path):
        module.__class__ = injected(SkipModule, stock)


def _runs_on_weights(module: nn.Module, path: str) -> bool:
    """Whether a call of `module` itself, not of the root, must detach weights of its own."""
    return (
        not _is_script(module)
        and type(module).forward is not nn.Module.forward  # a ParameterList has none
        and not is_parametrized_bias(path)
        and any(not is_bias(name) for name in module._parameters)
    )


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
    _check_module(model)
    for module in model.modules():
        if isinstance(module, SkipLayer):
            _set_flag(module, False)
            for name in ("skip_gamma", "frozen_statistics", "_skip_programs"):
                module.__dict__.pop(name, None)
            module.__class__ = stock_class(type(module))
    _set_wrappers(model, make_stock)
    return model


def set_skip(model: nn.Module, skip: bool) -> None:
    """Makes every following forward pass a skip step, or a full step again.

    The decision is read in the forward pass, and backward follows what forward decided. Entering
    a skip window sets the gradients of the skipped parameters to None, so that an optimizer
    leaves them alone.

    Args:
        model: a converted model, or a wrapper of one (``DistributedDataParallel``, the result of
            ``torch.compile``), or one built from :mod:`wus_ext.nn`.
        skip: True for skip steps, False for full steps.

    Warns:
        UserWarning: in several processes, for a model whose wrapper would not notice.

    Raises:
        TypeError: if ``model`` is no ``nn.Module`` or ``skip`` is no bool.
        ValueError: if ``model`` has no layer that can skip, or is wrapped in the older
            ``FullyShardedDataParallel`` (use ``fully_shard``).

    Example:
        >>> model = wus_ext.convert(torch.nn.Linear(3, 2))
        >>> wus_ext.set_skip(model, True)
        >>> wus_ext.is_skipping(model)
        True
    """
    if not isinstance(skip, bool):
        raise TypeError(f"skip: expected a bool, got {type(skip).__name__}")
    layers = _skip_layers(model)
    if skip:
        check_parameters(model)
        _set_wrappers(model, make_skip_aware)
        _warn_if_unseen(model, layers)
    if skip and not all(layer.skip_wgrad for layer in layers):
        for parameter in _skipped_parameters(model):
            parameter.grad = None
    for layer in layers:
        _set_flag(layer, skip)
        if isinstance(layer, SkipModel) and layer._skip_programs is not None and not skip:
            layer._skip_programs.end_window()


def _set_flag(layer: nn.Module, skip: bool) -> None:
    # Off is the class's own value: what torch.compile traced before the first window still fits.
    layer.__dict__.pop("skip_wgrad", None)
    if getattr(layer, "skip_wgrad", False) != skip:
        layer.skip_wgrad = skip


def is_skipping(model: nn.Module) -> bool:
    """Whether the next forward pass of ``model`` is a skip step.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.
        ValueError: if ``model`` has no layer that can skip.
    """
    return any(layer.skip_wgrad for layer in _skip_layers(model))


@contextmanager
def skip_weight_updates(model: Model) -> Iterator[Model]:
    """Forward and backward inside are a skip step; afterwards the model is as it was before.

    Args:
        model: as for :func:`set_skip`.

    Raises:
        TypeError, ValueError: as :func:`set_skip`.

    Example:
        >>> model = wus_ext.convert(torch.nn.Linear(3, 2))
        >>> with wus_ext.skip_weight_updates(model):
        ...     model(torch.randn(4, 3)).mean().backward()
        >>> model.weight.grad is None, model.bias.grad is None
        (True, False)
    """
    before = [(layer, layer.skip_wgrad) for layer in _skip_layers(model)]
    set_skip(model, True)
    try:
        yield model
    finally:
        for layer, skip in before:
            _set_flag(layer, skip)


def packed_bytes(model: nn.Module) -> int:
    """Bytes that transformed copies of the weights of a converted model take right now.

    They are made in the first skip step of a window and dropped when it ends.
    """
    return sum(
        module._skip_programs.packed.nbytes()
        for module in model.modules()
        if isinstance(module, SkipModel) and module._skip_programs is not None
    )


def describe(model: nn.Module) -> str:
    """What a skip step of ``model`` trains and what stands still, in one line."""
    _check_module(model)
    root = _unwrap(model)
    kinds = Counter(
        stock_class(type(module)).__name__
        for module in root.modules()
        if isinstance(module, SkipLayer) and not isinstance(module, SkipModule)
    )
    layers = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "no drop-in layer"
    skipped = {id(parameter): parameter for parameter in _skipped_parameters(root)}
    trained = [p for p in root.parameters() if p.requires_grad and id(p) not in skipped]
    return (
        f"{stock_class(type(root)).__name__}: {layers}; in a skip step "
        f"{_count(skipped.values(), 'weight')} {'stands' if len(skipped) == 1 else 'stand'} still "
        f"and {_count(trained, 'bias')} {'trains' if len(trained) == 1 else 'train'}"
    )


def _count(parameters: Any, kind: str) -> str:
    parameters = list(parameters)
    values = sum(parameter.numel() for parameter in parameters)
    return f"{len(parameters)} {kind} tensor{'s' * (len(parameters) != 1)} ({values} values)"


def _check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if _is_script(model):
        raise TypeError("model: a TorchScript module cannot be converted; convert it before jit")


def _is_script(module: nn.Module) -> bool:
    # By name: to import torch.jit's classes warns.
    return type(module).__module__.startswith("torch.jit")


def _unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def _set_wrappers(model: nn.Module, change: Callable[[Any], None]) -> None:
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            change(module)


def _warn_if_unseen(model: nn.Module, layers: list[SkipLayer]) -> None:
    wrapped = any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules())
    sharded = any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    converted = any(isinstance(layer, SkipModel) for layer in layers)
    if processes.count() > 1 and not (wrapped or sharded or converted):
        warnings.warn(
            "set_skip: in several processes switch the DistributedDataParallel wrapper, which "
            f"cannot notice that the {type(model).__name__} inside skips, or convert the model",
            stacklevel=3,
        )


def _skip_layers(model: nn.Module) -> list[SkipLayer]:
    _check_module(model)
    layers = [module for module in model.modules() if isinstance(module, SkipLayer)]
    if not layers:
        raise ValueError(
            f"model: {type(model).__name__} has no layer that can skip; "
            "call wus_ext.convert(model) first"
        )
    return layers


def _skipped_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every parameter that gets no gradient in a skip step of ``model``."""
    for module in model.modules():
        if isinstance(module, SkipLayer):
            yield from module.skipped_parameters()
        if isinstance(module, SkipModule):
            for owner, name in weights(module):
                yield owner._parameters[name]


def _warn_if_pointless(root: nn.Module) -> None:
    skipped = {id(parameter) for parameter in _skipped_parameters(root)}
    if not skipped:
        warnings.warn(
            f"convert: {type(root).__name__} has no weight to skip; nothing was converted",
            stacklevel=3,
        )
    elif not any(p.requires_grad and id(p) not in skipped for p in root.parameters()):
        warnings.warn(
            f"convert: {stock_class(type(root)).__name__} has no bias: a skip step trains nothing",
            stacklevel=3,
        )
