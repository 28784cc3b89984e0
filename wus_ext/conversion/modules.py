"""Classes made at run time: a module becomes a subclass of its own class that can skip.

The object stays what it is, as with ``torch.nn.utils.parametrize``; only ``forward`` is new.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..engine.program import ProgramCache
from ..nn import DROP_INS, SkipLayer, is_bias

Skippable = dict[nn.Module, dict[str, bool]]

STOCK = {drop_in: stock for stock, drop_in in DROP_INS.items()}

#: Called with a converted model at the start of its forward pass.
before_step: list[Callable[[nn.Module], None]] = []

NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.CrossMapLRN2d,
)


class SkipModule(SkipLayer):
    """Mixin of a converted module without a drop-in class.

    It runs stock code in a skip step too, with what stands still of it and of the layers inside
    swapped for detached tensors while ``forward`` runs.
    """

    skip_gamma: bool = True
    #: Which layers skip, this module and all inside: None, "some" or "all" of them.
    skip_window: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps the class made at run time away from what the user's classes do here."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.skip_window or self.skip_wgrad):
            return super().forward(*args, **kwargs)
        with detached(self):
            return super().forward(*args, **kwargs)

    # The class is made at run time: copy and pickle the class that it was made from.

    def __deepcopy__(self, memo: dict) -> nn.Module:
        mixin = _mixin(type(self))
        with _as_stock(self):
            copied = copy.deepcopy(self, memo)
        copied.__class__ = injected(mixin, type(copied))
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple:
        with _as_stock(self):
            make, arguments, *state = self.__reduce_ex__(max(protocol, 2))
        return (_restore, (_mixin(type(self)), make, arguments), *state)


class SkipModel(SkipModule):
    """Mixin of a converted model's root: runs its own code, or the program made from it."""

    #: None in what a model makes of its own class, a slice of a Sequential for one.
    _skip_programs: ProgramCache | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._skip_programs
        if cache is not None and torch.compiler.is_compiling():
            if self.skip_window and _in_stock_wrapper():
                _notify_uncompiled(self)
            return super().forward(*args, **kwargs)
        if cache is None:
            return super().forward(*args, **kwargs)
        _notify(self)
        if not self.skip_window:
            cache.end_window()
            if cache.options.full == "stock":
                return super().forward(*args, **kwargs)
        program = None
        # torch.func.functional_call puts plain tensors in, which a traced program would keep.
        if all(isinstance(parameter, nn.Parameter) for parameter in self.parameters()):
            program = cache.program(self, stock_class(type(self)).forward, args, kwargs)
        if program is None:
            return super().forward(*args, **kwargs)
        with detached(self):
            return program(self, *args)


def _notify(model: nn.Module) -> None:
    for observer in before_step:
        observer(model)


# torch.compiler.disable would import the compiler here.
_notify_uncompiled = torch._disable_dynamo(_notify)


def _in_stock_wrapper() -> bool:
    """Whether a compiled forward pass must be left once, to tell the wrapper around it."""
    wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
    return wrapper is not None and not hasattr(wrapper, "_trained")


_injected_classes: dict[tuple[type, type], type] = {}


def injected(mixin: type[SkipModule], cls: type) -> type:
    """The subclass of `cls` whose ``forward`` is the mixin's, under the signature of `cls`."""
    if (mixin, cls) not in _injected_classes:

        @functools.wraps(cls.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return mixin.forward(self, *args, **kwargs)

        namespace = {"__module__": cls.__module__, "__doc__": cls.__doc__, "forward": forward}
        made = types.new_class(
            f"Skip{cls.__name__}", (mixin, cls), exec_body=lambda body: body.update(namespace)
        )
        _injected_classes[mixin, cls] = made
        STOCK[made] = cls
    return _injected_classes[mixin, cls]


def _mixin(cls: type) -> type[SkipModule]:
    return SkipModel if issubclass(cls, SkipModel) else SkipModule


def stock_class(cls: type) -> type:
    return STOCK.get(cls, cls)


@contextmanager
def _as_stock(module: nn.Module) -> Iterator[None]:
    made = type(module)
    module.__class__ = stock_class(made)
    try:
        yield
    finally:
        module.__class__ = made


def _restore(mixin: type[SkipModule], make: Any, arguments: tuple) -> nn.Module:
    module = make(*arguments)
    module.__class__ = injected(mixin, type(module))
    return module


def adopt_sharded(root: SkipModule) -> None:
    """Lets each block of ``fully_shard`` detach its parameters itself.

    It gathers them when it is called, so that what the root detached is gone by then.
    """
    for module in root.modules():
        if hasattr(module, "set_reshard_after_backward") and not isinstance(module, SkipLayer):
            module.__class__ = injected(SkipModule, type(module))
            module.skip_gamma = root.skip_gamma


def is_parametrized_bias(path: str) -> bool:
    return "parametrizations" in path.split(".")[-2:-1] and is_bias(path)


def own_parameters(root: SkipModule) -> Iterator[tuple[nn.Module, str, bool]]:
    """Every parameter of `root` and all inside: (owner, name, whether it counts as a weight).

    Those of drop-in layers too: a model may use a layer's weight without calling the layer.
    """
    for path, module in root.named_modules():
        trains = is_parametrized_bias(path) or (isinstance(module, NORMS) and not root.skip_gamma)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, not (trains or is_bias(name))


def stands_still(owner: nn.Module, is_weight: bool) -> bool:
    """Whether such a parameter of `owner` is a constant in the next forward pass."""
    return getattr(owner, "skip_wgrad", False) and (
        is_weight or getattr(owner, "skip_biases", False)
    )


def skippable_parameters(root: nn.Module) -> Skippable:
    """Whose parameters can stand still: owner -> {name: whether it counts as a weight}."""
    owners: Skippable = {}
    for module in root.modules():
        if isinstance(module, SkipModule):  # an outer module knows best what is inside
            for owner, name, is_weight in own_parameters(module):
                owners.setdefault(owner, {}).setdefault(name, is_weight)
        elif isinstance(module, SkipLayer):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    owners.setdefault(module, {}).setdefault(name, not is_bias(name))
    return owners


def skipped_now(model: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters that no layer trains in the next step, by id; none in a full step."""
    still, trained = {}, set()
    for owner, own in skippable_parameters(model).items():
        for name, is_weight in own.items():
            parameter = owner._parameters[name]
            if stands_still(owner, is_weight):
                still[id(parameter)] = parameter
            else:
                trained.add(id(parameter))
    return {key: parameter for key, parameter in still.items() if key not in trained}


@contextmanager
def detached(root: SkipModule) -> Iterator[None]:
    """Swaps parameters that stand still for detached ones, which share their storage."""
    swapped = [
        (owner, name, owner._parameters[name], owner._parameters[name].detach())
        for owner, name, is_weight in own_parameters(root)
        if stands_still(owner, is_weight)
    ]
    try:
        for owner, name, _, constant in swapped:
            _assign(owner, name, constant)
        yield
    finally:
        for owner, name, parameter, constant in swapped:
            # fully_shard puts gathered parameters in meanwhile, and may leave them there.
            if name in owner._parameters and owner._parameters[name] is constant:
                _assign(owner, name, parameter)


def _assign(owner: nn.Module, name: str, value: Any) -> None:
    owner._parameters[name] = value
    if isinstance(owner, nn.RNNBase) and name in owner._flat_weights_names:
        owner._flat_weights[owner._flat_weights_names.index(name)] = value
