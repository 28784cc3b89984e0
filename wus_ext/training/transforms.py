"""An image of any size becomes a square one, as torchvision's reference training has it."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["centre", "random_resized_crop", "shorter_side"]

#: Part of the area that a random crop has, and its width over its height.
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
_TRIES = 10
#: An image is made this much larger than what is cut out of its middle: 256 pixels for 224.
_MARGIN = 256 / 224


def shorter_side(size: int) -> int:
    """What the shorter side of an image is made before its middle is cut out.

    >>> shorter_side(224)
    256
    """
    return round(size * _MARGIN)


def centre(image: Any, size: int, side: int) -> Any:
    """Make the shorter side ``side`` long, keeping the aspect, and cut out the middle.

    Equal to torchvision's ``Resize(side)`` and ``CenterCrop(size)``.

    Args:
        image: Pillow's.
        size: of the result, in both directions, at most ``side``.
        side: pixels.
    """
    width, height = image.size
    if width < height:
        wanted = side, int(side * height / width)
    else:
        wanted = int(side * width / height), side
    if wanted != image.size:
        image = image.resize(wanted, _bilinear(image))
    left, top = (round((length - size) / 2) for length in wanted)
    if wanted == (size, size):
        return image
    return image.crop((left, top, left + size, top + size))


def random_resized_crop(image: Any, size: int, generator: torch.Generator) -> Any:
    """Cut out a random part, of random size and aspect, and make it ``size`` square.

    Equal to torchvision's ``RandomResizedCrop(size)`` with the same random numbers.

    Args:
        image: Pillow's.
        size: of the result, in both directions.
        generator: on the CPU.
    """
    width, height = image.size
    left, top, width, height = _part(width, height, generator)
    image = image.crop((left, top, left + width, top + height))
    return image.resize((size, size), _bilinear(image))


def _part(width: int, height: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Left, top, width and height of a random part."""
    low, high = torch.log(torch.tensor(RATIO)).tolist()
    for _ in range(_TRIES):
        area = width * height * torch.empty(1).uniform_(*SCALE, generator=generator).item()
        ratio = torch.exp(torch.empty(1).uniform_(low, high, generator=generator)).item()
        wide, tall = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < wide <= width and 0 < tall <= height:
            top = torch.randint(0, height - tall + 1, (1,), generator=generator).item()
            left = torch.randint(0, width - wide + 1, (1,), generator=generator).item()
            return int(left), int(top), wide, tall
    # None fitted: the largest part in the middle whose aspect is allowed.
    wide, tall = width, height
    if width / height < RATIO[0]:
        tall = round(width / RATIO[0])
    elif width / height > RATIO[1]:
        wide = round(height * RATIO[1])
    return (width - wide) // 2, (height - tall) // 2, wide, tall


def _bilinear(image: Any) -> Any:
    from PIL.Image import Resampling

    return Resampling.BILINEAR
