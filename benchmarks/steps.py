"""Time of a skip step against stock PyTorch's full step, in the same run, interleaved medians.

    python benchmarks/steps.py                                   # the four networks, batch 64
    python benchmarks/steps.py --models vgg16 --batch-size 128 --tuned-malloc
    python benchmarks/steps.py --norm frozen --models vgg16_bn resnet18
    python benchmarks/steps.py --compile --models resnet18

Stock runs channels_last and NCHW, and the faster one counts, for full steps and for frozen ones
(torch.compile too, with --compile).
"fused" is a full step on the skip step's kernels (full="fused"), its weights transformed anew each
step: skipping is the rest. "first" is a skip step right after a weight change, packing included.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch
from common import (
    NETWORKS,
    TrainingStep,
    batch,
    freeze,
    machine,
    median_ms,
    table,
    use_tuned_malloc,
)

import wus_ext
from wus_ext.profiling.timing import interleaved, spread


def variants(name: str, args: argparse.Namespace) -> dict[str, TrainingStep]:
    torch.manual_seed(0)
    stock = wus_ext.revert(NETWORKS[name]()).to(args.device)
    images, labels = batch(args.batch_size, args.device)

    def step(model, layout=torch.channels_last):
        return TrainingStep(
            model.to(memory_format=layout), images.contiguous(memory_format=layout), labels
        )

    made = {
        "full, channels_last": step(copy.deepcopy(stock)),
        "full, NCHW": step(copy.deepcopy(stock), torch.contiguous_format),
        "frozen, channels_last": step(freeze(copy.deepcopy(stock))),
        "frozen, NCHW": step(freeze(copy.deepcopy(stock)), torch.contiguous_format),
        "skip": step(
            wus_ext.convert(copy.deepcopy(stock), norm=args.norm, algo=args.algo, fuse=args.fuse)
        ),
    }
    wus_ext.set_skip(made["skip"].model, True)
    if args.compile:
        made["full, compiled"] = step(torch.compile(copy.deepcopy(stock)))
    if args.device == "cpu" and args.fuse:
        made["fused"] = step(
            wus_ext.convert(copy.deepcopy(stock), norm=args.norm, algo=args.algo, full="fused")
        )
    return made


def check(made: dict[str, TrainingStep], norm: str) -> None:
    """Steps compute what stock's compute, before anything is timed."""
    frozen, skip = made["frozen, channels_last"], made["skip"]
    losses = []
    for step in (frozen, skip):
        torch.manual_seed(0)  # the same dropout
        loss = step.loss()
        loss.backward()
        losses.append(loss.item())
    if norm == "batch" and abs(losses[0] - losses[1]) > 1e-3 * abs(losses[0]):
        raise SystemExit(f"skip step's loss is {losses[1]}, stock's frozen step's {losses[0]}")
    for name, parameter in skip.model.named_parameters():
        if (parameter.grad is not None) != name.endswith("bias"):
            raise SystemExit(f"{name}: wrong gradient in a skip step")
    if fused := made.get("fused"):
        torch.manual_seed(0)
        loss = fused.loss()
        loss.backward()
        if abs(losses[0] - loss.item()) > 1e-3 * abs(losses[0]):
            raise SystemExit(f"fused full step's loss is {loss.item()}, stock's {losses[0]}")
        for name, parameter in fused.model.named_parameters():
            if parameter.grad is None:
                raise SystemExit(f"{name}: no gradient in a fused full step")


def first_skip_step(step: TrainingStep, rounds: int) -> list[float]:
    """Seconds of the first skip step of a window, weights packed anew."""
    seconds = []
    for _ in range(rounds):
        wus_ext.set_skip(step.model, False)
        wus_ext.set_skip(step.model, True)
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return seconds


def measure(name: str, args: argparse.Namespace) -> list[str]:
    made = variants(name, args)
    check(made, args.norm)
    seconds = interleaved(made, args.rounds)
    (full, how), (frozen, _) = (
        min((median_ms(s), v.split(", ")[1]) for v, s in seconds.items() if v.startswith(kind))
        for kind in ("full, ", "frozen, ")
    )
    skip = median_ms(seconds["skip"])
    first = median_ms(first_skip_step(made["skip"], 3))
    fused = median_ms(seconds["fused"]) if "fused" in seconds else None
    return [
        name,
        str(args.batch_size),
        f"{full:.1f} ({how})",
        f"{frozen / full:.2f}",
        f"{skip:.1f} ± {spread(seconds['skip']):.0%}",
        f"**{skip / full:.3f}**",
        "-" if fused is None else f"**{fused / full:.3f}**",
        "-" if fused is None else f"{skip / fused:.2f}",
        f"{(first - skip) / full:.2f}",
    ]


HEADER = [
    "network",
    "batch",
    "stock full, ms",
    "frozen / full",
    "skip, ms",
    "skip / full",
    "fused full / full",
    "skip / fused full",
    "(first - skip) / full",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--norm", choices=("batch", "frozen"), default="batch")
    parser.add_argument("--algo", choices=("auto", "direct", "f2", "f4"), default="auto")
    parser.add_argument("--fuse", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compile", action="store_true", help="torch.compile as a stock variant")
    parser.add_argument("--tuned-malloc", action="store_true", help="for both sides (glibc)")
    args = parser.parse_args()
    if args.tuned_malloc:
        use_tuned_malloc()
    print(f"{machine()}; norm={args.norm}, algo={args.algo}, {args.rounds} rounds\n")
    print(table(HEADER, [measure(name, args) for name in args.models]))


if __name__ == "__main__":
    main()
