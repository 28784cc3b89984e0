"""NaN, infinity and huge numbers through whole networks: where stock PyTorch has them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext

NAN, INF = float("nan"), float("inf")


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1),
    )  # fmt: skip


def normalized() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
    )  # fmt: skip


def twins(build, **settings) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    stock = build().to(memory_format=torch.channels_last)
    return stock, wus_ext.convert(copy.deepcopy(stock), **settings)


def step(model: nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> dict:
    x = x.clone().requires_grad_()
    output = model(x)
    output.backward(grad_output)
    biases = {name: p.grad for name, p in model.named_parameters() if name.endswith("bias")}
    return {"output": output.detach(), "input": x.grad, **biases}


def images() -> torch.Tensor:
    return torch.randn(2, 16, 14, 13).contiguous(memory_format=torch.channels_last)


def same(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    finite = expected.isfinite()
    torch.testing.assert_close(actual[~finite], expected[~finite], equal_nan=True, msg=name)
    scale = expected[finite].abs().max().clamp(min=1e-30) if finite.any() else 1.0
    torch.testing.assert_close(
        actual[finite] / scale, expected[finite] / scale, rtol=1e-4, atol=1e-5, msg=name
    )


@pytest.mark.parametrize("spot", [NAN, INF, -INF, 1e37])
@pytest.mark.parametrize("algo", ["auto", "f4", "f2", "direct"])
def test_they_stay_in_their_receptive_field(algo, spot):
    stock, skip = twins(convolutions, algo=algo)
    wus_ext.set_skip(skip, True)
    x = images()
    x[1, 3, 7, 6] = spot
    grad_output = torch.randn_like(stock(x)).detach()
    expected, actual = step(stock, x, grad_output), step(skip, x, grad_output)
    assert expected["output"].isfinite().any()
    for name, value in expected.items():
        same(actual[name], value, name)


@pytest.mark.parametrize("build", [convolutions, lambda: normalized()[:3]], ids=["plain", "norm"])
@pytest.mark.parametrize("scale", [1e30, 1e36, 1e37])
@pytest.mark.parametrize("algo", ["auto", "f2", "direct"])
def test_large_images(algo, scale, build):
    stock, skip = twins(build, algo=algo)
    wus_ext.set_skip(skip, True)
    x = images() * scale
    grad_output = torch.randn_like(stock(x)).detach()
    expected, actual = step(stock, x, grad_output), step(skip, x, grad_output)
    same(actual["output"], expected["output"], "output")
    if build is convolutions:
        same(actual["input"], expected["input"], "input")


@pytest.mark.parametrize("scale", [1e20, 1e36])
@pytest.mark.parametrize("algo", ["auto", "f2"])
def test_weight_gradients_of_large_images(algo, scale):
    stock, fused = twins(convolutions, algo=algo, full="fused")
    x = images() * scale
    grad_output = torch.randn_like(stock(x)).detach() / 1e4
    step(stock, x, grad_output)
    step(fused, x, grad_output)
    for (name, mine), theirs in zip(fused.named_parameters(), stock.parameters(), strict=True):
        same(mine.grad, theirs.grad, name)


@pytest.mark.parametrize("from_input", [True, False], ids=["input", "no_input"])
@pytest.mark.parametrize("where", ["gradient", "image"])
@pytest.mark.parametrize("full", [False, True], ids=["skip", "full"])
def test_a_bias_before_batch_norm_does_not_hide_them(full, where, from_input):
    stock, ours = twins(normalized, full="fused" if full else "stock")
    wus_ext.set_skip(ours, not full)
    x = images()
    grads = []
    for model in (stock, ours):
        for value in (None, NAN):
            model.zero_grad()
            given = x.clone().requires_grad_(from_input)
            if where == "image" and value is not None:
                with torch.no_grad():
                    given[0, 3, 5, 5] = value
            output = model(given)
            grad_output = torch.ones_like(output)
            if where == "gradient" and value is not None:
                grad_output[0, 3, 2, 2] = value
            output.backward(grad_output)
            grads.append([model[i].bias.grad for i in (0, 3)])
    stocks, spoiled, zeros, nans = grads
    for i in range(2):
        assert stocks[i].abs().max() < 1e-3
        assert torch.equal(zeros[i], torch.zeros_like(zeros[i]))
        assert torch.equal(nans[i].isnan(), spoiled[i].isnan())
        assert nans[i].isnan().any()
