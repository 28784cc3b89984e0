"""Weights to start from: read from any usual file, and put into a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .checkpoint import load_checkpoint
from .errors import DataError, require
from .networks import pretrained_weights

__all__ = ["PRETRAINED", "load_weights", "put_weights", "read_weights"]

#: In the place of a file: what torchvision or timm offers.
PRETRAINED = "pretrained"
#: What others wrap a model in, and what they call its state beside other things.
_WRAPPERS = ("module.", "_orig_mod.")
_KEYS = ("model", "state_dict", "model_state_dict")
_SHOWN = 4


def load_weights(model: nn.Module, weights: str, network: str) -> str:
    """Put ``weights`` into ``model``; returns what was done, in a line.

    Args:
        model: the network.
        weights: a file or folder, as for :func:`read_weights`, or :data:`PRETRAINED`.
        network: the name of ``model``, as for :func:`~wus_ext.training.networks.build_network`.

    Raises:
        ConfigError, DataError, MissingExtra: there are none, or they are not this network's.
    """
    if weights == PRETRAINED:
        where, values = f"pretrained {network}", pretrained_weights(network)
    else:
        where, values = weights, read_weights(weights)
    total = len(model.state_dict())
    anew = put_weights(model, values, where)
    rest = f"; new, for other classes: {', '.join(anew)}" if anew else ""
    return f"weights: {total - len(anew)} of {total} tensors from {where}{rest}"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors in a file, by name.

    Args:
        path: ``.safetensors``; a ``state_dict`` that ``torch.save`` wrote, alone or under the name
            ``model`` or ``state_dict``, wrapped in ``DataParallel`` or not; a checkpoint of a run;
            or the folder of a run, whose best epoch counts.

    Raises:
        DataError: naming the file, when it is missing or holds no weights.
    """
    path = Path(path).expanduser()
    if (path / "config.json").is_file():
        path = path / "best.pt"
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    values: Any = load_checkpoint(path)
    if isinstance(values, Mapping):
        values = next((values[k] for k in _KEYS if isinstance(values.get(k), Mapping)), values)
    if not isinstance(values, Mapping) or not values:
        raise DataError(f"{path} holds no weights")
    tensors = {str(name): value for name, value in values.items() if isinstance(value, Tensor)}
    if len(tensors) < len(values):
        raise DataError(f"{path} holds no weights: expected the state_dict of a network")
    for wrapper in _WRAPPERS:
        if all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    library = require("safetensors.torch", "a .safetensors file")
    if not path.is_file():
        raise DataError(f"{path} is missing")
    try:
        return library.load_file(path)
    except Exception as error:  # its own error class, and OSError
        raise DataError(f"{path} is not readable: {error}") from error


def put_weights(model: nn.Module, values: Mapping[str, Tensor], where: str) -> list[str]:
    """Copy ``values`` into the parameters and buffers of ``model`` that have their names.

    Names that the model lacks are left out.

    Args:
        where: what errors call ``values``.

    Returns:
        The names of what has other classes there than here, and so stays as it is.

    Raises:
        DataError: something of the model is missing in ``values`` or has another shape.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> there = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 10)).state_dict()
    >>> put_weights(model, there, "there")
    ['1.weight', '1.bias']
    """
    own = model.state_dict()
    if missing := [name for name in own if name not in values]:
        raise DataError(
            f"{where} is not of this network: it has no {_some(missing)}, it has {_some(values)}"
        )
    anew = [name for name in own if values[name].shape != own[name].shape]
    for name in anew:
        here, there = tuple(own[name].shape), tuple(values[name].shape)
        if len(here) != len(there) or here[1:] != there[1:]:
            raise DataError(
                f"{where} is not of this network: {name} is {there} there and {here} here"
            )
    model.load_state_dict({name: values[name] for name in own if name not in anew}, strict=False)
    return anew


def _some(names: Any) -> str:
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
