"""Real images that come with scikit-learn, for the examples beside this file: no network needed."""

from __future__ import annotations

import torch
from sklearn import datasets
from torch import Tensor
from torch.nn.functional import interpolate


def digits(size: int = 32, channels: int = 3) -> tuple[Tensor, Tensor]:
    """1797 handwritten digits in [-1, 1], shape (1797, channels, size, size), and their labels."""
    bunch = datasets.load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 8 - 1
    images = interpolate(images, (size, size), mode="bilinear").repeat(1, channels, 1, 1)
    return images.contiguous(memory_format=torch.channels_last), torch.from_numpy(bunch.target)


def photo(name: str, size: int) -> Tensor:
    """``china`` (a temple) or ``flower``: the middle, shape (1, 3, size, size), in [0, 1]."""
    image = torch.from_numpy(datasets.load_sample_image(f"{name}.jpg").copy()).permute(2, 0, 1)
    side = min(image.shape[1:])
    top, left = ((length - side) // 2 for length in image.shape[1:])
    square = image[None, :, top : top + side, left : left + side].float() / 255
    smaller = interpolate(square, (size, size), mode="bilinear", antialias=True)
    return smaller.contiguous(memory_format=torch.channels_last)


def patches(size: int, count: int, seed: int = 0) -> Tensor:
    """Random pieces of both photographs at full resolution, shape (count, 3, size, size)."""
    random = torch.Generator().manual_seed(seed)
    whole = [photo(name, 427)[0] for name in ("china", "flower")]
    places = torch.randint(0, 427 - size, (count, 2), generator=random).tolist()
    cut = [
        whole[i % 2][:, top : top + size, left : left + size]
        for i, (top, left) in enumerate(places)
    ]
    return torch.stack(cut).contiguous(memory_format=torch.channels_last)
