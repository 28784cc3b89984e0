"""scikit-learn's bundled handwritten digits: 1797 real images, no network needed."""

from __future__ import annotations

import torch
from torch.nn.functional import interpolate

from .errors import require
from .splits import MemorySplit

__all__ = ["load_digits"]


def load_digits() -> tuple[MemorySplit, MemorySplit, list[str]]:
    """The train split (1442 images), the test split (355) and the class names.

    The 8x8 grey images (UCI, Alpaydin and Kaynak) are enlarged to 32x32 and repeated over three
    channels. Every fifth image of each class is a test image, so the split never changes.

    Raises:
        MissingExtra: scikit-learn is not installed.
    """
    bunch = require("sklearn.datasets", "the digits dataset").load_digits()
    grey = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255 / 16)
    images = interpolate(grey, size=(32, 32), mode="bilinear").round().byte().expand(-1, 3, -1, -1)
    labels = torch.from_numpy(bunch.target).long()
    rank = torch.zeros_like(labels)
    for label in labels.unique():
        members = labels == label
        rank[members] = torch.arange(int(members.sum()))
    test = rank % 5 == 4
    everything = MemorySplit(images, labels)
    return (
        everything.select((~test).nonzero().squeeze(1)),
        everything.select(test.nonzero().squeeze(1)),
        [str(name) for name in bunch.target_names],
    )
