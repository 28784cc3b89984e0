"""The CPU's depthwise and 1x1 convolutions against PyTorch's own, layer by layer.

    python benchmarks/mobile.py --batch 8

Stock means oneDNN's convolution on channels_last maps, and stock's batch norm and ReLU6 around it.
The layers are those of MobileNetV2, MNASNet, EfficientNet-B0 and ResNet-50 on images of 224 pixels.
Both sides take turns in one run; results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import machine, median_ms, table

import wus_ext  # noqa: F401  (registers torch.ops.wus)
from wus_ext.profiling.timing import interleaved

ops = torch.ops.wus
aten = torch.ops.aten

#: (channels, height = width, kernel, stride)
DEPTHWISE = [
    (32, 112, 3, 1),
    (96, 112, 3, 2),
    (144, 56, 3, 1),
    (144, 56, 3, 2),
    (144, 56, 5, 2),
    (192, 28, 3, 1),
    (192, 28, 3, 2),
    (240, 28, 5, 1),
    (384, 14, 3, 1),
    (480, 14, 5, 1),
    (576, 14, 3, 2),
    (672, 14, 5, 2),
    (960, 7, 3, 1),
    (1152, 7, 5, 1),
]
#: (inputs, outputs, height = width)
POINTWISE = [
    (32, 16, 112),
    (16, 96, 112),
    (96, 24, 56),
    (24, 144, 56),
    (144, 32, 28),
    (32, 192, 28),
    (64, 384, 14),
    (384, 96, 14),
    (160, 960, 7),
    (960, 320, 7),
    (64, 256, 56),
    (256, 128, 56),
    (512, 128, 28),
    (256, 1024, 14),
    (512, 2048, 7),
]
RELU6 = 2


def new(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)


class Layer:
    """A convolution by stock and by our operators, which take the same surroundings."""

    def __init__(self, x: torch.Tensor, weight: torch.Tensor, stride: int, groups: int) -> None:
        padding = weight.size(2) // 2
        self.x, self.weight, self.groups = x, weight, groups
        self.window = [stride] * 2, [padding] * 2
        if groups == 1:
            self.packed, self.transposed = (ops.pointwise_pack(weight, d) for d in (0, 1))

    def stock(self) -> torch.Tensor:
        return aten.conv2d(self.x, self.weight, None, *self.window, [1, 1], self.groups)

    def stock_backward(self, g: torch.Tensor, input: bool, weight: bool) -> tuple:
        mask = [input, weight, False]
        rest = (*self.window, [1, 1], False, [0, 0], self.groups, mask)
        return aten.convolution_backward(g, self.x, self.weight, None, *rest)[:2]

    def _forward(self, depthwise: Any, pointwise: Any) -> tuple:
        if self.groups > 1:
            return depthwise(self.x, self.weight, None, *self.window)
        return pointwise(self.x, self.packed, None, self.weight.size(0))

    def forward(self) -> tuple:
        return self._forward(ops.depthwise_forward, ops.pointwise_forward)

    def stats(self) -> tuple:
        return self._forward(ops.depthwise_forward_stats, ops.pointwise_forward_stats)

    def backward(self, g: torch.Tensor, input: bool, weight: bool, **options: object) -> tuple:
        x = self.x if weight else None
        if self.groups > 1:
            size = list(self.x.shape[2:])
            options["need_grad_input"] = input
            grads = ops.depthwise_backward(g, self.weight, x, size, *self.window, **options)
        else:
            packed = self.transposed if input else None
            grads = ops.pointwise_backward(g, packed, x, self.x.size(1), **options)
        return grads[0] if input else None, grads[1] if weight else None


def steps(layer: Layer) -> dict[str, tuple[Callable[[], tuple], Callable[[], tuple]]]:
    """Stock's and our way, by what they compute; both return the tensors to compare."""
    outputs = layer.weight.size(0)
    gamma, beta = torch.rand(outputs) + 0.5, torch.randn(outputs)

    def stock_norm(z: torch.Tensor) -> tuple:
        return aten.native_batch_norm(z, gamma, beta, None, None, True, 0.1, 1e-5)

    def ours_norm() -> tuple:
        z, mean, var = layer.stats()
        scale, shift, invstd = ops.batch_norm_scale_shift(mean, var, gamma, beta, 1e-5)
        return z, mean, invstd, *ops.batch_norm_apply(z, scale, shift, None, RELU6)

    z, mean, invstd, y, mask = ours_norm()  # y for both: within rounding of 0 and 6 slopes differ
    g = torch.randn_like(z)

    def stock_chain_backward(weight: bool) -> tuple:
        passed = aten.hardtanh_backward(g, y, 0, 6)
        grad, _, grad_beta = aten.native_batch_norm_backward(
            passed, z, gamma, None, None, mean, invstd, True, 1e-5, [True, False, True]
        )
        return *layer.stock_backward(grad, True, weight), grad_beta

    def ours_chain_backward(weight: bool) -> tuple:
        *abc, grad_beta, _ = ops.batch_norm_grad_coefficients(
            g, z, mean, invstd, gamma, mask, act=RELU6
        )
        through = {"mask": mask, "z": z, "batch_norm": torch.stack(abc), "act": RELU6}
        return *layer.backward(g, True, weight, **through), grad_beta

    return {
        "forward": (lambda: (layer.stock(),), lambda: layer.forward()[:1]),
        "dgrad": (
            partial(layer.stock_backward, g, True, False),
            partial(layer.backward, g, True, False),
        ),
        "wgrad": (
            partial(layer.stock_backward, g, False, True),
            partial(layer.backward, g, False, True),
        ),
        "both": (
            partial(layer.stock_backward, g, True, True),
            partial(layer.backward, g, True, True),
        ),
        "norm, ReLU6": (
            lambda: (F.hardtanh_(stock_norm(layer.stock())[0], 0, 6),),
            lambda: ours_norm()[3:4],
        ),
        "skip backward": (lambda: stock_chain_backward(False), lambda: ours_chain_backward(False)),
        "full backward": (lambda: stock_chain_backward(True), lambda: ours_chain_backward(True)),
    }


