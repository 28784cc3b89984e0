"""Which network a name means: one of ours, torchvision's, timm's, or a function in a file."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .. import models
from .errors import ConfigError, DataError, require

__all__ = [
    "MODELS",
    "build_network",
    "check_forward",
    "check_name",
    "pretrained_statistics",
    "pretrained_weights",
    "source",
]

#: Ours, in their form for 32x32 images.
MODELS = ("alexnet", "vgg11", "vgg11_bn", "vgg16", "vgg16_bn", "resnet18")
TORCHVISION, TIMM = "torchvision:", "timm:"
#: They would give several outputs while they train.
_AUXILIARY = ("googlenet", "inception_v3")


def check_name(name: str) -> None:
    """Check the form of a network's name; whether torchvision or timm has it is not looked up.

    Raises:
        ConfigError: it is none.

    >>> check_name("timm:vit_tiny_patch16_224")
    >>> check_name("lenet")
    Traceback (most recent call last):
    wus_ext.training.errors.ConfigError: model must be one of alexnet, vgg11, vgg11_bn, vgg16, \
vgg16_bn, resnet18, or torchvision:NAME, timm:NAME, path/file.py:function, got 'lenet'
    """
    if name in MODELS:
        return
    start, _, rest = name.partition(":")
    if rest and (f"{start}:" in (TORCHVISION, TIMM) or _in_file(name)):
        return
    raise ConfigError(
        f"model must be one of {', '.join(MODELS)}, or torchvision:NAME, timm:NAME, "
        f"path/file.py:function, got {name!r}"
    )


def build_network(name: str, classes: int, *, dropout: float = 0.5) -> nn.Module:
    """The network with fresh weights.

    Args:
        name: as :func:`check_name` has it. A function in a file is called with ``classes``, and
            may import what lies beside the file.
        classes: number of outputs.
        dropout: of ours with linear layers to drop from.

    Raises:
        ConfigError: there is no such network, or the function fails.
        MissingExtra: torchvision or timm is not installed.
    """
    if name.startswith(TORCHVISION):
        library, own = _torchvision(name)
        options = {"aux_logits": False} if own in _AUXILIARY else {}
        return library.get_model(own, weights=None, num_classes=classes, **options)
    if name.startswith(TIMM):
        library, own = _timm(name)
        return library.create_model(own, num_classes=classes)
    if file := _in_file(name):
        return _from_file(name, *file, classes)
    name, _, suffix = name.partition("_")
    settings: dict[str, Any] = {} if name == "resnet18" else {"dropout": dropout}
    if suffix == "bn":
        settings["batch_norm"] = True
    return getattr(models, name)(num_classes=classes, **settings)


def source(name: str, classes: int) -> str:
    """The expression that builds the network.

    >>> source("vgg11_bn", 10)
    'wus_ext.models.vgg11(num_classes=10, batch_norm=True)'
    """
    if name.startswith(TORCHVISION):
        own = name.removeprefix(TORCHVISION)
        auxiliary = ", aux_logits=False" if own in _AUXILIARY else ""
        return f"torchvision.models.{own}(num_classes={classes}{auxiliary})"
    if name.startswith(TIMM):
        return f"timm.create_model({name.removeprefix(TIMM)!r}, num_classes={classes})"
    if file := _in_file(name):
        return f"{file[1]}({classes})"
    own, _, suffix = name.partition("_")
    norm = ", batch_norm=True" if suffix else ""
    return f"wus_ext.models.{own}(num_classes={classes}{norm})"


def pretrained_weights(name: str) -> Mapping[str, Tensor]:
    """The weights that torchvision or timm offers for a network, downloaded if they must be.

    Raises:
        ConfigError: it offers none.
        DataError: they cannot be downloaded.
    """
    try:
        if name.startswith(TORCHVISION):
            library, own = _torchvision(name)
            return library.get_model_weights(own).DEFAULT.get_state_dict(check_hash=True)
        if name.startswith(TIMM):
            library, own = _timm(name)
            _timm_config(name)
            return library.create_model(own, pretrained=True).state_dict()
    except ConfigError:
        raise
    except Exception as error:  # urllib, requests, huggingface_hub and httpx raise their own
        raise DataError(
            f"cannot fetch the pretrained weights of {name} ({_first_line(error)}): "
            "use --weights FILE"
        ) from error
    raise ConfigError(f"model {name!r} has no pretrained weights: use --weights FILE")


def pretrained_statistics(name: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the images that the pretrained weights have seen, as
    :meth:`~wus_ext.training.splits.MemorySplit.statistics` gives them.

    Raises:
        ConfigError: there are no pretrained weights.
    """
    given: Any = None
    if name.startswith(TORCHVISION):
        library, own = _torchvision(name)
        given = library.get_model_weights(own).DEFAULT.transforms()
    elif name.startswith(TIMM):
        given = _timm_config(name)
    if given is None:
        raise ConfigError(f"model {name!r} has no pretrained weights: use --weights FILE")
    return torch.tensor(given.mean), torch.tensor(given.std)


