"""Which steps are skip steps, and which layers skip in them: ``set_skip``, ``skip_weight_updates``.

The state is one flag a layer, read in each forward pass; a module that runs the layers inside it
knows whether any of them skips.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

from torch import nn

from ..distributed.ddp import check_parameters, make_skip_aware, set_wrappers, warn_if_unseen
from ..engine.gradient_memory import release
from ..engine.parameters import Skippable, skippable_parameters, skipped_now
from ..nn import SkipLayer
from .modules import SkipModel, SkipModule, adopt_watched
from .selection import Layers, select

Model = TypeVar("Model", bound=nn.Module)

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
STATE = ("skip_wgrad", "skip_biases", "skip_window")

#: Models whose user knows that a window drops gradients.
_told: WeakSet[nn.Module] = WeakSet()


def set_skip(
    model: nn.Module, skip: bool, *, layers: Layers | None = None, skip_biases: bool = False
) -> None:
    """Makes every following forward pass a skip step, or a full step again.

    The decision is read in the forward pass, and backward follows what forward decided. Entering
    a skip window sets the gradients of the parameters that now stand still to None, so that an
    optimizer leaves them alone, and warns the first time that one was there. Where nothing trains
    at all, with ``skip_biases=True`` for every layer, all gradients stay what they are: input
    gradients may be taken while those of parameters accumulate.

    Args:
        model: a converted model, or a wrapper of one (``DistributedDataParallel``, the result of
            ``torch.compile``), or one built from :mod:`wus_ext.nn`.
        skip: True for skip steps, False for full steps.
        layers: the layers to change, all others staying what they are: a pattern of names as in
            ``model.named_modules()`` (``fnmatch``; a name means everything inside it too), an
            iterable of patterns (none: no layer), or a predicate ``(name, module) -> bool``.
            Layers that do not skip train as in stock PyTorch. Default None: every layer. A weight
            that several layers share gets its gradient from those that train.
        skip_biases: biases and whatever else trains in a skip step are constants too, and only
            gradients with respect to inputs are left. The last call for a layer decides. Default
            False.

    Warns:
        UserWarning: in several processes, for a model whose wrapper would not notice; once for a
            model, naming them, if gradients were dropped.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``, ``skip`` or ``skip_biases`` no bool, ``layers``
            none of the above.
        ValueError: if ``model`` has no layer that can skip or is wrapped in the older
            ``FullyShardedDataParallel`` (use ``fully_shard``), ``layers`` means none, or
            ``skip_biases`` comes without ``skip``.

    Example:
        >>> layers = torch.nn.Linear(3, 3), torch.nn.Linear(3, 2)
        >>> model = wus_ext.convert(torch.nn.Sequential(*layers))
        >>> wus_ext.set_skip(model, True, layers="0", skip_biases=True)
        >>> model(torch.randn(4, 3)).mean().backward()
        >>> [name for name, p in model.named_parameters() if p.grad is not None]
        ['1.weight', '1.bias']
        >>> wus_ext.set_skip(model, False)
    """
    for name, value in (("skip", skip), ("skip_biases", skip_biases)):
        if not isinstance(value, bool):
            raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
    if skip_biases and not skip:
        raise ValueError("skip_biases: needs skip=True; set_skip(model, False) trains biases again")
    _check_skips(model)
    if skip:
        check_parameters(model)
        set_wrappers(model, make_skip_aware)
        warn_if_unseen(model)
    root = unwrap(model)
    if skip and isinstance(root, SkipModule):
        adopt_watched(root)
    skippable = _skippable(root)
    chosen = set(skippable) if layers is None else select(root, layers, skippable)
    before = _without_gradients(root)
    for owner in chosen:
        on = skip and (skip_biases or _freezes(owner) or any(skippable[owner].values()))
        _set_flag(owner, "skip_wgrad", on)
        _set_flag(owner, "skip_biases", on and skip_biases)
    after = _without_gradients(root)
    _drop_gradients(root, after - before)
    for owner in chosen:
        if after and getattr(owner, "skip_wgrad", False):
            release(owner)
    note_windows(root, skippable)
    for module in root.modules():
        if isinstance(module, SkipModel) and module._skip_engine is not None and not skip:
            module._skip_engine.end_window(chosen)


def _skippable(root: nn.Module) -> Skippable:
    """Layers that can skip: those with parameters, and those with statistics alone."""
    return {module: {} for module in root.modules() if _freezes(module)} | skippable_parameters(
        root
    )


def _freezes(layer: nn.Module) -> bool:
    """Whether a window stops the running statistics of a layer."""
    return isinstance(layer, nn.modules.batchnorm._BatchNorm) and getattr(
        layer, "frozen_statistics", False
    )


def _without_gradients(root: nn.Module) -> set[int]:
    """The parameters, by id, that an optimizer is to leave alone in a window.

    None where only input gradients are asked for: there is nothing for an optimizer to do then,
    and gradients that are there belong to another step.
    """
    still = skipped_now(root)
    layers = skippable_parameters(root)
    inputs_only = all(getattr(layer, "skip_biases", False) for layer in layers) and all(
        id(parameter) in still or not parameter.requires_grad for parameter in root.parameters()
    )
    return set() if inputs_only else set(still)


def _drop_gradients(root: nn.Module, keys: set[int]) -> None:
    dropped = []
    for name, parameter in root.named_parameters():
        if id(parameter) in keys and parameter.grad is not None:
            parameter.grad = None
            dropped.append(name)
    if dropped and root not in _told:
        _told.add(root)
        others = f" and {len(dropped) - 3} others" if len(dropped) > 3 else ""
        warnings.warn(
            f"a skip window drops the gradients of {', '.join(dropped[:3])}{others}, which stand "
            "still now and which an optimizer would still move; if they were to be used, step "
            "before the window opens (said once for this model)",
            stacklevel=3,
        )


def note_windows(root: nn.Module, skippable: Skippable) -> None:
    """Tells each module that runs the layers inside which of them skip."""
    for module in root.modules():
        if isinstance(module, SkipModule):
            inside = [part for part in module.modules() if part in skippable]
            some = any(getattr(part, "skip_wgrad", False) for part in inside)
            whole = all(
                getattr(part, "skip_wgrad", False)
                for part in inside
                if any(skippable[part].values())
            )
            _set_flag(module, "skip_window", ("all" if whole else "some") if some else None)
            _set_flag(module, "holds_script", any(map(is_script, module.modules())))


def window_of_all(root: nn.Module) -> bool | None:
    """Whether a window of all layers skips biases too; None outside of one."""
    if not isinstance(root, SkipModule) or root.skip_window != "all":
        return None
    skipping = [o for o in skippable_parameters(root) if getattr(o, "skip_wgrad", False)]
    return all(getattr(owner, "skip_biases", False) for owner in skipping)


def trains_nothing(model: nn.Module) -> bool:
    """Whether no parameter of ``model`` trains in the next step."""
    root = unwrap(model)
    still = skipped_now(root)
    return not any(p.requires_grad and id(p) not in still for p in root.parameters())


def _set_flag(layer: nn.Module, name: str, value: bool | str | None) -> None:
    # Off is the class's own value: what torch.compile traced before the first window still fits.
    layer.__dict__.pop(name, None)
    if value or getattr(layer, name, value):
        layer.__dict__[name] = value


def clear_state(layer: nn.Module) -> None:
    for name in STATE:
        layer.__dict__.pop(name, None)


def is_skipping(model: nn.Module) -> bool:
    """Whether any layer of ``model`` skips in the next forward pass.

    Args:
        model: as for :func:`set_skip`.

    Returns:
        True in a skip window, of all layers or of some.

    Raises:
        TypeError: if ``model`` is no ``nn.Module``.
        ValueError: if ``model`` has no layer that can skip.
    """
    _check_skips(model)
    return any(getattr(layer, "skip_wgrad", False) for layer in _skippable(unwrap(model)))


@contextmanager
def skip_weight_updates(
    model: Model, *, layers: Layers | None = None, skip_biases: bool = False
) -> Iterator[Model]:
    """Forward and backward inside are a skip step; afterwards the model is as it was before.

    Args:
        model, layers, skip_biases: as for :func:`set_skip`.

    Yields:
        The same model.

    Raises:
        TypeError, ValueError: as :func:`set_skip`.

    Example:
        >>> model = wus_ext.convert(torch.nn.Linear(3, 2))
        >>> with wus_ext.skip_weight_updates(model):
        ...     model(torch.randn(4, 3)).mean().backward()
        >>> model.weight.grad is None, model.bias.grad is None
        (True, False)

        Only the gradient of the input:

        >>> x = torch.randn(4, 3, requires_grad=True)
        >>> model.zero_grad()
        >>> with wus_ext.skip_weight_updates(model, skip_biases=True):
        ...     model(x).mean().backward()
        >>> x.grad.shape, model.bias.grad
        (torch.Size([4, 3]), None)
    """
    check_module(model)
    before = [
        (module, {name: module.__dict__[name] for name in STATE if name in module.__dict__})
        for module in unwrap(model).modules()
    ]
    set_skip(model, True, layers=layers, skip_biases=skip_biases)
    try:
        yield model
    finally:
        for module, state in before:
            clear_state(module)
            module.__dict__.update(state)


def check_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if is_script(model):
        raise TypeError("model: a TorchScript module cannot be converted; convert it before jit")


def is_script(module: nn.Module) -> bool:
    # By name: to import torch.jit's classes warns.
    return type(module).__module__.startswith("torch.jit")


def unwrap(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, WRAPPERS):
            model = model.module
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            model = compiled
        else:
            return model


def _check_skips(model: nn.Module) -> None:
    check_module(model)
    if not any(isinstance(module, SkipLayer) for module in model.modules()):
        raise ValueError(
            f"model: {type(model).__name__} has no layer that can skip; "
            "call wus_ext.convert(model) first"
        )
