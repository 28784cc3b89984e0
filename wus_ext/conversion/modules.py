"""Classes made at run time: a module becomes a subclass of its own class that can skip.

The object stays what it is, as with ``torch.nn.utils.parametrize``, and so does the class's name.
The module's own ``forward``, and every other method, runs as it stands.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._build import deferral
from .._torch import uncompiled
from ..engine.engine import Engine
from ..engine.parameters import swapped
from ..nn import DROP_INS, SkipLayer, inside

STOCK = {drop_in: stock for stock, drop_in in DROP_INS.items()}


class SkipModule(SkipLayer):
    """Mixin of a converted module without a drop-in class.

    Stock code runs in a skip step, too, and reads constants where parameters stand still.
    """

    skip_gamma: bool = True
    #: Which layers skip, this module and all inside: None, "some" or "all" of them.
    skip_window: str | None = None
    #: Whether one of them is TorchScript's.
    holds_script: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Keeps the class made at run time away from what the user's classes do here."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.skip_window or self.skip_wgrad or self._forward_hooks):
            return super().forward(*args, **kwargs)
        output = with_constants(self, super().forward, *args, **kwargs)
        if self._forward_hooks and not torch.compiler.is_compiling():
            deferral.settle_all()  # a hook may free weights, as fully_shard's does
        return output

    # The class is made at run time: copy and pickle the class that it was made from.

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        mixin = _mixin(type(self))
        with _as_stock(self):
            copied = copy.deepcopy(self, memo)
        copied.__class__ = injected(mixin, type(copied))
        return copied

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        with _as_stock(self):
            make, arguments, *state = self.__reduce_ex__(max(protocol, 2))
        return (_restore, (_mixin(type(self)), make, arguments), *state)


class SkipModel(SkipModule):
    """Mixin of a converted model's root: lets its layers defer where they may run fused."""

    #: None in what a model makes of its own class, a slice of a Sequential for one.
    _skip_engine: Engine | None = None
    #: Called with the model at the start of its forward pass.
    _before_step: Callable[[nn.Module], None] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        engine = self._skip_engine
        if engine is None:
            return super().forward(*args, **kwargs)
        if torch.compiler.is_compiling():
            if self.skip_window and _in_stock_wrapper():
                _notify_uncompiled(self)
            return super().forward(*args, **kwargs)
        _notify(self)
        if not self.skip_window:
            engine.end_window()
            if engine.options.full == "stock" and not engine.holds_frozen(self):
                return super().forward(*args, **kwargs)
        inputs = (*args, *kwargs.values())
        session = engine.begin(inputs)
        if session is None:
            return super().forward(*args, **kwargs)
        try:
            output = super().forward(*args, **kwargs)
        except BaseException:
            session.abandon()
            raise
        session.finish()
        engine.remember(inputs)
        engine.report(type(self).__name__)
        return output


def _notify(model: SkipModel) -> None:
    if model._before_step is not None:
        model._before_step(model)


# torch.compiler.disable would import the compiler here.
_notify_uncompiled = uncompiled(_notify)


def _in_stock_wrapper() -> bool:
    """Whether a compiled forward pass must be left once, to tell the wrapper around it."""
    wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
    return wrapper is not None and not hasattr(wrapper, "_trained")


def with_constants(root: SkipModule, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a method whose code reads constants where parameters stand still."""
    if torch.compiler.is_compiling():  # one thread, and the compiler does not know ours
        with swapped(root, nn.Module):
            return method(*args, **kwargs)
    before, inside.active = inside.active, True
    try:
        if not root.holds_script:
            return method(*args, **kwargs)
        with swapped(root, torch.jit.ScriptModule):
            return method(*args, **kwargs)
    finally:
        inside.active = before


class _FlatWeights:
    """``_flat_weights`` of a recurrent layer: the same list, or in its code one of constants."""

    def __get__(self, module: nn.RNNBase | None, owner: type) -> Any:
        if module is None:
            return self
        weights = module.__dict__["_flat_weights"]
        for i, name in enumerate(module.__dict__.get("_flat_weights_names", ())):
            if name in module._parameters:
                weights[i] = module._parameters[name]
        if not (module.skip_wgrad and inside.active):
            return weights
        return [getattr(module, name) for name in module._flat_weights_names]

    def __set__(self, module: nn.RNNBase, value: list[Tensor | None]) -> None:
        module.__dict__["_flat_weights"] = value


_made: dict[tuple[type, type], type[SkipModule]] = {}


def injected(mixin: type[SkipModule], cls: type[nn.Module]) -> type[SkipModule]:
    """The subclass of `cls` under its name whose ``forward`` is the mixin's.

    Raises:
        TypeError: if Python cannot make one.
    """
    if (mixin, cls) not in _made:

        @functools.wraps(cls.forward)
        def forward(self: SkipModule, *args: Any, **kwargs: Any) -> Any:
            return mixin.forward(self, *args, **kwargs)

        namespace: dict[str, Any] = {
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__doc__": cls.__doc__,
            "forward": forward,
            **_other_ways_in(cls),
        }
        if issubclass(cls, nn.RNNBase):
            namespace["_flat_weights"] = _FlatWeights()
        # The stock class first: its memory layout is the object's. In the order in which methods
        # are looked up the mixin comes first all the same.
        metaclass: type = type(cls)
        made = _mixins_first(metaclass)(cls.__name__, (cls, mixin), namespace)
        STOCK[made] = cls
        _made[mixin, cls] = made
    return _made[mixin, cls]


@functools.cache
def _mixins_first(metaclass: type[type]) -> type:
    def mro(cls: type) -> list[type]:
        own, *others = metaclass.mro(cls)
        mixins = [base for base in others if base in (SkipModel, SkipModule, SkipLayer)]
        made = [base for base in others if issubclass(base, SkipLayer) and base not in mixins]
        stock = [base for base in others if base not in (*made, *mixins)]
        return [own, *made, *mixins, *stock]

    return types.new_class(
        metaclass.__name__, (metaclass,), exec_body=lambda body: body.update(mro=mro)
    )


def adopt_watched(root: nn.Module) -> None:
    """Gives modules that somebody watches, ``fully_shard`` for one, a class that settles first."""
    for module in root.modules():
        if module._forward_hooks and not isinstance(module, SkipLayer):
            module.__class__ = injected(SkipModule, type(module))
            module.__dict__["skip_gamma"] = getattr(root, "skip_gamma", True)


def _other_ways_in(cls: type) -> dict[str, Callable[..., Any]]:
    """Methods of the user's classes that compute on tensors as ``forward`` does."""
    methods: dict[str, Callable[..., Any]] = {}
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "torch" or not issubclass(base, nn.Module):
            continue
        for name, method in vars(base).items():
            if (
                isinstance(method, types.FunctionType)
                and not hasattr(nn.Module, name)
                and not name.startswith("__")
            ):
                methods.setdefault(name, _reading_constants(method))
    return methods


def _reading_constants(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: SkipModule, *args: Any, **kwargs: Any) -> Any:
        if (
            not (self.skip_window or self.skip_wgrad)
            or inside.active
            or not any(_holds_tensors(arg) for arg in (*args, *kwargs.values()))
        ):
            return method(self, *args, **kwargs)
        return with_constants(self, method, self, *args, **kwargs)

    return wrapper


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor | list | tuple | dict)


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


def _restore(mixin: type[SkipModule], make: Any, arguments: tuple[Any, ...]) -> nn.Module:
    module = make(*arguments)
    module.__class__ = injected(mixin, type(module))
    return module
