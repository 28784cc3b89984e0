"""Drop-in layers: torch.nn's own, with the attributes ``skip_wgrad`` and ``skip_biases``.

Same constructors, inputs, outputs, errors, parameters and ``state_dict`` keys. While ``skip_wgrad``
is False (the default) a layer is stock PyTorch bit for bit; while it is True the layer's weight is
a constant: its gradient is not computed (``weight.grad`` stays what it was) and nothing is saved
for it, while the bias trains, unless ``skip_biases`` (default False) makes it a constant too. Both
are read in each forward pass; backward follows what forward decided. A weight with
``requires_grad=False`` is such a constant at any time.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from . import functional
from ._build import deferral
from ._torch import in_a_transform, is_traced

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "GroupNorm",
    "LayerNorm",
    "Linear",
    "RMSNorm",
]


class _Inside(threading.local):
    """Whether this thread runs a converted model's code, which reads constants in a skip step.

    Outside, in a training loop for one, parameters are themselves.
    """

    active: bool = False


inside = _Inside()


@functools.cache
def is_bias(name: str) -> bool:
    """Whether a parameter of this name trains in a skip step: ``bias``, ``in_proj_bias``, ..."""
    return "bias" in name.rsplit(".", 1)[-1].split("_")


def is_frozen(layer: nn.Module) -> bool:
    """Whether a layer's weight is at ``requires_grad=False`` and runs as in a skip step for that.

    Stock's operators run for it where ours are not known (``torch.func``, forward-mode AD), where
    they would be recorded (``torch.compile``, ``torch.export``, ``torch.jit.trace``) and where no
    gradient is asked for.
    """
    weight = layer._parameters.get("weight")
    return (
        weight is not None
        and not weight.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and type(weight) in (Tensor, nn.Parameter)
        and weight.is_floating_point()
        and weight.device.type in ("cpu", "cuda")
        and not is_traced()
        and not in_a_transform()
    )


if TYPE_CHECKING:  # the layers that mixins are mixed in with
    _StockModule = nn.Module
    _StockConv = nn.modules.conv._ConvNd
    _StockConvTranspose = nn.modules.conv._ConvTransposeNd
    _StockBatchNorm = nn.modules.batchnorm._BatchNorm
else:
    _StockModule = _StockConv = _StockConvTranspose = _StockBatchNorm = object


class SkipLayer(_StockModule):
    """Mixin of every layer that can leave its weight gradients out."""

    #: Read in each forward; backward follows what forward decided.
    skip_wgrad: bool = False
    #: With ``skip_wgrad``: the bias gets no gradient either.
    skip_biases: bool = False

    def __getattr__(self, name: str) -> Any:
        value: Any = super().__getattr__(name)
        return self._as_read(name, value) if self.skip_wgrad else value

    def _as_read(self, name: str, value: Any) -> Any:
        """An attribute in a skip step: a constant where it is a parameter that stands still."""
        if (
            value is not None
            and name in self._parameters
            and (self.skip_biases or not is_bias(name))
            and not torch.compiler.is_compiling()
            and inside.active
        ):
            return value.detach()
        return value


class DropIn(SkipLayer):
    """Mixin of the layers here."""

    def __getattr__(self, name: str) -> Any:
        value: Any = nn.Module.__getattr__(self, name)
        return self._as_read(name, value) if self.skip_wgrad else value

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        # torch.fx takes torch.nn's own layers for leaves, and so it should take these.
        if args and isinstance(args[0], fx.Proxy):
            tracer: Any = args[0].tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)
        return super()._call_impl(*args, **kwargs)

    def _constant(self, bias: Tensor | None) -> Tensor | None:
        """The bias of a skip step."""
        return bias.detach() if self.skip_biases and bias is not None else bias


class _Conv(DropIn, _StockConv):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not (self.skip_wgrad or is_frozen(self)):
            return super()._conv_forward(input, weight, bias)
        padding: functional.Sizes | str = self.padding
        if self.padding_mode != "zeros":
            input = functional.pad(input, self._reversed_padding_repeated_twice, self.padding_mode)
            padding = 0
        convolve = getattr(functional, f"conv{len(self.stride)}d")
        bias = self._constant(bias)
        return convolve(
            input, weight, bias, self.stride, padding, self.dilation, self.groups, skip_wgrad=True
        )


def engine_of_call(layer: nn.Module) -> Any | None:
    """The engine of the forward pass that this thread is in, if the layer may defer in it.

    A forward hook may do to the layer what torch does not see: free its weight, for one.
    """
    if torch.compiler.is_compiling() or layer._forward_hooks:
        return None
    return deferral.engine()


def own_parameters(layer: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """A layer's weight and bias, faster than by its attributes; None: those are something else."""
    parameters = layer._parameters
    if torch.compiler.is_compiling() or "bias" not in parameters:
        return None
    weight = parameters.get("weight")
    return None if weight is None else (weight, parameters["bias"])


