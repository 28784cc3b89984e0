"""Whole training steps on a GPU: stock full and frozen, and skip steps; eager, compiled, recorded.

    python benchmarks/gpu_steps.py                          # bfloat16 autocast, batch 512 and 128
    python benchmarks/gpu_steps.py --models vgg16 --batch-sizes 128 --norm frozen

"fused" is a full step on the skip step's kernels (full="fused"). "graph" replays a CUDA graph of
the whole step. Medians of interleaved rounds, each a few steps; all ratios are to a stock step of
the same run. A variant that fails is named and left out. On the CPU only the eager variants run.
"""

from __future__ import annotations

import argparse
import copy
import signal
import sys
import time
from collections.abc import Callable

import torch
from common import NETWORKS, TrainingStep, batch, freeze, machine, median_ms, table

import wus_ext
from wus_ext.profiling.timing import spread
from wus_ext.training.graphs import CudaGraph


class Step(TrainingStep):
    """A step that does not wait for the GPU."""

    def __call__(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()


def made(name: str, size: int, args: argparse.Namespace) -> dict[str, Callable[[], Step]]:
    """How to make each variant; all start from the same weights."""
    torch.manual_seed(0)
    stock = wus_ext.revert(NETWORKS[name]()).to(args.device, memory_format=torch.channels_last)
    images, labels = batch(size, args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    dtype = None if args.dtype == "float32" else getattr(torch, args.dtype)

    def step(model):
        return Step(model, images, labels, dtype)

    def skip(compiled=False):
        model = wus_ext.convert(copy.deepcopy(stock), norm=args.norm)
        wus_ext.set_skip(model, True)
        return step(torch.compile(model) if compiled else model)

    def fused():
        return step(wus_ext.convert(copy.deepcopy(stock), norm=args.norm, full="fused"))

    variants = {
        "full": lambda: step(copy.deepcopy(stock)),
        "frozen": lambda: step(freeze(copy.deepcopy(stock))),
        "fused": fused,
        "skip": skip,
    }
    if args.device == "cuda" and args.compile:
        variants["full, compiled"] = lambda: step(torch.compile(copy.deepcopy(stock)))
        variants["frozen, compiled"] = lambda: step(torch.compile(freeze(copy.deepcopy(stock))))
        variants["skip, compiled"] = lambda: skip(compiled=True)
    return variants


def check(frozen: Step, skip: Step, norm: str) -> None:
    """A skip step computes what stock's frozen step computes, before anything is timed."""
    losses = []
    for step in (frozen, skip):
        loss = step.loss()
        loss.backward()
        losses.append(loss.item())
    random = any(isinstance(module, torch.nn.Dropout) for module in skip.model.modules())
    if norm == "batch" and not random and abs(losses[0] - losses[1]) > 2e-2 * abs(losses[0]):
        raise SystemExit(f"skip step's loss is {losses[1]}, stock's frozen step's {losses[0]}")
    for name, parameter in skip.model.named_parameters():
        if (parameter.grad is not None) != name.endswith("bias"):
            raise SystemExit(f"{name}: wrong gradient in a skip step")


def prepare(name: str, size: int, args: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Each variant, warmed up, and its recorded form."""
    runs: dict[str, Callable[[], None]] = {}
    steps: dict[str, Step] = {}
    for variant, make in made(name, size, args).items():
        try:
            step = steps[variant] = make()
            for _ in range(3):
                CudaGraph.warm_up(step) if args.device == "cuda" else step()
            runs[variant] = step
            if args.device == "cuda":
                runs[f"{variant}, graph"] = CudaGraph(step).replay
        except Exception as error:  # one variant's failure must not cost the others' figures
            print(f"{name}, {variant} failed: {type(error).__name__}: {error}")
    if {"frozen", "skip"} <= set(steps):
        check(steps["frozen"], steps["skip"], args.norm)
    return runs


def timed(runs: dict[str, Callable[[], None]], args: argparse.Namespace) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {variant: [] for variant in runs}

    def wait() -> None:
        if args.device == "cuda":
            torch.cuda.synchronize()

    for round in range(args.rounds + 1):
        for variant, run in runs.items():
            wait()
            start = time.perf_counter()
            for _ in range(args.calls):
                run()
            wait()
            if round:
                seconds[variant].append((time.perf_counter() - start) / args.calls)
    return seconds


def measure(name: str, size: int, args: argparse.Namespace) -> list[list[str]]:
    seconds = timed(prepare(name, size, args), args)
    rows = []
    for variant, times in seconds.items():
        ratios = [
            f"{median_ms(times) / median_ms(seconds[peer]):.3f}" if peer in seconds else "-"
            for peer in ("full", "frozen", "full, compiled", "full, graph", "full, compiled, graph")
        ]
        shown = f"{median_ms(times):.3f} ± {spread(times):.0%}"
        rows.append([name, str(size), variant, shown, *ratios])
    return rows


HEADER = ["network", "batch", "step", "ms", "/ full", "/ frozen"]
HEADER += ["/ full, compiled", "/ full, graph", "/ full, compiled, graph"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[512, 128])
    parser.add_argument("--device", default="cuda", choices=("cpu", "cuda"))
    parser.add_argument(
        "--dtype", default="bfloat16", choices=("float32", "bfloat16", "float16"), help="autocast's"
    )
    parser.add_argument("--norm", choices=("batch", "frozen"), default="batch")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=5, help="steps in a row, timed as one")
    args = parser.parse_args()
    # Out of time: what was measured so far is shown.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("not finished"))
    rows = []
    try:
        for size in args.batch_sizes:
            for name in args.models:
                rows += measure(name, size, args)
                torch.compiler.reset()
    finally:
        print(f"{machine()}; norm={args.norm}, {args.dtype}, {args.rounds} rounds of {args.calls}")
        print(f"\n{table(HEADER, rows)}")


if __name__ == "__main__":
    main()