def check_forward(model: nn.Module, images: Tensor, classes: int, name: str) -> None:
    """Run ``model`` once, in evaluation mode, to see that it takes such images.

    Raises:
        ConfigError: it fails, or gives something else than a score for each class.
    """
    size = "x".join(map(str, images.shape[1:]))
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            scores = model(images)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the network's own code raises
        raise ConfigError(
            f"model {name!r} fails on {size} images ({_first_line(error)}): "
            "use another --image-size"
        ) from error
    finally:
        model.train(training)
    wanted = (len(images), classes)
    if not isinstance(scores, Tensor) or scores.shape != wanted:
        found = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigError(
            f"model {name!r} must give a tensor of shape {wanted}, a score for each class, for "
            f"{len(images)} images, got {found}"
        )


def _torchvision(name: str) -> tuple[Any, str]:
    own = name.removeprefix(TORCHVISION)
    library = require("torchvision.models", f"the network {name}")
    known = library.list_models(module=library)
    if own not in known:
        raise ConfigError(_unknown("torchvision", own, known))
    return library, own


def _timm(name: str) -> tuple[Any, str]:
    own = name.removeprefix(TIMM)
    library = require("timm", f"the network {name}", extra="integrations")
    if not library.is_model(own):
        raise ConfigError(_unknown("timm", own, library.list_models()))
    return library, own


def _timm_config(name: str) -> Any:
    library, own = _timm(name)
    config = library.get_pretrained_cfg(own)
    if config is None or not config.has_weights:
        raise ConfigError(f"timm has no pretrained weights for {own!r}: use --weights FILE")
    return config


def _unknown(library: str, name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), n=3)
    return f"model: {library} has no network {name!r}" + (
        f", but {', '.join(near)}" if near else f": see {library}'s list_models()"
    )


def _in_file(name: str) -> tuple[Path, str] | None:
    file, _, function = name.rpartition(":")
    return (Path(file).expanduser(), function) if file.endswith(".py") and function else None


def _from_file(name: str, path: Path, function: str, classes: int) -> nn.Module:
    if not path.is_file():
        raise ConfigError(f"model {name!r}: there is no file {path}")
    with _beside(path):
        try:
            build = getattr(_module(path), function, None)
            if not callable(build):
                raise ConfigError(f"model {name!r}: {path} has no function {function!r}")
            network = build(classes)
        except ConfigError:
            raise
        except Exception as error:  # whatever the user's code raises
            kind = type(error).__name__
            raise ConfigError(
                f"model {name!r}: {function}({classes}) failed: {kind}: {_first_line(error)} "
                f"({_place(error, path)})"
            ) from error
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"model {name!r}: {function}({classes}) must return a torch.nn.Module, "
            f"got {type(network).__name__}"
        )
    return network


def _module(path: Path) -> ModuleType:
    """The module in a file, as ``import`` would make it, once."""
    key = f"wus_ext_user_{path.resolve()}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[key] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[key]
            raise
    return sys.modules[key]


@contextmanager
def _beside(path: Path) -> Iterator[None]:
    """Lets the file import its neighbours, as if it were the program."""
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _place(error: Exception, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f"{path}, line {error.lineno}"
    trace, line = error.__traceback__, 0
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == path:
            line = trace.tb_lineno
        trace = trace.tb_next
    return f"{path}, line {line}" if line else str(path)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