def layers(batch: int, kinds: list[str]) -> list[tuple[str, Callable[[], Layer]]]:
    def depthwise(channels: int, size: int, kernel: int, stride: int) -> Layer:
        weight = torch.randn(channels, 1, kernel, kernel) / kernel
        return Layer(new(batch, channels, size, size), weight, stride, channels)

    def pointwise(inputs: int, outputs: int, size: int) -> Layer:
        weight = new(outputs, inputs, 1, 1) / inputs**0.5
        return Layer(new(batch, inputs, size, size), weight, 1, 1)

    made: list[tuple[str, Callable[[], Layer]]] = []
    if "depthwise" in kinds:
        made += [
            (f"{c}@{n} {k}x{k} /{s}", partial(depthwise, c, n, k, s)) for c, n, k, s in DEPTHWISE
        ]
    if "pointwise" in kinds:
        made += [(f"{c}-{k}@{n}", partial(pointwise, c, k, n)) for c, k, n in POINTWISE]
    return made


def check(name: str, stock: tuple, ours: tuple) -> None:
    for expected, actual in zip(stock, ours, strict=True):
        if expected is not None and actual is not None:
            error = (actual - expected).norm() / expected.norm()
            assert error < 1e-5, f"{name}: relative error {error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    kinds = ["depthwise", "pointwise"]
    parser.add_argument("--kinds", nargs="+", default=kinds, choices=kinds)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(
        f"{machine()}, batch {args.batch}, medians of {args.rounds} rounds, stock -> ours in ms\n"
    )
    rows, header = [], []
    with torch.inference_mode():
        for name, make in layers(args.batch, args.kinds):
            variants = steps(make())
            header, row = ["layer", *variants], [name]
            for step, (stock, ours) in variants.items():
                check(f"{name}, {step}", stock(), ours())
                seconds = interleaved({"stock": stock, "ours": ours}, args.rounds)
                before, after = median_ms(seconds["stock"]), median_ms(seconds["ours"])
                row.append(f"{before:.2f} -> {after:.2f} ({after / before:.2f})")
            rows.append(row)
    print(table(header, rows))


if __name__ == "__main__":
    main()
