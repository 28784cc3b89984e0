"""Every kind of step on networks that people train, against stock in its best layout.

    python benchmarks/networks.py --json table.json                # everything; an hour or two
    python benchmarks/networks.py --networks resnet18 mobilenet_v2 --size 112 --batch 4
    python benchmarks/networks.py --networks resnet50 --modes full frozen skip --bf16
    python benchmarks/networks.py --networks --json table.json     # the table of what is there

full: stock, everything trains. frozen: stock with requires_grad=False on all but biases.
converted: the same, and wus_ext.convert(model) alone. skip: a skip step. frozen input, input: stock
with requires_grad=False everywhere, and a step with skip_biases=True; only the gradient of the
input. fused: a full step with full="fused". eval: stock and full="fused" under no_grad.

Interleaved medians; stock runs contiguous and channels_last, and the faster one counts; with --bf16
all run under autocast too. "Held" is what is saved for backward, transformed weights and gradients.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from common import freeze, machine, median_ms, saved_bytes, table
from torch import Tensor, nn
from workloads import FEW_3X3, PAPER, WORKLOADS, Workload

import wus_ext
from wus_ext.profiling.timing import interleaved

MIB = 2**20
MODES = ("full", "frozen", "converted", "skip", "input", "fused", "eval")
STOCK = ("full", "frozen", "frozen input")
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
EVALUATION_BATCHES = (1, 2, 4, 16)
BF16 = " bf16"
#: What is compared: wus_ext's way against stock's.
PAIRS = {
    "skip / frozen": ("skip", "frozen"),
    "converted / frozen": ("converted", "frozen"),
    "input / frozen input": ("input", "frozen input"),
    "fused / full": ("fused", "full"),
    "skip bf16 / full bf16": ("skip bf16", "full bf16"),
    "fused bf16 / full bf16": ("fused bf16", "full bf16"),
}
EVALUATION = ", batch "
Record = dict[str, Any]


class Step:
    """One step of a workload in one of the modes; called, it runs."""

    def __init__(
        self,
        work: Workload,
        stock: nn.Module,
        inputs: tuple[Tensor, ...],
        mode: str,
        layout: str = "channels_last",
        algo: str = "auto",
    ) -> None:
        self.mode, self.layout, self.loss_of = mode.removesuffix(BF16), layout, work.loss
        self.algo = algo
        self.bf16 = mode.endswith(BF16)
        self.inputs = tuple(in_layout(input, layout) for input in inputs)
        self.model = copy.deepcopy(stock).to(memory_format=LAYOUTS[layout])
        self._prepare(work.passes_through)
        of_input = self.mode in ("input", "frozen input") and not work.passes_through
        self.only_input = of_input or work.passes_through == ""
        if self.only_input:
            self.inputs[0].requires_grad_()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = None
        if not self.only_input:
            self.optimizer = torch.optim.SGD(
                trained, lr=1e-4, momentum=0.9, weight_decay=5e-4, fused=True
            )

    def _prepare(self, passes_through: str | None) -> None:
        model, part = self.model, passes_through or None
        if self.mode in ("frozen", "converted"):
            freeze(model)
        if self.mode == "converted":
            wus_ext.convert(model, algo=self.algo)
        elif self.mode == "frozen input":
            model.get_submodule(passes_through or "").requires_grad_(False)
        elif self.mode in ("skip", "input", "fused"):
            full = "fused" if self.mode == "fused" else "stock"
            wus_ext.convert(model, full=full, algo=self.algo)
            if self.mode != "fused" or part:
                inputs_only = self.mode != "skip"
                wus_ext.set_skip(model, True, layers=part, skip_biases=inputs_only)

    def loss(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            output = self.model(*self.inputs)
        return self.loss_of(output)

    def __call__(self) -> None:
        self.loss().backward()
        if self.optimizer is None:
            with torch.no_grad():
                self.inputs[0].sub_(self.inputs[0].grad.sign(), alpha=1e-3)
        else:
            self.optimizer.step()
        self.model.zero_grad()
        self.inputs[0].grad = None

    def held(self) -> dict[str, int]:
        """Bytes of a step: saved for backward, transformed weights, gradients."""
        kept = [*self.model.parameters(), *self.model.buffers(), *self.inputs]
        saved = saved_bytes(self.loss, kept)
        self.loss().backward()
        gradients = sum(
            tensor.grad.nbytes
            for tensor in (*self.model.parameters(), self.inputs[0])
            if tensor.grad is not None
        )
        self.model.zero_grad()
        self.inputs[0].grad = None
        packed = wus_ext.packed_bytes(self.model)
        return {"saved": saved, "transformed": packed, "gradients": gradients}


class Evaluation:
    """A forward pass under no_grad; called, it runs."""

    def __init__(
        self,
        model: nn.Module,
        inputs: tuple[Tensor, ...],
        mode: str,
        layout: str = "channels_last",
    ) -> None:
        self.layout, self.bf16 = layout, mode.endswith(BF16)
        self.model = copy.deepcopy(model).eval().to(memory_format=LAYOUTS[layout])
        if mode.startswith("fused"):
            wus_ext.convert(self.model, full="fused")
        self.inputs = tuple(in_layout(input, layout) for input in inputs)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            return self.model(*self.inputs)


def in_layout(input: Tensor, layout: str) -> Tensor:
    """A copy of its own."""
    return input.clone(memory_format=LAYOUTS[layout] if input.dim() == 4 else None)


def faster(make: Callable[[str], Any], layouts: Iterable[str]) -> Any:
    """What `make` makes of one of the layouts, warmed up: the one that runs faster."""
    runs = {layout: make(layout) for layout in layouts}
    if len(runs) == 1:
        (only,) = runs.values()
        only()
        return only
    seconds = interleaved(runs, rounds=3, warmup=1)
    return runs[min(runs, key=lambda layout: min(seconds[layout]))]


def check(make: Callable[[str], Step], kinds: list[str]) -> None:
    """Steps compute the loss that stock's compute, before anything is timed."""
    for pair in PAIRS.values():
        if pair[0] in kinds and pair[1] in kinds and BF16 not in pair[0]:
            losses = []
            for kind in pair:
                torch.manual_seed(0)  # the same dropout
                with torch.no_grad():
                    losses.append(make(kind).loss().item())
            if abs(losses[0] - losses[1]) > 1e-2 * abs(losses[1]):
                raise SystemExit(f"the losses of {' and '.join(pair)} differ: {losses}")


