"""norm="frozen": no batch norm uses or moves statistics of a batch in a skip step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def build(rank: int, **settings) -> nn.Module:
    torch.manual_seed(0)
    conv, norm = CONVS[rank], NORMS[rank]
    model = nn.Sequential(
        conv(3, 8, 3, padding=1), norm(8, **settings), nn.ReLU(), conv(8, 8, 1), norm(8, **settings)
    )
    model(2 * images(rank) + 1)  # moves the running statistics
    return model


def images(rank: int) -> torch.Tensor:
    return torch.randn(4, 3, *[6] * rank)


def buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def equal_to_evaluation(skip: nn.Module, stock: nn.Module, rank: int) -> None:
    """In a skip step `skip` is what `stock` is with its norm layers in evaluation mode."""
    for module in stock.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    before = buffers(skip)
    x, grad_output = images(rank), torch.randn(4, 8, *[6] * rank)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    output, expected = skip(mine), stock(theirs)
    output.backward(grad_output)
    expected.backward(grad_output)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    for name, buffer in skip.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "layers"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("tracking", ["always", "no_longer", "never"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_every_batch_norm(rank, tracking, affine, fuse):
    stock = build(rank, affine=affine, track_running_stats=tracking != "never")
    if tracking == "no_longer":
        stock[1].track_running_stats = stock[4].track_running_stats = False
    skip = wus_ext.convert(copy.deepcopy(stock), norm="frozen", fuse=fuse)
    wus_ext.set_skip(skip, True)
    equal_to_evaluation(skip, copy.deepcopy(stock), rank)
    wus_ext.set_skip(skip, False)
    x = images(rank)
    assert torch.equal(skip(x), stock(x))  # a full step is stock's, statistics and all
    assert all(torch.equal(a, b) for a, b in zip(skip.buffers(), stock.buffers(), strict=True))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_block_and_some_layers(rank):
    stock = build(rank, affine=False)
    skip = wus_ext.convert(copy.deepcopy(stock), norm="frozen")
    with wus_ext.skip_weight_updates(skip, skip_biases=True):
        equal_to_evaluation(skip, copy.deepcopy(stock), rank)
    assert not wus_ext.is_skipping(skip)
    wus_ext.set_skip(skip, True, layers="4")  # a layer without a parameter can skip, too
    assert wus_ext.is_skipping(skip)
    before = buffers(skip)
    skip(images(rank))
    moved = {name for name, buffer in skip.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {f"1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_batch_statistics_move_by_default(affine):
    stock = build(2, affine=affine)
    skip = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(skip, True)
    x = images(2)
    torch.testing.assert_close(skip(x), stock(x), rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(skip.buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
