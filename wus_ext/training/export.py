"""A trained network for others: a stock ``state_dict``, which loads without this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .errors import ConfigError, require, usable
from .evaluation import Checkpoint
from .files import write_atomic
from .networks import source

__all__ = ["export_weights"]

_SUFFIXES = (".safetensors", ".pt", ".pth")


def export_weights(checkpoint: Checkpoint, out: str | Path) -> list[str]:
    """Write the parameters and buffers of a checkpoint's network, under their stock names.

    Args:
        checkpoint: from :func:`~wus_ext.training.evaluation.read_checkpoint`.
        out: ``.safetensors``, with the network, the classes and the normalisation as metadata, or
            ``.pt`` (``.pth``), which ``torch.load(weights_only=True)`` reads.

    Returns:
        Lines that say what was written and how to load it.

    Raises:
        ConfigError: ``out`` exists, has another suffix, or lies in a folder that does not exist.
        StorageError: it cannot be written.
        MissingExtra: safetensors is not installed.
    """
    out = Path(out).expanduser()
    if out.suffix not in _SUFFIXES:
        raise ConfigError(f"--out must end in {', '.join(_SUFFIXES)}, got {out}")
    with usable(out):
        if out.exists():
            raise ConfigError(f"{out} exists: choose another --out")
        if not out.parent.is_dir():
            raise ConfigError(f"there is no folder {out.parent}: choose another --out")
    # Each its own memory: what shares some is stored once by one format and refused by the other.
    tensors = {name: v.clone().contiguous() for name, v in checkpoint.model.state_dict().items()}
    size = checkpoint.config.pixels()
    if out.suffix == ".safetensors":
        content = _safetensors(checkpoint, tensors)
        write_atomic(out, lambda file: file.write(content))
        load = f"safetensors.torch.load_file({str(out)!r})"
    else:
        _save(out, tensors)
        load = f"torch.load({str(out)!r}, weights_only=True)"
    megabytes = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    accuracy = f"{checkpoint.record['test_accuracy']:.2f} %"
    network = source(checkpoint.config.model, len(checkpoint.classes))
    both = checkpoint.mean, checkpoint.std
    mean, std = (", ".join(f"{value:.4f}" for value in values) for values in both)
    return [
        f"{out}: {len(tensors)} tensors, {megabytes:.1f} MiB, of epoch {checkpoint.epoch} "
        f"(test accuracy {accuracy})",
        f"load: model = {network}; model.load_state_dict({load})",
        f"images: RGB from 0 to 1, 3x{size}x{size}, less mean ({mean}), over deviation ({std})",
        f"classes: {', '.join(checkpoint.classes)}",
    ]


def _save(out: Path, tensors: dict[str, Tensor]) -> None:
    def write(file: BinaryIO) -> None:
        torch.save(tensors, file)

    write_atomic(out, write)


def _safetensors(checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> bytes:
    about = {
        "model": checkpoint.config.model,
        "classes": checkpoint.classes,
        "image_size": checkpoint.config.pixels(),
        "mean": checkpoint.mean,
        "std": checkpoint.std,
    }
    metadata = {name: v if isinstance(v, str) else json.dumps(v) for name, v in about.items()}
    library = require("safetensors.torch", "a .safetensors file")
    return library.save(tensors, metadata={"format": "pt", **metadata})
