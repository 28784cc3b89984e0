"""Fused chains as they run on a GPU, kernels emulated where there is none: every type, autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext

from ..engine.chains import CHAINS, frozen

NORMLESS = [name for name in CHAINS if "norm" not in name and name not in (
    "odd_channels", "functional", "in_place_sum", "block", "dropout")]  # fmt: skip
AUTOCAST = [name for name in CHAINS if name != "dropout"]


def algorithms(model, x, autocast=None):
    """By which a converted model's convolutions run."""
    with (
        model._skip_engine.explaining() as notes,
        torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None),
    ):
        model(x)
    return set(notes.algorithms.values())


def stock_model(name):
    torch.manual_seed(0)
    model = CHAINS[name]()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):  # the table's layers were made before any seed
            module.reset_parameters()
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return frozen(model.to(memory_format=torch.channels_last))


def step(model, x, g=None, autocast=None):
    """Output, gradients of input and biases, buffers: whatever a skip step computes."""
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        y = model(x)
    y.backward(g.to(y.dtype).expand_as(y))
    biases = {n: p.grad for n, p in model.named_parameters() if n.endswith("bias")}
    buffers = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    return {"output": y.detach(), "input": x.grad, **biases, **buffers}


def separate_bias(conv):
    """Adds a convolution's bias after a rounding, as stock does on a GPU; the CPU rounds once."""

    def forward(x):
        y = conv._conv_forward(x, conv.weight, None)
        return y if conv.bias is None else y + conv.bias.to(y.dtype).view(-1, 1, 1)

    conv.forward = forward


def full_step(model, x, g, autocast=None):
    """The same of a step in which all parameters train."""
    results = step(model, x, g, autocast)
    return results | {n: p.grad for n, p in model.named_parameters()}


def compare(skip, stock, tolerance):
    """`tolerance` of each result's size; four times that for gradients, which a ReLU close to zero
    may block on one side only."""
    largest = max(float(value.norm()) for value in stock.values())
    for name, expected in stock.items():
        assert skip[name].dtype == expected.dtype, name
        if name.endswith("bias") and not skip[name].any():
            # In front of batch statistics: exactly zero, where stock has the noise of rounding.
            assert float(expected.norm()) <= tolerance * largest, name
            continue
        error = float((skip[name] - expected).norm() / expected.norm().clamp_min(1e-12))
        limit = tolerance * (1 if name == "output" else 4)
        assert error <= limit, f"{name}: {error:.1e}"


def pair(chains, name, dtype, **settings):
    """A stock model frozen stock's way, and its converted twin in a skip window."""
    stock = stock_model(name)
    for parameter_name, parameter in stock.named_parameters():
        if parameter_name.endswith("bias"):  # what autocast makes of it is exact
            parameter.data = parameter.data.half().bfloat16().float()
    stock.to(chains.device, dtype)
    skip = copy.deepcopy(stock).requires_grad_(True)
    for module in stock.modules():
        if isinstance(module, nn.Conv2d):
            separate_bias(module)
    wus_ext.set_skip(wus_ext.convert(skip, **settings), True)
    return stock, skip


def run(chains, name, dtype, autocast=None, tolerance=None):
    stock, skip = pair(chains, name, dtype)
    x = torch.randn(4, 3, 10, 8).contiguous(memory_format=torch.channels_last).to(dtype)
    with torch.no_grad():
        shape = copy.deepcopy(stock)(chains(x)).shape
    g = torch.randn(shape).to(dtype)
    results = [step(model, chains(x), chains(g), autocast) for model in (skip, stock)]
    compare(*results, tolerance or 8 * torch.finfo(autocast or dtype).eps)
    assert algorithms(skip, chains(x), autocast) == {"cuDNN"}
    for parameter_name, parameter in skip.named_parameters():
        assert (parameter.grad is None) != parameter_name.endswith("bias"), parameter_name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NORMLESS)
def test_models_of_one_type(chains, name, dtype):
    run(chains, name, dtype)


