"""Autocast and GradScaler around converted models, against stock PyTorch with frozen weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import wus_ext
from tests.cases import TOLERANCE
from tests.integrations.zoo import freeze, saved_bytes
from wus_ext.nn import is_bias

HALF = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"]
)


class Net(nn.Module):
    """Convolutions, norms, a residual, attention: every kind of layer that autocast treats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.GroupNorm(4, 16))
        self.attention = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = (self.block(x) + x).relu().flatten(2).transpose(1, 2)
        return self.head(self.attention(x).mean(1))


def twins() -> tuple[nn.Module, nn.Module]:
    stock = Net()
    return wus_ext.convert(copy.deepcopy(stock)), stock


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 8, 8), torch.randint(0, 5, (4,))


def loss_of(model, images, labels, dtype):
    with torch.autocast("cpu", dtype):
        output = model(images)
        loss = nn.functional.cross_entropy(output, labels)
    assert output.dtype == dtype
    return loss


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@HALF
def test_full_steps_are_stocks_bit_for_bit(dtype):
    model, stock = twins()
    data = batch()
    for made in (model, stock):
        loss_of(made, *data, dtype).backward()
    for name, grad in gradients(stock).items():
        assert torch.equal(model.get_parameter(name).grad, grad), name
    for name, buffer in stock.named_buffers():
        assert torch.equal(model.get_buffer(name), buffer), name


@HALF
def test_skip_steps_equal_stocks_with_frozen_weights(dtype):
    model, stock = twins()
    freeze(stock)
    data = batch()
    wus_ext.set_skip(model, True)
    losses = [loss_of(made, *data, dtype) for made in (model, stock)]
    torch.testing.assert_close(*losses, rtol=TOLERANCE[dtype], atol=0)
    for loss in losses:
        loss.backward()
    got, wanted = gradients(model), gradients(stock)
    assert got.keys() == wanted.keys() == {n for n, _ in stock.named_parameters() if is_bias(n)}
    largest = max(grad.norm() for grad in wanted.values())
    for name, grad in wanted.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - grad).norm() <= TOLERANCE[dtype] * max(grad.norm(), largest / 10), name


@HALF
def test_training_with_a_scaler_through_windows(dtype):
    """Full, skip and overflowing steps: parameters, momentum and scale move as stock's do."""
    model, stock = twins()
    optimizers = [
        torch.optim.SGD(made.parameters(), 0.05, momentum=0.9, weight_decay=0.01)
        for made in (model, stock)
    ]
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) for _ in range(2)]
    scales = []
    for skip, overflow in [(0, 0), (1, 0), (1, 1), (1, 0), (0, 1), (0, 0), (1, 0)]:
        wus_ext.set_skip(model, bool(skip))
        for name, parameter in stock.named_parameters():
            parameter.requires_grad_(not skip or is_bias(name))
            if not parameter.requires_grad:
                parameter.grad = None
        images, labels = batch()
        before = [
            copy.deepcopy((m.state_dict(), o.state_dict()))
            for m, o in zip((model, stock), optimizers, strict=True)
        ]
        for made, optimizer, scaler in zip((model, stock), optimizers, scalers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(made, images, labels, dtype)
            scaler.scale(loss * math.inf if overflow else loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(made.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
        for made, optimizer, (weights, state) in zip(
            (model, stock), optimizers, before, strict=True
        ):
            for name, parameter in made.named_parameters():
                still = overflow or (skip and not is_bias(name))
                assert torch.equal(parameter, weights[name]) == bool(still), name
            if overflow:
                for index, kept in state["state"].items():
                    now = optimizer.state_dict()["state"][index]["momentum_buffer"]
                    assert torch.equal(now, kept["momentum_buffer"])
        assert scalers[0].get_scale() == scalers[1].get_scale()
        scales.append(scalers[0].get_scale())
    assert scales == [256, 512, 256, 256, 128, 128, 256]
    for name, parameter in stock.named_parameters():
        far = (model.get_parameter(name) - parameter).norm() / parameter.norm()
        assert far <= TOLERANCE[dtype], name


@HALF
@pytest.mark.parametrize(
    ("make", "part"),
    [
        (Net, 1.0),
        (lambda: nn.Sequential(*(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))), 0.3),
    ],
    ids=["net", "convolutions"],
)
def test_a_skip_step_saves_no_inputs(make, part, dtype):
    stock = freeze(make())
    model = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(model, True)
    inputs = (torch.randn(4, 3, 16, 16),)
    with torch.autocast("cpu", dtype):
        assert saved_bytes(model, inputs) <= part * saved_bytes(stock, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bfloat16", "float64"])
def test_models_of_another_dtype(dtype):
    model, stock = (made.to(dtype) for made in twins())
    freeze(stock)
    images = torch.randn(4, 3, 8, 8, dtype=dtype)
    wus_ext.set_skip(model, True)
    grad_output = torch.randn(4, 5, dtype=dtype)
    for made in (model, stock):
        made(images).backward(grad_output)
    got, wanted = gradients(model), gradients(stock)
    assert got.keys() == wanted.keys()
    largest = max(grad.norm() for grad in wanted.values())
    for name, grad in wanted.items():
        assert got[name].dtype == dtype
        assert (got[name] - grad).norm() <= TOLERANCE[dtype] * max(grad.norm(), largest / 10), name
