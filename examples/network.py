"""A small convolutional network for the examples beside this file."""

from __future__ import annotations

import torch
from torch import nn


def network(classes: int = 10, width: int = 48) -> nn.Module:
    """For images of any size from 8x8 on: (N, 3, size, size) to (N, classes)."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, width), (width, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
        if inputs == outputs:
            layers.append(nn.MaxPool2d(2))
    head = nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, classes)
    return nn.Sequential(*layers, *head).to(memory_format=torch.channels_last)
