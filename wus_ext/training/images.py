"""Any image file as RGB of the wanted shape."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import DataError, require

__all__ = ["Shape", "decode_image"]

#: Makes Pillow's RGB image another one.
Shape = Callable[[Any], Any]

#: Tags of a TIFF file: bits of a value, and what the value 0 looks like.
_BITS, _PHOTOMETRIC = 258, 262
_WHITE_IS_ZERO = 0
#: In these Pillow gives 16-bit values their full range; TIFF says which they have.
_FULL_RANGE = ("PNG", "PPM", "JPEG2000")


def decode_image(path: Path, shape: Shape) -> Tensor:
    """Read one image as uint8 of shape (3, height, width).

    What 8 bits hold comes out as from ``torchvision.datasets.ImageFolder``: converted to RGB by
    Pillow, which drops transparency without blending; an orientation in EXIF is not applied, and of
    several frames the first counts. Of 16 bits the upper 8 are kept, in grey as in colour.

    Args:
        path: the file.
        shape: makes it as large as it is wanted.

    Raises:
        DataError: naming the file, when it is no readable image, or holds floating-point or 32-bit
            values, whose range nobody knows.
    """
    image_module = require("PIL.Image", "the folder dataset")
    try:
        with image_module.open(path) as image:
            image = shape(_eight_bits(image, image_module).convert("RGB"))
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        raise DataError(f"cannot read {path} as an image: {error}") from error
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1)


def _eight_bits(image: Any, image_module: Any) -> Any:
    """The image, with its values in 8 bits; Pillow itself would clip larger ones."""
    if not image.mode.startswith(("I", "F")):
        return image
    if image.mode == "F":
        raise DataError("floating-point values have no known range, save it with 8 or 16 bits")
    bits, inverted = 16, False
    if image.format == "TIFF" and image.mode.startswith("I;16"):
        bits = image.tag_v2[_BITS][0]
        inverted = image.tag_v2.get(_PHOTOMETRIC) == _WHITE_IS_ZERO
    elif image.format not in _FULL_RANGE:
        raise DataError(
            f"{image.format} with values of mode {image.mode}, save it with 8 or 16 bits"
        )
    values = require("numpy", "the folder dataset").asarray(image).astype("uint32") >> (bits - 8)
    return image_module.fromarray((255 - values if inverted else values).astype("uint8"))
