"""VGG-11 and VGG-16 for 32x32 images.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition",
arXiv 1409.1556: the convolutions of configurations A and D. Five poolings leave one pixel of a
32x32 image, so the linear layers are 512 wide.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .. import nn as wnn
from ._common import check_dropout, check_num_classes, he_init_

# Output channels of the convolutions in each stage; a pooling ends the stage.
_VGG11 = ((64,), (128,), (256, 256), (512, 512), (512, 512))
_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG(nn.Module):
    """A VGG network given by its stages; see :func:`vgg11` and :func:`vgg16`.

    Args:
        stages: output channels of the 3x3 convolutions of each stage; a 2x2 max-pooling ends it.
            Five stages leave one pixel of an image of 32x32.
        num_classes, batch_norm, dropout: as for :func:`vgg11`.

    Raises:
        TypeError, ValueError: an argument is not of its type or out of its range.
    """

    def __init__(
        self,
        stages: Sequence[Sequence[int]],
        num_classes: int = 10,
        *,
        batch_norm: bool = False,
        dropout: float = 0.5,
    ) -> None:
        check_num_classes(num_classes)
        check_dropout(dropout)
        super().__init__()
        self.features = _features(stages, batch_norm)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            wnn.Linear(stages[-1][-1], 512),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            wnn.Linear(512, 512),
            nn.ReLU(inplace=True),
            wnn.Linear(512, num_classes),
        )
        he_init_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.features(x), 1))


def _features(stages: Sequence[Sequence[int]], batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    in_channels = 3
    for stage in stages:
        for out_channels in stage:
            layers.append(wnn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(out_channels))
            layers.append(nn.ReLU(inplace=True))
            in_channels = out_channels
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers)


def vgg11(num_classes: int = 10, *, batch_norm: bool = False, dropout: float = 0.5) -> VGG:
    """Build VGG-11 for input ``(N, 3, 32, 32)``; its output is ``(N, num_classes)`` logits.

    It has 9,745,792 + 513 * ``num_classes`` parameters: 9,750,922 for 10 classes. Batch
    normalisation adds 5,504.

    Args:
        num_classes: number of classes, at least 1. Default 10.
        batch_norm: put batch normalisation behind every convolution. Default False.
        dropout: probability of dropping an input of the first two linear layers, in [0, 1].
            Default 0.5.

    Raises:
        TypeError, ValueError: an argument is not of its type or out of its range.

    >>> import torch
    >>> vgg11(num_classes=100)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """
    return VGG(_VGG11, num_classes, batch_norm=batch_norm, dropout=dropout)


def vgg16(num_classes: int = 10, *, batch_norm: bool = False, dropout: float = 0.5) -> VGG:
    """Build VGG-16 for input ``(N, 3, 32, 32)``; its output is ``(N, num_classes)`` logits.

    It has 15,240,000 + 513 * ``num_classes`` parameters: 15,245,130 for 10 classes. Batch
    normalisation adds 8,448. Arguments and errors are those of :func:`vgg11`.

    >>> import torch
    >>> vgg16(batch_norm=True)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return VGG(_VGG16, num_classes, batch_norm=batch_norm, dropout=dropout)
