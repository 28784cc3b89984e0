"""Bias-only fine-tuning (BitFit, arXiv 2106.10199) of a small BERT: time and memory of a step.

    python benchmarks/bitfit.py                        # 4 layers of width 256, 128 tokens, batch 16
    python benchmarks/bitfit.py --layers 12 --hidden 768 --batch-size 4

Random weights, Transformers' own BertForSequenceClassification with dropout. A step is zero_grad,
forward, loss, backward and AdamW. Stock fine-tunes everything, or biases alone
(``requires_grad_(False)`` on the rest).
"""

from __future__ import annotations

import argparse
import copy

import torch
from common import freeze, machine, median_ms, saved_bytes, table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

import wus_ext
from wus_ext.profiling.timing import interleaved, spread

MIB = 2**20


class FineTuningStep:
    def __init__(self, model: nn.Module, inputs: dict[str, Tensor]) -> None:
        self.model, self.inputs = model, inputs
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def loss(self) -> Tensor:
        return self.model(**self.inputs).loss

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def saved(self) -> int:
        kept = [*self.model.parameters(), *self.model.buffers(), *self.inputs.values()]
        return saved_bytes(self.loss, kept)

    def optimizer_bytes(self) -> int:
        return sum(
            value.nbytes
            for state in self.optimizer.state.values()
            for value in state.values()
            if isinstance(value, Tensor)
        )


def variants(args: argparse.Namespace) -> dict[str, FineTuningStep]:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=max(args.hidden // 64, 1),
        intermediate_size=4 * args.hidden,
    )
    stock = BertForSequenceClassification(config).train()
    inputs = {
        "input_ids": torch.randint(0, 1000, (args.batch_size, args.sequence)),
        "labels": torch.randint(0, 2, (args.batch_size,)),
    }
    made = {
        "stock, everything": FineTuningStep(copy.deepcopy(stock), inputs),
        "stock, biases": FineTuningStep(freeze(copy.deepcopy(stock)), inputs),
        "wus_ext, biases": FineTuningStep(wus_ext.convert(stock), inputs),
    }
    wus_ext.set_skip(made["wus_ext, biases"].model, True)
    return made


def check(stock: FineTuningStep, skip: FineTuningStep) -> None:
    """The same biases get the same gradients, before anything is timed."""
    for step in (stock, skip):
        torch.manual_seed(0)  # the same dropout
        step.optimizer.zero_grad()
        step.loss().backward()
    for name, parameter in stock.model.named_parameters():
        got = skip.model.get_parameter(name).grad
        if (got is None) != (parameter.grad is None):
            raise SystemExit(f"{name}: wrong gradient in a skip step")
        if got is not None:
            torch.testing.assert_close(got, parameter.grad, rtol=1e-3, atol=1e-5)


HEADER = ["fine-tuning", "step, ms", "of everything", "saved for backward, MiB", "AdamW, MiB"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--sequence", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    print(
        f"{machine()}; {args.layers} layers of width {args.hidden}, {args.sequence} tokens, "
        f"batch {args.batch_size}, {args.rounds} rounds\n"
    )
    made = variants(args)
    check(made["stock, biases"], made["wus_ext, biases"])
    seconds = interleaved(made, args.rounds)
    everything = median_ms(seconds["stock, everything"])
    rows = [
        [
            name,
            f"{median_ms(seconds[name]):.0f} ± {spread(seconds[name]):.0%}",
            f"{median_ms(seconds[name]) / everything:.2f}",
            f"{step.saved() / MIB:.1f}",
            f"{step.optimizer_bytes() / MIB:.2f}",
        ]
        for name, step in made.items()
    ]
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
