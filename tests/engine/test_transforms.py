"""Transforms of functions, tracers and devices without data: as stock frozen does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

import wus_ext

from .chains import frozen, relative_error


def networks(**options):
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 4),
    )  # fmt: skip
    stock(torch.randn(4, 3, 8, 8))
    converted = wus_ext.convert(copy.deepcopy(stock), **options)
    if options.get("full") != "fused":
        wus_ext.set_skip(converted, True)
    return frozen(stock.eval()), converted.eval()


OPTIONS = [{}, {"fuse": False}, {"full": "fused"}]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", OPTIONS, ids=["skip", "unfused", "fused"])
@pytest.mark.parametrize(
    "transform",
    [
        lambda net, x: jacobian(net, x, vectorize=True),
        lambda net, x: jacobian(net, x, vectorize=True, strategy="forward-mode"),
        lambda net, x: torch.func.jacrev(net)(x),
        lambda net, x: torch.func.jacfwd(net)(x),
        lambda net, x: torch.func.jvp(net, (x,), (x,))[1],
        lambda net, x: torch.func.vmap(net)(x[None])[0],
        lambda net, x: torch.func.grad(lambda x: net(x).square().sum())(x),
    ],
)
def test_transforms(transform, options):
    stock, converted = networks(**options)
    x = torch.randn(2, 3, 8, 8)
    assert relative_error(transform(converted, x), transform(stock, x)) < 1e-4


@pytest.mark.parametrize("options", OPTIONS, ids=["skip", "unfused", "fused"])
def test_meta_device(options):
    _, converted = networks(**options)
    output = converted.to("meta")(torch.randn(2, 3, 8, 8, device="meta"))
    assert output.shape == (2, 4)
    assert output.is_meta


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("options", OPTIONS, ids=["skip", "unfused", "fused"])
def test_jit_trace(options):
    stock, converted = networks(**options)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        traced = torch.jit.trace(converted, x)
    torch.testing.assert_close(traced(x), stock(x), rtol=1e-4, atol=1e-5)
