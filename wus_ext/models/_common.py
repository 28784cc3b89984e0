"""What the networks share: argument checks and initialisation."""

from __future__ import annotations

from numbers import Integral, Real

from torch import nn


def check_num_classes(num_classes: int) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral):
        raise TypeError(f"num_classes must be an integer, got {num_classes!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")


def check_dropout(dropout: float) -> None:
    if isinstance(dropout, bool) or not isinstance(dropout, Real):
        raise TypeError(f"dropout must be a number, got {dropout!r}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"dropout must be a probability in [0, 1], got {dropout}")


def he_init_(model: nn.Module) -> None:
    """Draw convolution weights from N(0, 2 / fan_in) and set convolution biases to zero.

    Keeps the variance of activations through many ReLU layers, so that VGG-16 trains without
    batch normalisation (He et al., "Delving Deep into Rectifiers", arXiv 1502.01852). Linear
    layers keep PyTorch's smaller default, which starts with logits near zero: with He's, AlexNet
    diverges at learning rates that otherwise train it.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
