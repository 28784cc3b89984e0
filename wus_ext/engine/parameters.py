"""Which parameters stand still in a skip step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..nn import NORMS, SkipLayer, is_bias

Skippable = dict[nn.Module, dict[str, bool]]


def is_converted(module: nn.Module) -> bool:
    """Whether a module is the root of a converted model."""
    return hasattr(type(module), "skip_window")


def is_parametrized_bias(path: str) -> bool:
    return "parametrizations" in path.split(".")[-2:-1] and is_bias(path)


def own_parameters(root: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter, bool]]:
    """Every parameter of `root` and all inside: (owner, name, itself, whether it is a weight).

    Those of drop-in layers too: a model may use a layer's weight without calling the layer.
    """
    for path, module in root.named_modules():
        trains = is_parametrized_bias(path) or (isinstance(module, NORMS) and not root.skip_gamma)
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield module, name, parameter, not (trains or is_bias(name))


def stands_still(owner: nn.Module, is_weight: bool) -> bool:
    """Whether such a parameter of `owner` is a constant in the next forward pass."""
    return getattr(owner, "skip_wgrad", False) and (
        is_weight or getattr(owner, "skip_biases", False)
    )


def skippable_parameters(root: nn.Module) -> Skippable:
    """Whose parameters can stand still: owner -> {name: whether it counts as a weight}."""
    owners: Skippable = {}
    for module in root.modules():
        if is_converted(module):  # an outer module knows best what is inside
            for owner, name, _, is_weight in own_parameters(module):
                owners.setdefault(owner, {}).setdefault(name, is_weight)
        elif isinstance(module, SkipLayer):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    owners.setdefault(module, {}).setdefault(name, not is_bias(name))
    return owners


def skipped_now(model: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters that no layer trains in the next step, by id; none in a full step."""
    still: dict[int, nn.Parameter] = {}
    trained: set[int] = set()
    for owner, own in skippable_parameters(model).items():
        for name, is_weight in own.items():
            parameter = owner._parameters[name]
            if parameter is not None and stands_still(owner, is_weight):
                still[id(parameter)] = parameter
            else:
                trained.add(id(parameter))
    return {key: parameter for key, parameter in still.items() if key not in trained}


@contextmanager
def swapped(root: nn.Module, kind: type[nn.Module]) -> Iterator[None]:
    """Puts detached tensors, which share their storage, in the place of what stands still.

    For modules of a kind whose code cannot be handed constants otherwise: TorchScript's, and any
    while torch.compile reads it. Not for several threads.
    """
    replaced = [
        (owner, name, parameter, parameter.detach())
        for owner, name, parameter, is_weight in own_parameters(root)
        if isinstance(owner, kind) and stands_still(owner, is_weight)
    ]
    try:
        for owner, name, _, constant in replaced:
            _assign(owner, name, constant)
        yield
    finally:
        for owner, name, parameter, constant in replaced:
            # fully_shard puts gathered parameters in meanwhile, and may leave them there.
            if name in owner._parameters and owner._parameters[name] is constant:
                _assign(owner, name, parameter)


def _assign(owner: nn.Module, name: str, value: Any) -> None:
    owner._parameters[name] = value
    if isinstance(owner, nn.RNNBase) and name in owner._flat_weights_names:
        owner._flat_weights[owner._flat_weights_names.index(name)] = value
