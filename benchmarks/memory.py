"""Bytes saved for backward by our steps against stock's, and what the packed weights take.

    python benchmarks/memory.py
    python benchmarks/memory.py --norm frozen --models vgg16_bn resnet18

Counts every storage that autograd keeps between forward and backward (saved_tensors_hooks), once,
without parameters, buffers and the images themselves. On a GPU also the allocator's peak.
"""

from __future__ import annotations

import argparse
import copy

import torch
from common import NETWORKS, TrainingStep, batch, freeze, machine, saved_bytes, table

import wus_ext

MIB = 2**20


def saved(step: TrainingStep) -> int:
    kept = [*step.model.parameters(), *step.model.buffers(), step.input, step.target]
    return saved_bytes(step.loss, kept)


def peak_bytes(step: TrainingStep) -> int | None:
    if not step.input.is_cuda:
        return None
    step()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def measure(name: str, args: argparse.Namespace) -> list[str]:
    torch.manual_seed(0)
    stock = wus_ext.revert(NETWORKS[name]()).to(args.device, memory_format=torch.channels_last)
    images, labels = batch(args.batch_size, args.device)
    images = images.contiguous(memory_format=torch.channels_last)
    amp = None if args.amp == "off" else getattr(torch, args.amp)
    full = TrainingStep(copy.deepcopy(stock), images, labels, amp)
    frozen = TrainingStep(freeze(copy.deepcopy(stock)), images, labels, amp)
    ours = [
        wus_ext.convert(copy.deepcopy(stock), norm=args.norm, algo=args.algo, full=name)
        for name in ("fused", "stock")
    ]
    fused, skip = (TrainingStep(model, images, labels, amp) for model in ours)
    wus_ext.set_skip(skip.model, True)
    sizes = [saved(step) for step in (full, frozen, fused, skip)]
    peaks = [peak_bytes(step) for step in (full, skip)]
    return [
        name,
        str(args.batch_size),
        *(f"{size / MIB:.1f}" for size in sizes),
        f"**{sizes[3] / sizes[0]:.3f}**",
        f"{wus_ext.packed_bytes(skip.model) / MIB:.0f}",
        " -> ".join("-" if peak is None else f"{peak / MIB:.0f}" for peak in peaks),
    ]


HEADER = [
    "network",
    "batch",
    "stock full, MiB",
    "stock frozen, MiB",
    "fused full, MiB",
    "skip, MiB",
    "skip / full",
    "packed weights, MiB",
    "peak, MiB",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--norm", choices=("batch", "frozen"), default="batch")
    parser.add_argument("--algo", choices=("auto", "direct", "f2", "f4"), default="auto")
    parser.add_argument("--amp", choices=("off", "bfloat16", "float16"), default="off")
    args = parser.parse_args()
    print(f"{machine()}; norm={args.norm}, algo={args.algo}, amp {args.amp}\n")
    print(table(HEADER, [measure(name, args) for name in args.models]))


if __name__ == "__main__":
    main()