def kinds(work: Workload, inputs: tuple[Tensor, ...], args: argparse.Namespace) -> list[str]:
    """The kinds of step to measure, in float32 and in bf16."""
    chosen = [mode for mode in args.modes if mode != "eval"]
    if "input" in chosen and not inputs[0].is_floating_point():
        chosen.remove("input")
    if work.passes_through is not None:  # what trains is not the network at hand
        chosen = [mode for mode in chosen if mode not in ("frozen", "converted", "skip")]
        if work.passes_through == "" and "fused" in chosen:
            chosen.remove("fused")
    if "input" in chosen:
        chosen.insert(chosen.index("input"), "frozen input")
    return [kind + suffix for suffix in (("", BF16) if args.bf16 else ("",)) for kind in chosen]


def measure(name: str, batch: int, size: int, args: argparse.Namespace) -> Record:
    torch.manual_seed(0)
    work = WORKLOADS[name]
    stock = work.build(size).train()
    inputs = work.inputs(batch, size)
    with torch.no_grad():  # running statistics that are not those of no image at all
        stock(*inputs)
    stock.train(work.training)
    record: Record = {"network": name, "batch": batch, "size": size, "machine": machine()}
    layouts = list(LAYOUTS) if inputs[0].dim() == 4 else ["contiguous"]

    def make(kind: str, layout: str = "channels_last") -> Step:
        return Step(work, stock, inputs, kind, layout, args.algo)

    chosen = kinds(work, inputs, args)
    check(make, chosen)
    steps = {
        kind: faster(
            partial(make, kind), layouts if kind.removesuffix(BF16) in STOCK else layouts[:1]
        )
        for kind in chosen
    }
    seconds = interleaved(steps, args.rounds, warmup=0)
    record["ms"] = {kind: median_ms(seconds[kind]) for kind in steps}
    record["layout"] = {kind: step.layout for kind, step in steps.items()}
    record["held"] = {kind: step.held() for kind, step in steps.items()}
    del steps
    if "eval" in args.modes and work.training and work.passes_through is None:
        record["eval"] = {}
        for number in EVALUATION_BATCHES:
            record["eval"][str(number)] = evaluate(work, stock, number, size, layouts, args)
    return record


def evaluate(
    work: Workload,
    stock: nn.Module,
    batch: int,
    size: int,
    layouts: list[str],
    args: argparse.Namespace,
) -> dict[str, float]:
    """Milliseconds of forward passes of stock and of a model with full="fused"."""
    inputs = work.inputs(batch, size)
    runs = {}
    for suffix in ("", BF16) if args.bf16 else ("",):
        for kind, choice in (("stock", layouts), ("fused", layouts)):
            kind += suffix
            runs[kind] = faster(partial(Evaluation, stock, inputs, kind), choice)
    seconds = interleaved(runs, 3 * args.rounds, warmup=1)
    return {kind: median_ms(seconds[kind]) for kind in runs}


def total(record: Record, kind: str) -> int:
    return sum(record["held"][kind].values())


def ratios(record: Record) -> dict[str, float]:
    """Everything that is compared of one network."""
    ms = record["ms"]
    found = {
        label: ms[ours] / ms[stock]
        for label, (ours, stock) in PAIRS.items()
        if ours in ms and stock in ms
    }
    for label, ours, stock in (("skip", "skip", "frozen"), ("fused", "fused", "full")):
        if ours + BF16 in ms and stock + BF16 in ms:
            found[f"{label} / {stock}, best precisions"] = min(ms[ours], ms[ours + BF16]) / min(
                ms[stock], ms[stock + BF16]
            )
    for ours, stock in (("skip", "full"), ("fused", "full"), ("input", "frozen input")):
        if ours in ms and stock in ms:
            found[f"held: {ours} / {stock}"] = total(record, ours) / total(record, stock)
    for batch, runs in record.get("eval", {}).items():
        for suffix in ("", BF16):
            if "fused" + suffix in runs:
                ratio = runs["fused" + suffix] / runs["stock" + suffix]
                found[f"eval fused / stock{suffix}{EVALUATION}{batch}"] = ratio
    return found


