"""Times the element-wise CPU kernels against the stock operators they replace and against a copy.

Each line is one shape: medians in milliseconds of interleaved runs, stock -> ours, and the share of
this machine's copy bandwidth that ours reaches (1.00: as fast as memory allows; more: in cache).

    python benchmarks/pointwise.py --batch 64 --repeats 15
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

import wus_ext

ops = torch.ops.wus
MAPS = [(64, 32), (128, 16), (256, 8), (512, 4), (512, 2)]


def interleaved(variants: dict, repeats: int) -> dict[str, float]:
    times = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(repeats):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: statistics.median(t) for name, t in times.items()}


def cases(batch: int, channels: int, size: int) -> dict:
    """name -> (stock, ours, elements read and written by ours, in float32)."""

    def new(h=size):
        x = torch.randn(batch, channels, h, h)
        return x.contiguous(memory_format=torch.channels_last)

    x, g, pooled_g = new(), new(), new(size // 2)
    weight, bias = torch.ones(channels), torch.zeros(channels)
    y, mask = ops.activate(x)
    _, code = ops.relu_max_pool(x)
    pooled, index = F.max_pool2d(x, 2, return_indices=True)
    mean, var = ops.batch_norm_stats(x)
    scale, shift, invstd = ops.batch_norm_scale_shift(mean, var, weight, bias, 1e-5)
    stock_norm = torch.ops.aten.native_batch_norm
    stock_norm_backward = torch.ops.aten.native_batch_norm_backward
    n = x.numel()

    def norm():
        _, s, t, _ = ops.batch_norm_train(x, weight, bias, None, None, 0.1, 1e-5)
        return ops.batch_norm_apply(x, s, t, None, 3)

    def norm_backward():
        own = g, x, mean, invstd, weight
        a, b, c0, *_ = ops.batch_norm_grad_coefficients(*own, None, scale, shift, 3)
        return ops.batch_norm_grad_input(g, x, a, b, c0, None, scale, shift, 3)

    def stock_norm_relu_backward():
        dy = torch.ops.aten.threshold_backward(g, y, 0)
        return stock_norm_backward(
            dy, x, weight, None, None, mean, invstd, True, 1e-5, [True, False, True]
        )

    def stock_pool_backward():
        dy = torch.ops.aten.threshold_backward(pooled_g, pooled, 0)
        dx = torch.ops.aten.max_pool2d_with_indices_backward(
            dy, x, [2, 2], [2, 2], [0, 0], [1, 1], False, index
        )
        return dx, dx.sum((0, 2, 3))

    return {
        "relu": (x.relu, lambda: ops.activate(x), 2 * n),
        "relu backward + bias": (
            lambda: torch.ops.aten.threshold_backward(g, y, 0).sum((0, 2, 3)),
            lambda: ops.activate_grad(g, mask),
            2 * n,
        ),
        "relu backward, bias only": (
            lambda: torch.ops.aten.threshold_backward(g, y, 0).sum((0, 2, 3)),
            lambda: ops.activate_grad(g, mask, need_grad_input=False),
            n,
        ),
        "relu + pool": (
            lambda: F.max_pool2d(x.relu(), 2, return_indices=True),
            lambda: ops.relu_max_pool(x),
            1.3 * n,
        ),
        "relu + pool backward + bias": (
            stock_pool_backward,
            lambda: ops.max_pool_bias_grad(pooled_g, code, (size, size)),
            1.3 * n,
        ),
        "dropout": (lambda: F.dropout(x, 0.5), lambda: ops.dropout_mask(x, 0.5), 4 * n),
        "norm + relu": (
            lambda: stock_norm(x, weight, bias, None, None, True, 0.1, 1e-5)[0].relu(),
            norm,
            3 * n,
        ),
        "norm + relu backward": (stock_norm_relu_backward, norm_backward, 5 * n),
        "average pool": (lambda: F.adaptive_avg_pool2d(x, 1), lambda: x.mean((2, 3)), n),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"{wus_ext.build_info()}, {args.threads} threads")
    for batch in args.batch:
        for channels, size in MAPS:
            n = batch * channels * size * size
            source, target = torch.randn(n), torch.empty(n)
            for name, (stock, ours, traffic) in cases(batch, channels, size).items():
                runs = {"copy": lambda a=source, b=target: b.copy_(a), "stock": stock, "ours": ours}
                ms = interleaved(runs, args.repeats)
                floor = ms["copy"] * traffic / (2 * n)
                print(
                    f"B{batch} {channels}@{size} {name:28} "
                    f"{ms['stock']:8.3f} -> {ms['ours']:8.3f}  {floor / ms['ours']:.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
