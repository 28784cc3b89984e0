"""Products that mask a gradient for the layer below and sum it for that layer's bias, on a GPU.

    python benchmarks/epilogues.py
    python benchmarks/epilogues.py --dtypes bfloat16 float32 --batch-sizes 512 128

For each shape of the networks' layers: whether cuDNN (convolutions) and cuBLASLt (linear layers,
forward and backward) have such a kernel, whether it gives what two passes give, whether it gives
the same bits again, and the time of both, in medians of interleaved rounds. The exit status is 1 if
any result is wrong. With CUDNN_FRONTEND_LOG_INFO=1 CUDNN_FRONTEND_LOG_FILE=stderr in front it says
why cuDNN refuses a shape.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from common import machine, table
from kernels import seconds

import wus_ext
from wus_ext.engine.conv.algorithm import Direct
from wus_ext.engine.conv.geometry import Geometry
from wus_ext.engine.gpu.tuning import agree
from wus_ext.engine.linear import Products
from wus_ext.profiling.timing import spread

ops = torch.ops.wus
#: Channels and pixels of convolutions that follow one without pooling: VGG and ResNet.
CONVS = [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)]
#: Features in, out and of the layer above: AlexNet's, and ones in eights throughout.
LINEARS = [(1024, 4096, 4096), (4096, 4096, 10), (4096, 4096, 1000), (512, 512, 128)]


@dataclass
class Case:
    name: str
    exists: Callable[[], bool]
    two_passes: Callable[[], tuple]
    one_kernel: Callable[[], tuple]


def conv(channels: int, size: int, batch: int, dtype: torch.dtype) -> Iterator[Case]:
    def new(*shape: int) -> torch.Tensor:
        x = torch.randn(shape, device="cuda").to(dtype)
        return x.contiguous(memory_format=torch.channels_last)

    grad = new(batch, channels, size, size)
    weight = new(channels, channels, 3, 3) / (3 * channels**0.5)
    _, mask = ops.activate(new(batch, channels, size, size))
    numbers = ((size, size), (1, 1), (1, 1))
    three, one = (3, 3), (1, 1)
    geometry = Geometry(channels, channels, three, one, one, one, 1, (size, size), (size, size))
    direct = Direct(geometry, weight)
    two_passes = partial(two, direct, grad, mask)

    def sum_apart() -> tuple:
        grad_input, _ = ops.conv_dgrad_relu(grad, weight, mask, *numbers, False, True)
        return grad_input, ops.activate_grad(grad_input, act=0)[1]

    yield Case(
        f"cuDNN {channels}@{size}, all in one",
        lambda: ops.conv_dgrad_relu_exists(grad, weight, *numbers, True, True),
        two_passes,
        lambda: ops.conv_dgrad_relu(grad, weight, mask, *numbers, True, True),
    )
    yield Case(
        f"cuDNN {channels}@{size}, sum apart",
        lambda: ops.conv_dgrad_relu_exists(grad, weight, *numbers, False, True),
        two_passes,
        sum_apart,
    )


def two(layer: Direct | Products, grad: torch.Tensor, mask: torch.Tensor) -> tuple:
    return ops.activate_grad(layer.dgrad(grad), mask)


def linear(features: tuple[int, int, int], batch: int, dtype: torch.dtype) -> Iterator[Case]:
    def new(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda").to(dtype)

    inputs, outputs, above = features
    x, grad, bias = new(batch, inputs), new(batch, above), new(outputs)
    below = Products(new(outputs, inputs) / inputs**0.5)
    top = Products(new(above, outputs) / above**0.5)

    def exists() -> bool:
        return ops.linear_epilogues_exist(x, outputs, above, True)

    name = f"{inputs}-{outputs}-{above}"
    yield Case(
        f"cuBLASLt forward {name}",
        exists,
        lambda: ops.activate_(below.forward(x, bias))[:1],
        lambda: ops.linear_relu_aux(x, below.weight, bias, True)[:1],
    )
    if not exists():
        return
    # Both masks of the same ReLU: rounding next to zero must not decide between them.
    output, aux = ops.linear_relu_aux(x, below.weight, bias, True)
    _, mask = ops.activate(output)
    yield Case(
        f"cuBLASLt backward {name}",
        exists,
        partial(two, top, grad, mask),
        lambda: ops.linear_drelu_bgrad(grad, top.weight, aux, True),
    )


def cases(batch: int, dtype: torch.dtype) -> Iterator[Case]:
    if wus_ext.build_info()["cudnn_frontend"] is None:
        print("cuDNN: not part of this build (no headers of cudnn-frontend)")
    else:
        for channels, size in CONVS:
            yield from conv(channels, size, batch, dtype)
    for features in LINEARS:
        yield from linear(features, batch, dtype)


def measure(case: Case, args: argparse.Namespace) -> list[str]:
    """The verdict, and times of both ways where there are two."""
    if not case.exists():
        return ["no kernel", "-", "-", "-"]
    ours, theirs = case.one_kernel(), case.two_passes()
    ways = {"two": case.two_passes, "one": case.one_kernel}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, run in ways.items():
            times[name].append(seconds(run, "cuda", args.calls))
    two, one = (statistics.median(times[name]) for name in ways)
    verdict = "right" if agree(ours, theirs) else "WRONG"
    if not all(map(torch.equal, case.one_kernel(), ours)):
        verdict += ", other bits each time"
    shown = f"{one * 1e6:.1f} ± {spread(times['one']):.0%}"
    return [verdict, f"{two * 1e6:.1f}", shown, f"{two / one:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[512, 128])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=10, help="calls in a row, timed as one")
    args = parser.parse_args()
    if not torch.cuda.is_available() or wus_ext.build_info()["cuda"] is None:
        sys.exit("needs a GPU and a build with CUDA")
    torch.backends.cuda.matmul.allow_tf32 = True
    rows = []
    for dtype in args.dtypes:
        for batch in args.batch_sizes:
            for case in cases(batch, getattr(torch, dtype)):
                try:
                    line = measure(case, args)
                except RuntimeError as error:  # the other cases' figures must not be lost
                    line = [f"FAILED: {error}".splitlines()[0], "-", "-", "-"]
                rows.append([case.name, dtype, str(batch), *line])
    print(f"{machine()}, {args.rounds} rounds of {args.calls} calls; float32 with TF32\n")
    header = ["kernel", "dtype", "batch", "result", "two passes µs", "one µs", "two / one"]
    print(table(header, rows))
    if any("WRONG" in row[3] or "FAILED" in row[3] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
