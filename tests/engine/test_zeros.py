"""Exact zeros in whole networks: with biases at zero, a ReLU's mask is stock PyTorch's.

Images with flat borders, masked images and single pixels, through fresh networks: what the
convolutions make of zeros decides how much gradient passes.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext

ALGORITHMS = ["auto", "f4", "f2", "direct"]


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 16, 3, padding=1), nn.ReLU(),
    )  # fmt: skip


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
    )  # fmt: skip


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(16, 24, 3, padding=1)
        self.first, self.second = (nn.Conv2d(24, 24, 3, padding=1) for _ in range(2))

    def forward(self, x):
        x = self.stem(x).relu()
        return (self.second(self.first(x).relu()) + x).relu()


def images(kind: str) -> torch.Tensor:
    x = torch.randn(4, 16, 33, 32)
    if kind == "flat border":
        x[:, :, :9] = x[:, :, 24:] = 0
        x[..., :10] = x[..., 22:] = 0
    elif kind == "one pixel":
        kept = torch.zeros(4, 1, 33, 32)
        for i in range(4):
            kept[i, 0, 7 * i + 3, 8 * i + 5] = 1
        x = x * kept
    elif kind == "masked":
        x = x * (torch.rand(4, 1, 33, 32) < 0.02)
    return x.contiguous(memory_format=torch.channels_last)


def zero_biases(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    return model.to(memory_format=torch.channels_last)


def step(model: nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    output = model(x)
    output.backward(grad_output)
    grads = {name: p.grad for name, p in model.named_parameters() if name.endswith("bias")}
    return {"output": output.detach(), "input": x.grad, **grads}


def disagreement(stock: nn.Module, skip: nn.Module, x: torch.Tensor, sparse: bool) -> list[str]:
    """Where two models do not agree: in which values are zero, in the others' size."""
    for model in (stock, skip):
        model.zero_grad()
    with torch.no_grad():
        grad_output = torch.randn_like(stock(x))
    expected, actual = (step(model, x, grad_output) for model in (stock, skip))
    faults = [
        f"{name}: zeros"
        for name in (("output", "input") if sparse else ("output",))
        if not torch.equal(actual[name] == 0, expected[name] == 0)
    ]
    for name, value in expected.items():
        error = (actual[name] - value).norm() / value.norm()
        if not error < 2e-5:
            faults.append(f"{name}: error {error:.1e}")
    return faults


@pytest.mark.parametrize("kind", ["flat border", "one pixel", "masked", "dense"])
@pytest.mark.parametrize("algo", ALGORITHMS)
@pytest.mark.parametrize("build", [plain, normalized, Residual])
def test_a_fresh_network(build, algo, kind):
    torch.manual_seed(3)
    stock = zero_biases(build())
    skip = wus_ext.convert(copy.deepcopy(stock), algo=algo, norm="frozen")
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    wus_ext.set_skip(skip, True)
    # Of many dense values one may lie within rounding of zero: then other images have to agree.
    for _ in range(4 if kind == "dense" else 1):
        faults = disagreement(stock, skip, images(kind), sparse=kind != "dense")
        if not faults:
            return
    raise AssertionError(faults)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_fused_full_step(algo):
    torch.manual_seed(3)
    stock = zero_biases(plain())
    fused = wus_ext.convert(copy.deepcopy(stock), algo=algo, full="fused")
    x = images("flat border")
    with torch.no_grad():
        grad_output = torch.randn_like(stock(x))
    expected, actual = step(stock, x, grad_output), step(fused, x, grad_output)
    for name, value in expected.items():
        assert (actual[name] - value).norm() < 2e-5 * value.norm(), name
    for mine, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() < 2e-5 * theirs.grad.norm()
