"""Every fused chain against the stock chain."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext.engine.dropout import drop

from .chains import CHANNELS, build, chain, check, conv, frozen, fused_chains, images, run


@pytest.mark.parametrize("algo", ["direct", "f2", "f4"])
@chain
def test_a_chain_equals_stock(name, algo):
    stock, skip = build(name, algo=algo)
    check(stock, skip, images(), tolerance=2e-5)
    assert fused_chains(skip, images())


@chain
def test_a_chain_equals_stock_in_evaluation_mode(name):
    stock, skip = build(name)
    run(stock, images())  # moves the running statistics
    skip.load_state_dict(stock.state_dict())
    check(stock.eval(), skip.eval(), images(), tolerance=2e-5)


@chain
def test_a_chain_keeps_stocks_layout(name):
    stock, skip = build(name, channels_last=False)
    check(stock, skip, images(channels_last=False), tolerance=2e-5)
    x = images(channels_last=False)
    assert skip(x).is_contiguous() == stock(x).is_contiguous()


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("act", ["none", "relu", "pool", "norm"])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_one_channel(kernel, act, channels_last):
    """Images and weights of one channel are of both layouts at once."""
    after = {
        "none": [],
        "relu": [nn.ReLU()],
        "pool": [nn.ReLU(), nn.MaxPool2d(2)],
        "norm": [nn.BatchNorm2d(8), nn.ReLU()],
    }[act]
    stock = nn.Sequential(conv(1, 8, kernel, padding=kernel // 2), *after)
    stock.append(conv(8, 1, kernel, padding=kernel // 2)).append(nn.ReLU())
    if channels_last:
        stock = stock.to(memory_format=torch.channels_last)
    skip = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(skip, True)
    check(frozen(stock), skip, images((2, 1, 12, 10), channels_last), tolerance=2e-5)


@pytest.mark.parametrize("after", [[], [nn.ReLU()], [nn.ReLU(), nn.MaxPool2d(2)]], ids=len)
@pytest.mark.parametrize("options", [{"kernel_size": 1}, {"kernel_size": 3, "groups": 16}], ids=str)
def test_only_the_bias_of_a_first_layer_trains(options, after):
    """No gradient goes on to the images or to the weight."""
    stock = nn.Sequential(nn.Conv2d(16, 16, **options), *after)
    skip = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(skip, True)
    x = images((8, 16, 12, 10))
    for model in (stock, skip):
        model(x).square().mean().backward()
    torch.testing.assert_close(skip[0].bias.grad, stock[0].bias.grad)
    assert skip[0].weight.grad is None


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 13, 37])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["conv_relu", "conv_norm_relu", "conv_relu_pool", "functional"])
def test_awkward_sizes(name, batch, size):
    if "pool" in name:
        size = max(size, 6)
    if name == "functional" and size < 2:
        size = 2
    x = images((batch, 3, size, max(size - 1, 5 if "pool" in name else 2)))
    stock, skip = build(name)
    # A norm over few values amplifies rounding by its inverse deviation.
    check(stock, skip, x, tolerance=2e-3 if "norm" in name or name == "functional" else 3e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv_relu", "conv_relu_pool", "conv_norm_relu"])
def test_nan_and_infinity_propagate(name, value):
    """Where stock's result is finite ours may be NaN next to a NaN, never the other way round."""
    stock, skip = build(name, algo="direct")
    x = images()
    x[0, 1, 5, 5] = value
    expected, wanted, grad_output = run(stock, x)
    actual, got, _ = run(skip, x, grad_output)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got, wanted, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["conv_relu", "conv_relu_pool", "conv_norm_relu"])
def test_winograd_never_hides_a_nan(name):
    stock, skip = build(name, algo="f4")
    x = images()
    x[0, 1, 5, 5] = float("nan")
    expected, _, _ = run(stock, x)
    actual, _, _ = run(skip, x)
    assert actual[expected.isnan()].isnan().all()


def test_relu_at_zero_and_ties_in_a_pool():
    """Zero weights: every value is exactly the bias, every window a tie."""
    stock, skip = build("conv_relu_pool")
    with torch.no_grad():
        for model in (stock, skip):
            model[3].weight.zero_()
            model[3].bias.copy_(torch.linspace(-1, 1, CHANNELS))
            model[3].bias[3] = 0.0
    check(stock, skip, images(), tolerance=1e-5)


def test_thirty_skip_steps_follow_stock():
    stock, skip = build("conv_norm_relu_pool")
    losses = []
    for model in (stock, skip):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        torch.manual_seed(3)
        curve = []
        for _ in range(30):
            x = images((4, 3, 12, 12))
            optimizer.zero_grad()
            loss = (model(x).mean((2, 3)) - x.mean((1, 2, 3))[:, None]).square().mean()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0][-1] < 0.7 * losses[0][0]
    torch.testing.assert_close(
        torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-3, atol=1e-5
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "neither"])
def test_dropout_keeps_the_layout(layout):
    x = images()
    x = {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "neither": x.transpose(2, 3),
    }[layout].requires_grad_()
    grad_output = torch.randn_like(x)
    stock, results = nn.Dropout(0.3), []
    for dropout in (stock, lambda x: stock(x) if (kept := drop(x, 0.3)) is None else kept):
        torch.manual_seed(1)
        output = dropout(x)
        results.append((output, *torch.autograd.grad(output, x, grad_output)))
        assert output.stride() == x.stride()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_no_gradients_wanted(context):
    stock, skip = build("conv_norm_relu_pool")
    x = images()
    with context():
        torch.testing.assert_close(skip.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-5)


def test_thread_counts_agree():
    _, skip = build("conv_norm_relu_pool")
    threads = torch.get_num_threads()
    results, x = [], images((5, 3, 20, 20))
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            skip.zero_grad()
            results.append(run(skip, x))
    finally:
        torch.set_num_threads(threads)
    for output, grad, _ in results[1:]:
        torch.testing.assert_close(output, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-3, atol=1e-5)
