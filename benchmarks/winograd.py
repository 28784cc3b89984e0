"""The CPU's Winograd convolutions against PyTorch's own, layer by layer.

    python benchmarks/winograd.py --batch 64

Direct means oneDNN's convolution on channels_last maps. All variants take turns in one run and are
checked against float64 first. For other instruction sets set ATEN_CPU_CAPABILITY=avx2 and
ONEDNN_MAX_CPU_ISA=AVX2.
"""

from __future__ import annotations

import argparse
import statistics

import torch
import torch.nn.functional as F

import wus_ext
from wus_ext.profiling.timing import interleaved

wus = torch.ops.wus

#: (input channels, output channels, height = width) in VGG-16 and ResNet-18 on 32x32 images.
LAYERS = [
    (64, 64, 32),
    (64, 128, 16),
    (128, 128, 16),
    (128, 256, 8),
    (256, 256, 8),
    (256, 512, 4),
    (512, 512, 4),
    (512, 512, 2),
]
SCHEMES = {0: "2x2 map", 2: "F(2x2)", 4: "F(4x4)"}


def random_map(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error < 6e-6, f"relative error {error}"


def measure(batch: int, inputs: int, outputs: int, size: int, rounds: int) -> None:
    x, g = random_map(batch, inputs, size, size), random_map(batch, outputs, size, size)
    weight, bias = torch.randn(outputs, inputs, 3, 3), torch.randn(outputs)
    dense = weight.to(memory_format=torch.channels_last)
    mask = torch.randint(256, (batch, size, size, outputs // 8), dtype=torch.uint8)
    head_x, head_g = x[:2].double(), g[:2].double()
    expected = F.conv2d(head_x, weight.double(), bias.double(), padding=1)
    expected_grad = F.conv_transpose2d(head_g, weight.double(), padding=1)

    def direct_backward():
        return torch.ops.aten.convolution_backward(
            g, x, dense, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, False, False]
        )

    def forward(packed, scheme, epilogue):
        return wus.winograd_forward(x, packed, bias, outputs, 1, scheme, epilogue)

    def dgrad(packed, scheme, mask=None):
        prologue = 0 if mask is None else 2
        return wus.winograd_dgrad(g, packed, mask, inputs, [size, size], 1, scheme, prologue)

    variants = {
        "direct forward": lambda: F.conv2d(x, dense, bias, padding=1),
        "direct dgrad": direct_backward,
    }
    for scheme in [0] if size <= 2 else [2, 4]:
        packed = wus.winograd_pack(weight, False, scheme)
        turned = wus.winograd_pack(weight, True, scheme)
        check(forward(packed, scheme, 0)[0][:2], expected)
        check(dgrad(turned, scheme)[0][:2], expected_grad)
        name = SCHEMES[scheme]
        variants |= {
            f"{name} forward": lambda p=packed, s=scheme: forward(p, s, 0),
            f"{name} forward, ReLU": lambda p=packed, s=scheme: forward(p, s, 1),
            f"{name} dgrad": lambda p=turned, s=scheme: dgrad(p, s),
            f"{name} dgrad, mask, bias": lambda p=turned, s=scheme: dgrad(p, s, mask),
            f"{name} pack": lambda s=scheme: wus.winograd_pack(weight, False, s),
        }

    medians = {k: statistics.median(v) for k, v in interleaved(variants, rounds).items()}
    print(f"\n{inputs} -> {outputs} channels, {size}x{size}")
    for name, seconds in medians.items():
        base = medians["direct dgrad" if "dgrad" in name else "direct forward"]
        speed = "" if name.endswith("pack") else f"{base / seconds:8.2f}x direct"
        print(f"  {name:26}{seconds * 1e3:9.2f} ms{speed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(
        f"{wus_ext.build_info()['cpu_capability']}, {arguments.threads} threads, "
        f"batch {arguments.batch}, medians of {arguments.rounds} interleaved rounds"
    )
    with torch.inference_mode():
        for inputs, outputs, size in LAYERS:
            measure(arguments.batch, inputs, outputs, size, arguments.rounds)


if __name__ == "__main__":
    main()