@pytest.mark.parametrize("name", AUTOCAST)
def test_float32(chains, name):
    run(chains, name, torch.float32, tolerance=5e-6)


@pytest.mark.parametrize("name", AUTOCAST)
def test_autocast(chains, name):
    run(chains, name, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None)],
    ids=["float32", "autocast", "bfloat16"],
)
@pytest.mark.parametrize("name", AUTOCAST)
def test_full_steps(chains, name, dtype, autocast):
    if dtype == torch.bfloat16 and name not in NORMLESS:
        pytest.skip("its norm is in float32")
    stock = stock_model(name).requires_grad_(True).to(chains.device, dtype)
    ours = wus_ext.convert(copy.deepcopy(stock), full="fused")
    for module in stock.modules():
        if isinstance(module, nn.Conv2d):
            separate_bias(module)
    x = chains(torch.randn(4, 3, 10, 8)).to(dtype)
    with torch.no_grad():
        shape = copy.deepcopy(stock)(x).shape
    g = chains(torch.randn(shape)).to(dtype)
    results = [full_step(model, x, g, autocast) for model in (ours, stock)]
    eps = torch.finfo(autocast or dtype).eps
    compare(*results, 5e-6 if eps < 1e-6 else 8 * eps)
    assert algorithms(ours, x, autocast) == {"cuDNN"}
    assert wus_ext.packed_bytes(ours) == 0


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_weights_that_require_no_gradient_are_read_in_every_step(chains, autocast):
    """They may change in ways that torch does not see."""
    stock = stock_model("conv_relu").to(chains.device)
    ours = wus_ext.convert(copy.deepcopy(stock))
    x = chains(torch.randn(2, 3, 8, 8))
    for _ in range(2):
        with torch.no_grad():
            g = torch.ones_like(stock(x))
        results = [step(model, x, g, autocast) for model in (ours, stock)]
        compare(*results, 5e-6 if autocast is None else 3e-2)
        for model in (ours, stock):
            model.zero_grad()
            model[0].weight.data.mul_(-0.5)
    assert algorithms(ours, x, autocast) == {"cuDNN"}


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["conv_norm_relu", "conv_norm_relu_pool", "block"])
def test_frozen_statistics_fold_away(chains, name, autocast):
    stock, skip = pair(chains, name, torch.float32, norm="frozen")
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    x = chains(torch.randn(4, 3, 10, 8))
    g = chains(torch.randn(stock(x).shape))
    results = [step(model, x, g, autocast) for model in (skip, stock)]
    if autocast is None:
        compare(*results, 5e-6)
    else:  # the product of weight and scale is rounded: ReLU may decide otherwise near zero
        compare({"output": results[0]["output"]}, {"output": results[1]["output"]}, 2e-2)
    assert algorithms(skip, x, autocast) == {"cuDNN"}


def test_masks_and_nothing_else_are_saved(chains):
    model = stock_model("conv_relu_pool").requires_grad_(True).to(chains.device)
    wus_ext.set_skip(wus_ext.convert(model), True)
    x = chains(torch.randn(4, 3, 12, 12)).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        model(x)
    assert {t.dtype for t in saved} == {torch.uint8}


def test_low_precision_weights_are_made_once_a_window(chains):
    model = stock_model("conv_relu").requires_grad_(True).to(chains.device)
    wus_ext.set_skip(wus_ext.convert(model), True)
    x = chains(torch.randn(2, 3, 8, 8))
    packed = model._skip_engine.packed

    def copies():
        return [copy.tensor for own in packed._layers.values() for copy in own.values()]

    with torch.autocast(chains.device, dtype=torch.bfloat16):
        model(x)
        first = [tensor.data_ptr() for tensor in copies()]
        model(x)
    assert first
    assert first == [tensor.data_ptr() for tensor in copies()]
    assert {tensor.dtype for tensor in copies()} == {torch.bfloat16}
    wus_ext.set_skip(model, False)
    assert wus_ext.packed_bytes(model) == 0
