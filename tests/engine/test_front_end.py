"""Which layers form a chain, and that everything else is the model's own code."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import wus_ext

from .chains import build, check, frozen, fused_chains, images, run


@pytest.mark.parametrize(
    ("name", "chains"),
    [
        ("conv_relu_pool", ["conv relu pool", "conv relu pool"]),
        ("conv_norm_relu", ["conv norm relu", "conv norm relu"]),
        ("functional", ["conv relu", "conv norm add relu", "conv relu pool"]),
        ("in_place_sum", ["conv relu", "conv norm add relu", "conv relu pool"]),
        ("block", ["conv relu", "conv norm relu", "conv norm", "conv norm add relu"]),
        ("dropout", ["conv relu", "linear relu dropout", "linear"]),
    ],
)
def test_what_is_fused(name, chains):
    _, skip = build(name)
    assert fused_chains(skip, images()) == chains


class Watched:
    def __init__(self):
        self.calls = 0

    def __call__(self, *args):
        self.calls += 1


@pytest.mark.parametrize("index", [0, 1, 2, 4])
def test_a_watched_layer_is_called(index):
    _, skip = build("conv_norm_relu")
    run(skip, images())
    watched = Watched()
    handle = skip[index].register_forward_hook(watched)
    run(skip, images())
    assert watched.calls == 1
    handle.remove()
    run(skip, images())
    assert watched.calls == 1


def test_a_replaced_layer_is_seen():
    _, skip = build("conv_relu")
    x = images()
    skip(x)
    skip[2] = nn.Conv2d(8, 4, 1).to(memory_format=torch.channels_last)
    wus_ext.convert(skip)
    assert skip(x).shape[1] == 4


class Mutating(nn.Module):
    """Writes into the input of a chain after the chain has read it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = x * 1.0
        y = self.conv(x)
        x.relu_()
        return (y + x).relu()


def test_an_input_that_is_written_into_later():
    torch.manual_seed(0)
    stock = frozen(Mutating())
    skip = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(skip, True)
    x = images((2, 8, 6, 6))
    with torch.no_grad():  # stock's backward would refuse
        torch.testing.assert_close(skip(x), stock(x))


class Surrounded(nn.Module):
    """Runs a part in surroundings of its own, which no graph records."""

    def __init__(self, within):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.within = within

    def forward(self, x):
        with self.within():
            x = self.first(x).relu()
        return self.second(x.float())


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def no_autocast():
    return torch.autocast("cpu", enabled=False)


@pytest.mark.parametrize(
    ("within", "around"),
    [
        (torch.no_grad, nullcontext),
        (autocast, nullcontext),
        (no_autocast, autocast),
    ],
    ids=["no_grad", "autocast", "no_autocast"],
)
def test_a_part_with_surroundings_of_its_own_keeps_them(within, around):
    stock = frozen(Surrounded(within))
    skip = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(skip, True)
    run(skip, images())
    x, grad_output = images(), torch.randn(2, 4, 12, 10)
    with around():
        expected, wanted, _ = run(stock, x, grad_output.to(stock(x).dtype))
        actual, got, _ = run(skip, x, grad_output.to(expected.dtype))
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (got is None) == (wanted is None)
    for name, parameter in stock.named_parameters():
        assert (skip.get_parameter(name).grad is None) == (parameter.grad is None), name


def test_saved_tensor_hooks_in_forward_are_called():
    packed = []

    def hooks():
        return torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: packed.append(tensor.shape) or tensor, lambda tensor: tensor
        )

    skip = wus_ext.convert(Surrounded(hooks))
    wus_ext.set_skip(skip, True)
    run(skip, images())
    assert packed


@pytest.mark.filterwarnings("ignore:.*requires_grad=True. Gradients will be None")
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_stay_checkpointed(reentrant):
    class Checkpointed(Surrounded):
        def forward(self, x):
            return checkpoint(self.second, self.first(x), use_reentrant=reentrant)

    skip = wus_ext.convert(Checkpointed(None))
    wus_ext.set_skip(skip, True)
    calls = []
    skip.second.register_forward_pre_hook(lambda *_: calls.append(1))
    run(skip, images())
    assert len(calls) == 2


class Branching(nn.Module):
    """Control flow on values."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x).relu() if x.sum() > 0 else self.conv(-x)


class MakesConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x) * torch.tensor([2.0])


@pytest.mark.parametrize("cls", [Branching, MakesConstant])
def test_any_forward_fuses(cls):
    torch.manual_seed(0)
    stock = frozen(cls())
    skip = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(skip, True)
    for x in (images() + 1, images() - 1):
        check(stock, skip, x, tolerance=1e-6)
        assert len(fused_chains(skip, x)) == 1


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x, scale=None):
        y = self.conv(x)
        return y if scale is None else y * scale


def test_other_ways_to_call():
    model = wus_ext.convert(TwoInputs())
    wus_ext.set_skip(model, True)
    x = images()
    assert torch.allclose(model(x, 2.0), 2 * model(x), atol=1e-6)
    assert torch.allclose(model(x, scale=torch.tensor(3.0)), 3 * model(x), atol=1e-6)
    assert fused_chains(model, x, 2.0) == ["conv"]


def test_float64_takes_the_plain_path():
    stock, skip = build("conv_norm_relu_pool")
    x = images().double()
    check(stock.double(), skip.double(), x, 1e-10)
    assert not fused_chains(skip, x)


def test_float16_takes_the_plain_path():
    _, skip = build("conv_relu")
    with torch.autocast("cpu", torch.float16):
        assert not fused_chains(skip, images())
        assert skip(images()).dtype == torch.float16


@pytest.mark.parametrize("name", ["conv_norm_relu", "linear"])
def test_copies_have_an_engine_of_their_own(name):
    stock, skip = build(name)
    run(skip, images())
    for twin in (copy.deepcopy(skip), pickle.loads(pickle.dumps(skip))):
        assert twin._skip_engine is not skip._skip_engine
        assert wus_ext.packed_bytes(twin) == 0
        twin.load_state_dict(stock.state_dict())
        check(copy.deepcopy(stock), twin, images(), tolerance=2e-5)
        assert fused_chains(twin, images())
