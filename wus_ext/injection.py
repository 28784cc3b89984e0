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

from torch import nn

from .nn import DROP_INS, SkipLayer, is_bias
from .program import ProgramCache

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

    It runs stock code in a skip step too, with its weights and those of the layers inside swapped
    for detached ones while ``forward`` runs.
    """

    skip_gamma: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps the class made at run time away from what the user's classes do here."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.skip_wgrad:
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
    """Mixin of a converted model's root: runs the full program or the skip program."""

    #: None in what a model makes of its own class, a slice of a Sequential for one.
    _skip_programs: ProgramCache | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache = self._skip_programs
        if cache is None:
            return super().forward(*args, **kwargs)
        for observer in before_step:
            observer(self)
        if not self.skip_wgrad:
            cache.end_window()
            return super().forward(*args, **kwargs)
        for observer in before_step:
            observer(self)
        program = None
        # torch.func.functional_call puts plain tensors in, which a traced program would keep.
        if all(isinstance(parameter, nn.Parameter) for parameter in self.parameters()):
            program = cache.program(self, stock_class(type(self)).forward, args, kwargs)
        if program is None:
            return super().forward(*args, **kwargs)
        with detached(self):
            return program(self, *args)


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


def is_parametrized_bias(path: str) -> bool:
    return "parametrizations" in path.split(".")[-2:-1] and is_bias(path)


def weights(root: SkipModule) -> Iterator[tuple[nn.Module, str]]:
    """Skipped parameters of `root` and all inside, as (owner, name).

    Those of drop-in layers too: a model may use a layer's weight without calling the layer.
    """
    for path, module in root.named_modules():
        if isinstance(module, NORMS) and not root.skip_gamma:
            continue
        if is_parametrized_bias(path):
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_bias(name):
                yield module, name


def skipped_now(model: nn.Module) -> set[int]:
    """Ids of the parameters that get no gradient in the next step; empty for a full step."""
    skipped = set()
    for module in model.modules():
        if isinstance(module, SkipLayer) and module.skip_wgrad:
            skipped.update(map(id, module.skipped_parameters()))
            if isinstance(module, SkipModule):
                skipped.update(
                    id(owner._parameters[name])
                    for owner, name in weights(module)
                    if getattr(owner, "skip_wgrad", True)
                )
    return skipped


@contextmanager
def detached(root: SkipModule) -> Iterator[None]:
    """Swaps weights for detached ones, which share their storage."""
    originals = [
        (owner, name, owner._parameters[name])
        for owner, name in weights(root)
        if getattr(owner, "skip_wgrad", True)  # a layer may be told to train all the same
    ]
    try:
        for owner, name, parameter in originals:
            _assign(owner, name, parameter.detach())
        yield
    finally:
        for owner, name, parameter in originals:
            _assign(owner, name, parameter)


def _assign(owner: nn.Module, name: str, value: Any) -> None:
    owner._parameters[name] = value
    if isinstance(owner, nn.RNNBase) and name in owner._flat_weights_names:
        owner._flat_weights[owner._flat_weights_names.index(name)] = value
