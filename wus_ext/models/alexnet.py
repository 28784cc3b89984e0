"""AlexNet for 32x32 images.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks", arXiv 1404.5997:
its five convolutions and three linear layers, with 3x3 kernels for the small image.
"""

from __future__ import annotations

import torch
from torch import nn

from .. import nn as wnn
from ._common import check_dropout, check_num_classes, he_init_


class AlexNet(nn.Module):
    """AlexNet for images of 32x32; arguments and errors are those of :func:`alexnet`."""

    def __init__(self, num_classes: int = 10, *, dropout: float = 0.5) -> None:
        check_num_classes(num_classes)
        check_dropout(dropout)
        super().__init__()
        self.features = nn.Sequential(
            wnn.Conv2d(3, 64, kernel_size=3, stride=2, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            wnn.Conv2d(64, 192, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            wnn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            wnn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            wnn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            wnn.Linear(256 * 2 * 2, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            wnn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            wnn.Linear(4096, num_classes),
        )
        he_init_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def alexnet(num_classes: int = 10, *, dropout: float = 0.5) -> AlexNet:
    """Build AlexNet for input ``(N, 3, 32, 32)``; its output is ``(N, num_classes)`` logits.

    It has 23,231,296 + 4,097 * ``num_classes`` parameters: 23,272,266 for 10 classes.

    Args:
        num_classes: number of classes, at least 1. Default 10.
        dropout: probability of dropping an input of the first two linear layers, in [0, 1].
            Default 0.5.

    Raises:
        TypeError, ValueError: an argument is not of its type or out of its range.

    >>> import torch
    >>> alexnet(num_classes=100)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """
    return AlexNet(num_classes, dropout=dropout)
