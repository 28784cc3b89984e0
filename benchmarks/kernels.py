"""Time of the element-wise kernels against the stock operators they replace and against a copy.

    python benchmarks/kernels.py                                      # CPU, float32
    python benchmarks/kernels.py --device cuda --dtypes bfloat16 float32 --batch-size 512

Medians of interleaved rounds on the feature maps of a CIFAR VGG. "of copy" is the bandwidth that
the kernel reaches, as a part of what a copy of the same map reaches in the same rounds. Results are
checked against stock before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import machine, table

import wus_ext  # noqa: F401  (registers torch.ops.wus)
from wus_ext.profiling.timing import spread

ops = torch.ops.wus
aten = torch.ops.aten
MAPS = [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)]
KERNELS = [
    "activate",
    "activate, sum",
    "apply_mask",
    "activate_grad",
    "activate_grad, sum only",
    "relu_max_pool",
    "max_pool_bias_grad",
    "bias, ReLU, mask",
    "batch norm, ReLU",
    "batch norm, ReLU, backward",
]


@dataclass
class Case:
    """Both callables return the tensors to compare: all but sums and norms are equal exactly."""

    name: str
    stock: Callable[[], tuple]
    ours: Callable[[], tuple]
    bytes: float  # read and written by ours


def cases(batch: int, channels: int, size: int, dtype: torch.dtype, device: str) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def new(extent: int) -> torch.Tensor:
        x = torch.randn(batch, channels, extent, extent, generator=generator)
        return x.to(device, dtype).contiguous(memory_format=torch.channels_last)

    x, z, g, pooled_g = new(size), new(size), new(size), new(size // 2)
    y, mask = ops.activate(x)
    _, code = ops.relu_max_pool(x)
    index = F.max_pool2d(y, 2, return_indices=True)[1]
    full, bits = x.numel() * x.element_size(), x.numel() / 8
    pooled = full / 4 + x.numel() / 4

    def blocked(gradient):
        return aten.threshold_backward(gradient, y, 0)

    def with_bias(gradient):
        return gradient, gradient.sum((0, 2, 3))

    def unpool():
        return aten.max_pool2d_with_indices_backward(
            pooled_g, y, [2, 2], [2, 2], [0, 0], [1, 1], False, index
        )

    yield Case("activate", lambda: (x.relu(),), lambda: ops.activate(x)[:1], 2 * full + bits)
    yield Case(
        "activate, sum",
        lambda: ((x + z).relu(),),
        lambda: ops.activate(x, z)[:1],
        3 * full + bits,
    )
    yield Case(
        "apply_mask",
        lambda: (blocked(g),),
        lambda: (ops.apply_mask(g, mask),),
        2 * full + bits,
    )
    yield Case(
        "activate_grad",
        lambda: with_bias(blocked(g)),
        lambda: ops.activate_grad(g, mask),
        2 * full + bits,
    )
    yield Case(
        "activate_grad, sum only",
        lambda: (None, with_bias(blocked(g))[1]),
        lambda: (None, ops.activate_grad(g, mask, need_grad_input=False)[1]),
        full + bits,
    )
    yield Case(
        "relu_max_pool",
        lambda: (F.max_pool2d(x.relu(), 2, return_indices=True)[0],),
        lambda: ops.relu_max_pool(x)[:1],
        full + pooled,
    )
    yield Case(
        "max_pool_bias_grad",
        lambda: with_bias(blocked(unpool())),
        lambda: ops.max_pool_bias_grad(pooled_g, code, (size, size)),
        full + pooled,
    )
    yield from norm_cases(x, g, full, bits)


def norm_cases(x: torch.Tensor, g: torch.Tensor, full: float, bits: float) -> Iterator[Case]:
    channels = x.size(1)
    bias, weight = (torch.rand(channels, device=x.device) + 0.5 for _ in range(2))
    running = torch.zeros(channels, device=x.device), torch.ones(channels, device=x.device)
    low = bias.to(x.dtype).view(-1, 1, 1)
    yield Case(
        "bias, ReLU, mask",
        lambda: ((x + low).relu(),),
        lambda: ops.batch_norm_apply(x, None, low.flatten().float(), None, 1)[:1],
        2 * full + bits,
    )

    def forward():
        mean, scale, shift, invstd = ops.batch_norm_train(x, weight, bias, *running, 0.1, 1e-5)
        return mean, invstd, *ops.batch_norm_apply(x, scale, shift, None, 1)

    def stock_forward():
        return aten.native_batch_norm(x, weight, bias, *running, True, 0.1, 1e-5)

    yield Case(
        "batch norm, ReLU",
        lambda: (stock_forward()[0].relu(),),
        lambda: (forward()[2],),
        3 * full + bits,
    )
    mean, invstd, y, mask = forward()

    def backward():
        *abc, grad_bias, _ = ops.batch_norm_grad_coefficients(
            g, x, mean, invstd, weight, mask, act=1
        )
        return ops.batch_norm_grad_input(g, x, *abc, mask, act=1)[0], grad_bias

    def stock_backward():
        blocked = aten.threshold_backward(g, y, 0)
        grads = aten.native_batch_norm_backward(
            blocked, x, weight, *running, mean, invstd, True, 1e-5, [True, False, True]
        )
        return grads[0], grads[2]

    yield Case("batch norm, ReLU, backward", stock_backward, backward, 5 * full + 2 * bits)


def check(case: Case) -> None:
    for position, (ours, stock) in enumerate(zip(case.ours(), case.stock(), strict=True)):
        if ours is None:
            continue
        near = {"rtol": 0.0, "atol": 0.0}
        if position == 1:  # a sum: added in another order, ours is float32
            near = {"rtol": 2 * torch.finfo(stock.dtype).eps, "atol": 1e-2}
        elif case.name.startswith("batch norm"):
            near = {"rtol": 2 * torch.finfo(stock.dtype).eps, "atol": 1e-5}
        ours = ours.to(stock.dtype)
        torch.testing.assert_close(ours, stock, **near, msg=lambda m: f"{case.name}: {m}")


def seconds(run: Callable[[], object], device: str, calls: int) -> float:
    """Of one call. On a GPU the calls queue up behind a pause: it never waits for the host."""
    if device == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(400_000 * calls)
    start.record()
    for _ in range(calls):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def measure(case: Case, x: torch.Tensor, args: argparse.Namespace) -> list[str]:
    check(case)
    target = torch.empty_like(x)
    variants = {"copy": lambda: target.copy_(x), "stock": case.stock, "ours": case.ours}
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.rounds):
        for name, run in variants.items():
            times[name].append(seconds(run, args.device, args.calls))
    copy, stock, ours = (statistics.median(times[name]) for name in variants)
    copied = 2 * x.numel() * x.element_size()
    return [
        f"{stock * 1e6:.1f}",
        f"{ours * 1e6:.1f} ± {spread(times['ours']):.0%}",
        f"{stock / ours:.2f}",
        f"{case.bytes / ours / 1e9:.0f}",
        f"{case.bytes / ours / (copied / copy):.0%}",
    ]


def ceilings(device: str) -> str:
    """What the machine does at best: a copy of a large block, a product of large matrices."""
    size, side = (2**30, 8192) if device == "cuda" else (2**26, 512)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    times = {}
    for name, run in {"copy": lambda: target.copy_(source), "product": lambda: a @ b}.items():
        run()
        times[name] = statistics.median(seconds(run, device, 5) for _ in range(5))
    copied, computed = 2 * size / times["copy"] / 1e9, 2 * side**3 / times["product"] / 1e12
    kind = str(dtype).removeprefix("torch.")
    return f"copy {copied:.0f} GB/s, {kind} product {computed:.1f} TFLOP/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=5, help="calls in a row that are timed as one")
    args = parser.parse_args()
    rows = []
    for dtype in args.dtypes:
        for channels, size in MAPS:
            shape = (args.batch_size, channels, size, size)
            x = torch.randn(shape).to(args.device, getattr(torch, dtype))
            x = x.contiguous(memory_format=torch.channels_last)
            for case in cases(*shape[:3], x.dtype, args.device):
                if case.name in args.kernels:
                    line = measure(case, x, args)
                    rows.append([case.name, f"{channels}@{size}", dtype, *line])
    header = ["kernel", "map", "dtype", "stock µs", "ours µs", "stock / ours", "GB/s", "of copy"]
    print(
        f"{machine()}, batch {args.batch_size}, {args.rounds} rounds of {args.calls} calls; "
        f"{ceilings(args.device)}\n"
    )
    print(table(header, rows))


if __name__ == "__main__":
    main()