class Conv1d(_Conv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with a skip flag; every ``padding_mode`` included."""


class Conv2d(_Conv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with a skip flag; every ``padding_mode`` included.

    Example:
        >>> layer = wus_ext.nn.Conv2d(3, 8, 3, padding=1)
        >>> layer.skip_wgrad = True
        >>> layer(torch.randn(2, 3, 32, 32)).mean().backward()
        >>> layer.weight.grad is None, layer.bias.grad.shape
        (True, torch.Size([8]))
    """

    def forward(self, input: Tensor) -> Tensor:
        if (engine := engine_of_call(self)) is not None:
            output: Tensor | None = engine.convolve(self, input)
            if output is not None:
                return output
        own = own_parameters(self)
        return super().forward(input) if own is None else self._conv_forward(input, *own)


class Conv3d(_Conv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with a skip flag; every ``padding_mode`` included."""


class _ConvTranspose(DropIn, _StockConvTranspose):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        if not (self.skip_wgrad or is_frozen(self)):
            return super().forward(input, output_size)
        dims = len(self.stride)
        stock: Any = self  # whose annotations say lists
        output_padding = stock._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, dims, self.dilation
        )
        return getattr(functional, f"conv_transpose{dims}d")(
            input,
            self.weight,
            self._constant(self.bias),
            self.stride,
            self.padding,
            output_padding,
            self.groups,
            self.dilation,
            skip_wgrad=True,
        )


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """:class:`torch.nn.ConvTranspose1d` with a skip flag."""


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with a skip flag."""


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """:class:`torch.nn.ConvTranspose3d` with a skip flag."""


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
        if (engine := engine_of_call(self)) is not None:
            output = engine.multiply(self, input)
            if output is not None:
                return output
        if not self.skip_wgrad:
            own = own_parameters(self)
            return super().forward(input) if own is None else F.linear(input, *own)
        return functional.linear(input, self.weight, self._constant(self.bias), skip_wgrad=True)


def uses_batch_statistics(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    """Whether the next forward pass of a norm layer normalises with the batch's statistics."""
    if norm.running_mean is None or norm.running_var is None:
        return True
    frozen = getattr(norm, "frozen_statistics", False) and norm.skip_wgrad
    return norm.training and not frozen


def count_batch(norm: nn.modules.batchnorm._BatchNorm) -> float:
    """Counts a batch that updates the running statistics, as stock; returns the momentum."""
    momentum, batches = norm.momentum, norm.num_batches_tracked
    if norm.training and norm.track_running_stats and batches is not None:
        batches.add_(1)
        if momentum is None:  # cumulative average
            return 1.0 / float(batches)
    return 0.0 if momentum is None else momentum


#: A batch norm's parameters and buffers.
AFFINE, RUNNING = {"weight", "bias"}, {"running_mean", "running_var", "num_batches_tracked"}


class _BatchNorm(DropIn, _StockBatchNorm):
    #: In skip steps while training: normalise with the running statistics, which stand still.
    frozen_statistics: bool = False

    def forward(self, input: Tensor) -> Tensor:
        joins = not torch.compiler.is_compiling() and deferral.is_deferred(input)
        engine = None if joins else engine_of_call(self)
        begins = engine is not None and engine.normalises(self, input)
        if joins or begins:
            output = self._append(input, begins)
            if output is not None:
                return output
        if not self.skip_wgrad:
            own = None if self.training else own_parameters(self)
            mean, var = self._buffers.get("running_mean"), self._buffers.get("running_var")
            if own is None or mean is None or var is None:
                return super().forward(input)
            self._check_input_dim(input)
            return F.batch_norm(input, mean, var, *own, eps=self.eps)
        self._check_input_dim(input)
        batch = uses_batch_statistics(self)
        momentum = count_batch(self) if batch else 0.0
        # A batch's own statistics leave those alone that are kept but not tracked any more.
        given = not batch or self.track_running_stats
        return F.batch_norm(
            input,
            self.running_mean if given else None,
            self.running_var if given else None,
            None if self.weight is None else self.weight.detach(),
            self._constant(self.bias),
            batch,
            momentum,
            self.eps,
        )

    def _append(self, input: Tensor, begins: bool) -> Tensor | None:
        """Joined to the layer's call that makes `input`, if it can be, or the first of a chain."""
        parameters, buffers = self._parameters, self._buffers
        if not (parameters.keys() >= AFFINE and buffers.keys() >= RUNNING):
            return None  # one of them is something else now, a pruned weight for one
        batch = uses_batch_statistics(self)
        momentum, batches = self.momentum, buffers["num_batches_tracked"]
        if momentum is None:
            momentum = 0.0
            if self.training and self.track_running_stats and batches is not None:
                momentum = 1.0 / (float(batches) + 1.0)
        given = not self.training or self.track_running_stats
        output: Tensor | None = deferral.append_norm(
            input,
            parameters["weight"],
            self._constant(parameters["bias"]),
            buffers["running_mean"] if given else None,
            buffers["running_var"] if given else None,
            batches,
            batch and self.training and self.track_running_stats,
            self.skip_wgrad,
            batch,
            momentum,
            self.eps,
            self if begins else None,
        )
        return output


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
        weight, bias = self.weight.detach(), self._constant(self.bias)
        return F.group_norm(input, self.num_groups, weight, bias, self.eps)


class LayerNorm(DropIn, nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` with a skip flag: gamma is skipped, beta trains."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.skip_wgrad or self.weight is None:
            return super().forward(input)
        weight, bias = self.weight.detach(), self._constant(self.bias)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(DropIn, nn.RMSNorm):
    """:class:`torch.nn.RMSNorm` with a skip flag: gamma, its only parameter, is skipped."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.skip_wgrad or self.weight is None:
            return super().forward(input)
        return F.rms_norm(input, self.normalized_shape, self.weight.detach(), self.eps)


#: Layers whose scale is trained or skipped with ``skip_gamma``.
NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.CrossMapLRN2d,
)

#: Stock class -> drop-in class.
DROP_INS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
    nn.Linear: Linear,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.GroupNorm: GroupNorm,
    nn.LayerNorm: LayerNorm,
    nn.RMSNorm: RMSNorm,
}