HEADER = [
    "network",
    "batch, px",
    "full, ms",
    "frozen",
    "skip",
    "input",
    "fused",
    "full bf16",
    *PAIRS,
    "eval fused / stock, batch " + ", ".join(map(str, EVALUATION_BATCHES)),
    "held, MiB: full",
    "skip (saved + transformed + gradients)",
    "fused",
    "skip / full",
]


def row(record: Record) -> list[str]:
    ms, found = record["ms"], ratios(record)

    def part(kind: str) -> str:
        return f"{ms[kind] / ms['full']:.2f}" if kind in ms and "full" in ms else "-"

    def ratio(label: str) -> str:
        return f"**{found[label]:.2f}**" if label in found else "-"

    def held(kind: str) -> str:
        return f"{total(record, kind) / MIB:.0f}" if kind in ms else "-"

    parts = record["held"].get("skip", {}).values()
    evaluations = [
        f"{found[label]:.2f}"
        for batch in EVALUATION_BATCHES
        if (label := f"eval fused / stock{EVALUATION}{batch}") in found
    ]
    return [
        record["network"],
        f"{record['batch']}, {record['size']}",
        f"{ms['full']:.0f} ({record['layout']['full']})" if "full" in ms else "-",
        *map(part, ("frozen", "skip", "input", "fused", "full bf16")),
        *(ratio(label) for label in PAIRS),
        ", ".join(evaluations) or "-",
        held("full"),
        " + ".join(f"{size / MIB:.0f}" for size in parts) or "-",
        held("fused"),
        ratio("held: skip / full"),
    ]


def summary(records: list[Record]) -> str:
    """Worst and geometric mean of every comparison: of all, and of groups that stand out."""
    groups = {
        "all": set(WORKLOADS),
        "few 3x3 convolutions": set(FEW_3X3),
        "the paper's": set(PAPER),
    }
    found: dict[str, dict[tuple[str, str], float]] = {}
    for record in records:
        where = f"{record['batch']} x {record['size']}"
        for label, value in ratios(record).items():
            kind, _, batch = label.partition(EVALUATION)
            place = f"{batch} x {record['size']}" if batch else where
            found.setdefault(kind, {})[record["network"], place] = value
    rows = []
    for label, values in found.items():
        for group, members in groups.items():
            chosen = {key: value for key, value in values.items() if key[0] in members}
            if chosen and (group == "all" or len(chosen) < len(values)):
                worst = max(chosen, key=chosen.__getitem__)
                mean = geometric_mean(chosen.values())
                cells = (f"{chosen[worst]:.2f}", " ".join(worst), f"{mean:.2f}")
                rows.append([label, group, str(len(chosen)), *cells])
    return table(["ratio", "of", "values", "worst", "where", "geometric mean"], rows)


def merged(path: Path | None, record: Record | None) -> list[Record]:
    """The records in a file and this one, written back."""
    records = json.loads(path.read_text()) if path is not None and path.exists() else []
    if record is not None:
        names = ("network", "batch", "size")
        records = [r for r in records if any(r[n] != record[n] for n in names)] + [record]
        order = list(WORKLOADS)
        records.sort(key=lambda r: (order.index(r["network"]), -r["size"]))
        if path is not None:
            path.write_text(json.dumps(records, indent=1))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="*", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME",
        help=", ".join(WORKLOADS),
    )  # fmt: skip
    parser.add_argument("--size", type=int, help="pixels or tokens; default: the table's")
    parser.add_argument("--batch", type=int, help="default: the table's")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--bf16", action="store_true", help="all of it under autocast too")
    parser.add_argument("--algo", choices=("auto", "measure"), default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="keep results in this file, beside what is there")
    args = parser.parse_args()
    print(f"{machine()}; {args.rounds} rounds\n", flush=True)
    records = merged(args.json, None)
    for name in args.networks:
        for batch, size in WORKLOADS[name].settings:
            start = time.perf_counter()
            record = measure(name, args.batch or batch, args.size or size, args)
            if args.json is None:
                records.append(record)
            else:
                records = merged(args.json, record)
            found = ", ".join(f"{label} {value:.2f}" for label, value in ratios(record).items())
            seconds = time.perf_counter() - start
            print(f"{name} {record['batch']} x {record['size']}: {found} ({seconds:.0f} s)",
                  flush=True)  # fmt: skip
            if args.batch and args.size:
                break
    print(f"\n{table(HEADER, [row(record) for record in records])}\n\n{summary(records)}")


if __name__ == "__main__":
    main()
