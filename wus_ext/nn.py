"""Drop-in layers: torch.nn's own, with an attribute ``skip_wgrad``.

Same constructors, parameters and ``state_dict`` keys. While ``skip_wgrad`` is False a layer is
stock PyTorch bit for bit; while it is True the layer's weight is a constant: its gradient is not
computed (``weight.grad`` stays what it was) and nothing is saved for it, while the bias trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import functional


class SkipLayer:
    """Mixin of every layer that can leave its weight gradients out."""

    #: Read in each forward; backward follows what forward decided.
    skip_wgrad: bool = False

    def skipped_parameters(self) -> Iterator[nn.Parameter]:
        """The layer's own parameters that get no gradient while ``skip_wgrad`` is True."""
        for name, parameter in self._parameters.items():
            if parameter is not None and not is_bias(name):
                yield parameter


def is_bias(name: str) -> bool:
    """Whether a parameter of this name trains in a skip step: ``bias``, ``in_proj_bias``, ..."""
    return "bias" in name.rsplit(".", 1)[-1].split("_")


class DropIn(SkipLayer):
    """Mixin of the layers here."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        # torch.fx takes torch.nn's own layers for leaves, and so it should take these.
        if args and isinstance(args[0], fx.Proxy):
            tracer = args[0].tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return super()._call_impl(*args, **kwargs)


class Conv2d(DropIn, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with a skip flag; every ``padding_mode`` included.

    Example:
        >>> layer = wus_ext.nn.Conv2d(3, 8, 3, padding=1)
        >>> layer.skip_wgrad = True
        >>> layer(torch.randn(2, 3, 32, 32)).mean().backward()
        >>> layer.weight.grad is None, layer.bias.grad.shape
        (True, torch.Size([8]))
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self.skip_wgrad:
            return super()._conv_forward(input, weight, bias)
        padding = self.padding
        if self.padding_mode != "zeros":
            input = functional.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = 0
        return functional.conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, skip_wgrad=True
        )


class Linear(DropIn, nn.Linear):
    """:class:`torch.nn.Linear` with a skip flag.

    Example:
        >>> layer = wus_ext.nn.Linear(16, 4)
        >>> layer.skip_wgrad = True
        >>> layer(torch.randn(2, 16)).mean().backward()
        >>> layer.weight.grad is None, layer.bias.grad.shape
        (True, torch.Size([4]))
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(input, self.weight, self.bias, skip_wgrad=self.skip_wgrad)


def uses_batch_statistics(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the next forward pass of a norm layer normalises with the batch's statistics."""
    if norm.running_mean is None or norm.running_var is None:
        return True
    frozen = getattr(norm, "frozen_statistics", False) and norm.skip_wgrad
    return norm.training and not frozen


def count_batch(norm: nn.modules.batchnorm._BatchNorm) -> float:
    """Counts a batch that updates the running statistics, as stock; returns the momentum."""
    momentum = norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:  # cumulative average
            return 1.0 / float(norm.num_batches_tracked)
    return 0.0 if momentum is None else momentum


class _BatchNorm(DropIn):
    #: In skip steps while training: normalise with the running statistics, which stand still.
    frozen_statistics: bool = False

    def forward(self, input: Tensor) -> Tensor:
        if not self.skip_wgrad:
            return super().forward(input)
        self._check_input_dim(input)
        batch = uses_batch_statistics(self)
        momentum = count_batch(self) if batch else 0.0
        # Statistics that are kept but not tracked any more are used in evaluation only.
        given = not self.training or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if given else None,
            self.running_var if given else None,
            None if self.weight is None else self.weight.detach(),
            self.bias,
            batch,
            momentum,
            self.eps,
        )


class BatchNorm1d(_BatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` with a skip flag: gamma is skipped, beta trains."""


class BatchNorm2d(_BatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` with a skip flag: gamma is skipped, beta trains.

    Batch statistics and running statistics are stock's in skip steps too.
    """


class BatchNorm3d(_BatchNorm, nn.BatchNorm3d):
    """:class:`torch.nn.BatchNorm3d` with a skip flag: gamma is skipped, beta trains."""


class GroupNorm(DropIn, nn.GroupNorm):
    """:class:`torch.nn.GroupNorm` with a skip flag: gamma is skipped, beta trains."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.skip_wgrad or self.weight is None:
            return super().forward(input)
        return F.group_norm(input, self.num_groups, self.weight.detach(), self.bias, self.eps)


class LayerNorm(DropIn, nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` with a skip flag: gamma is skipped, beta trains."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.skip_wgrad or self.weight is None:
            return super().forward(input)
        weight = self.weight.detach()
        return F.layer_norm(input, self.normalized_shape, weight, self.bias, self.eps)


#: Stock class -> drop-in class.
DROP_INS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv2d: Conv2d,
    nn.Linear: Linear,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
}
