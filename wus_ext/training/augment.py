"""Random crop, horizontal flip and normalisation of whole batches, on the training device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

__all__ = ["Normalize", "crop_and_flip"]


def crop_and_flip(
    images: Tensor,
    generator: torch.Generator,
    *,
    padding: int = 4,
    flip: bool = True,
    first: int = 0,
    of: int | None = None,
) -> Tensor:
    """Pad with zeros, crop each image back at a random place and mirror half of them.

    Args:
        images: uint8 or floating batch of shape (N, C, H, W).
        generator: on the same device as ``images``.
        padding: pixels added on each side; the crop moves by up to this many.
        flip: whether to mirror images left to right with probability one half.
        first, of: these are the images from ``first`` on of a batch of ``of``, the rest of which
            is elsewhere; each is treated as in the whole batch. By default they are all.

    Returns:
        A new batch of the same shape and dtype, in channels-last memory.
    """
    count, _, height, width = images.shape
    device = images.device
    of, own = of or count, slice(first, first + count)
    shift = torch.randint(2 * padding + 1, (2, of, 1), generator=generator, device=device)[:, own]
    rows = shift[0] + torch.arange(height, device=device)
    columns = torch.arange(width, device=device).expand(count, width)
    if flip:
        mirrored = torch.rand((of, 1), generator=generator, device=device)[own] < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
    columns = columns + shift[1]
    # One gather crops and mirrors; pixels are its innermost, contiguous elements.
    padded = pad(images, (padding,) * 4).permute(0, 2, 3, 1)
    which = torch.arange(count, device=device)[:, None, None]
    return padded[which, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class Normalize:
    """Maps uint8 images to float32 with zero mean and unit deviation per channel.

    Args:
        mean: per-channel mean of the training images, shape (C,), in units of full brightness.
        std: per-channel standard deviation, same shape and unit; a constant channel counts as 1.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        std = torch.where(std > 1e-6, std, torch.ones_like(std))
        self.mean, self.std = mean.tolist(), std.tolist()
        self.scale = (1 / (255 * std)).view(1, -1, 1, 1)
        self.shift = (-mean / std).view(1, -1, 1, 1)

    def to(self, device: torch.device) -> Normalize:
        """Move the two constants to ``device``; returns self."""
        self.scale, self.shift = self.scale.to(device), self.shift.to(device)
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise a batch of shape (N, C, H, W); keeps its memory format."""
        return images.float().mul_(self.scale).add_(self.shift)
