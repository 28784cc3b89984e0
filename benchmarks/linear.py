"""Products of linear layers on the CPU: in blocks of the weight against PyTorch's own.

    python benchmarks/linear.py
    python benchmarks/linear.py --batch 64 --inputs 4096 --outputs 4096

"packed" is oneDNN's product with a weight that it packed beforehand, which a skip window affords.
The weight gradient is the same product for both, in new memory and in memory that is kept. All
variants take turns in one run; the products are checked against float64 first.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from common import machine, median_ms, table

from wus_ext.profiling.timing import interleaved

wus = torch.ops.wus

#: (batch, in_features, out_features): AlexNet's two large layers, and other batches and sizes.
SHAPES = [
    (64, 4096, 4096),
    (64, 1024, 4096),
    (32, 1024, 4096),
    (128, 1024, 4096),
    (512, 1024, 1024),
    (64, 512, 512),
]


HEADER = ["batch x in x out", "forward", "blocks", "packed", "dgrad", "blocks", "packed"]
HEADER += ["wgrad", "kept memory"]


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual - expected).norm() / expected.norm()
    assert error < 3e-6, f"relative error {error}"


def measure(batch: int, inputs: int, outputs: int, rounds: int) -> list[str]:
    """Milliseconds of every variant."""
    x, grad, bias = torch.randn(batch, inputs), torch.randn(batch, outputs), torch.randn(outputs)
    weight = torch.randn(outputs, inputs) / inputs**0.5
    check(wus.linear_forward(x, weight, bias), F.linear(x.double(), weight.double(), bias.double()))
    check(wus.linear_dgrad(grad, weight), grad.double() @ weight.double())
    reorder, pointwise = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    packed, turned = reorder(weight, batch), reorder(weight.t().contiguous(), batch)
    memory = torch.empty(outputs, inputs)
    variants = {
        "forward": lambda: F.linear(x, weight, bias),
        "forward, blocks": lambda: wus.linear_forward(x, weight, bias),
        "forward, packed": lambda: pointwise(x, packed, bias, "none", [], ""),
        "dgrad": lambda: grad @ weight,
        "dgrad, blocks": lambda: wus.linear_dgrad(grad, weight),
        "dgrad, packed": lambda: pointwise(grad, turned, None, "none", [], ""),
        "wgrad": lambda: grad.t() @ x,
        "wgrad, kept memory": lambda: torch.mm(grad.t(), x, out=memory),
    }
    return [f"{median_ms(times):.2f}" for times in interleaved(variants, rounds).values()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int)
    parser.add_argument("--inputs", type=int)
    parser.add_argument("--outputs", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    given = (args.batch, args.inputs, args.outputs)
    shapes = SHAPES if given == (None,) * 3 else [given]
    if None in shapes[0]:
        parser.error("--batch, --inputs and --outputs belong together")
    torch.manual_seed(0)
    rows = [[" x ".join(map(str, shape)), *measure(*shape, args.rounds)] for shape in shapes]
    print(f"{machine()}\n\nMilliseconds, medians of {args.rounds} rounds\n")
    print(table(HEADER, rows))


if __name__ == "__main__":
    main()
