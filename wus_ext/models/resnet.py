"""ResNet-18 for 32x32 images.

He et al., "Deep Residual Learning for Image Recognition", arXiv 1512.03385, with the stem for
small images: one 3x3 convolution of stride 1 and no pooling. Names of submodules are
torchvision's.
"""

from __future__ import annotations

import torch
from torch import nn

from .. import nn as wnn
from ._common import check_num_classes, he_init_


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = wnn.Conv2d(
            in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False
        )
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = wnn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                wnn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + self.downsample(x))


class ResNet18(nn.Module):
    """ResNet-18 for images of 32x32; arguments and errors are those of :func:`resnet18`."""

    def __init__(self, num_classes: int = 10) -> None:
        check_num_classes(num_classes)
        super().__init__()
        self.conv1 = wnn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(64, 64, stride=1)
        self.layer2 = _stage(64, 128, stride=2)
        self.layer3 = _stage(128, 256, stride=2)
        self.layer4 = _stage(256, 512, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = wnn.Linear(512, num_classes)
        he_init_(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _stage(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(in_channels, out_channels, stride), BasicBlock(out_channels, out_channels, 1)
    )


def resnet18(num_classes: int = 10) -> ResNet18:
    """Build ResNet-18 for input ``(N, 3, 32, 32)``; its output is ``(N, num_classes)`` logits.

    It has 11,168,832 + 513 * ``num_classes`` parameters: 11,173,962 for 10 classes. Its
    convolutions have no bias: in a skip window the batch normalisation's shifts and the bias of
    the last layer train.

    Args:
        num_classes: number of classes, at least 1. Default 10.

    Raises:
        TypeError, ValueError: ``num_classes`` is not an integer or less than 1.

    >>> import torch
    >>> resnet18(num_classes=100)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 100])
    """
    return ResNet18(num_classes)
