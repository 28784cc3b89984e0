"""What a skip step of other people's models fuses and saves: the table of docs/integrations.md.

    python -m benchmarks.zoo
    python -m benchmarks.zoo --models resnet18 bert

The models are those of tests/integrations/zoo.py, in small, in training mode, batch 2; the tests
check their steps against stock. "Saved" is what autograd keeps between forward and backward.
"""

from __future__ import annotations

import argparse
import copy
from collections import Counter

import torch
from torch import nn

import wus_ext
from benchmarks.common import freeze, machine, table
from tests.integrations.zoo import TIMM, TORCHVISION, TRANSFORMERS, Case, call, saved_bytes
from wus_ext.conversion.modules import stock_class
from wus_ext.nn import DropIn

KIB = 2**10
LIBRARIES = {"torchvision": TORCHVISION, "timm": TIMM, "Transformers": TRANSFORMERS}


def drop_ins(model: nn.Module) -> str:
    """The layers with a skip flag of their own; the others run stock with detached weights."""
    kinds = Counter(
        stock_class(type(module)).__name__
        for module in model.modules()
        if isinstance(module, DropIn)
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


def stays_stock(model: nn.Module) -> str:
    """Kinds of module with a weight of their own that have no drop-in."""
    kinds = Counter(
        stock_class(type(module)).__name__
        for module in model.modules()
        if not isinstance(module, DropIn)
        and any(p.dim() > 1 for p in module.parameters(recurse=False))
    )
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "-"


def measure(library: str, case: Case) -> list[str]:
    model = case.build()
    torch.manual_seed(0)
    inputs = case.inputs()
    full = saved_bytes(model, inputs)
    frozen = saved_bytes(freeze(copy.deepcopy(model)), inputs)
    wus_ext.set_skip(wus_ext.convert(model), True)
    with model._skip_engine.recording() as chains:
        call(model, inputs)
    skip = saved_bytes(model, inputs)
    return [
        f"{library}: {case.name}",
        str(len(chains)),
        *(f"{size / KIB:.0f}" for size in (full, frozen, skip)),
        f"{skip / full:.2f}",
        f"**{skip / frozen:.2f}**",
        drop_ins(model),
        stays_stock(model),
    ]


HEADER = [
    "model",
    "fused chains",
    "stock full, KiB",
    "stock frozen, KiB",
    "skip, KiB",
    "skip / full",
    "skip / frozen",
    "drop-in layers",
    "stays stock",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", metavar="NAME", help="some of them; default all")
    args = parser.parse_args()
    print(f"{machine()}\n")
    rows = [
        measure(library, case)
        for library, cases in LIBRARIES.items()
        for case in cases
        if not args.models or case.name in args.models
    ]
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
