"""What surrounds a forward: exceptions, checkpoints, autocast, functions of one's own."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import wus_ext
from tests.engine.faithful import Net, agree, mode, twins

from .chains import frozen, images, run


@mode
def test_an_exception_in_forward(mode):
    class Raises(Net):
        broken = False

        def forward(self, x):
            y = self.norm(self.first(x))
            if self.broken:
                self.left = y
                raise KeyError("broken")
            return self.head(y.relu().mean((2, 3)))

    stock, converted = twins(Raises, mode)
    for model in (stock, converted):
        model.broken = True
        torch.manual_seed(2)
        with pytest.raises(KeyError):
            model(images())
        model.broken = False
    torch.testing.assert_close(converted.left, stock.left, rtol=1e-4, atol=1e-5)
    agree(stock, converted, images())


@mode
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("where", ["inside", "around"])
@pytest.mark.filterwarnings("ignore:.*requires_grad=True. Gradients will be None")
def test_checkpoint(mode, reentrant, where):
    class Checkpointed(Net):
        def between(self, x):
            if where == "inside":
                return checkpoint(self.part, x, use_reentrant=reentrant)
            return self.part(x)

        def part(self, x):
            return F.dropout(torch.relu(self.second(x)), 0.3) + x

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=reentrant)

    stock, converted = twins(Checkpointed, mode)
    if where == "around":
        stock, converted = Around(stock), Around(converted)
    for _ in range(2):
        agree(stock, converted, images())


@mode
def test_saved_tensor_hooks(mode):
    packed = []

    class Hooks(Net):
        def between(self, x):
            with saved_tensors_hooks(lambda t: packed.append(t.data_ptr()) or t, lambda t: t):
                x = torch.relu(self.second(x)) * x
            return x

    stock, converted = twins(Hooks, mode)
    agree(stock, converted, images())
    assert packed


@mode
@pytest.mark.parametrize(
    "within",
    [
        torch.no_grad,
        torch.enable_grad,
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
    ],
)
def test_surroundings_within_and_around(mode, within):
    class Within(Net):
        def between(self, x):
            with within():
                y = self.second(x)
            return y.float().relu().clone() + x

    stock, converted = twins(Within, mode)
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(converted(x), stock(x), rtol=2e-2, atol=2e-2)
        with within():
            torch.testing.assert_close(converted(x).float(), stock(x).float(), rtol=2e-2, atol=2e-2)


class Doubles(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        assert x.requires_grad or not torch.is_grad_enabled()
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        assert x.shape == grad.shape
        return grad * 2


class StraightThrough(torch.autograd.Function):
    """Never touches what it is given."""

    @staticmethod
    def forward(ctx, x):
        return torch.ones(x.shape)

    @staticmethod
    def backward(ctx, grad):
        return grad


@mode
@pytest.mark.parametrize("function", [Doubles, StraightThrough])
def test_autograd_functions_of_ones_own(mode, function):
    class Own(Net):
        def between(self, x):
            return function.apply(x) * 0.5

    stock, converted = twins(Own, mode)
    for _ in range(2):
        agree(stock, converted, images())


@mode
def test_scripted_and_compiled_parts(mode):
    class Part(nn.Module):
        def forward(self, x):
            return x.sin() * 2

    class Parts(Net):
        def __init__(self, compiled):
            super().__init__()
            part = Part()
            self.part = torch.compile(part, backend="eager") if compiled else torch.jit.script(part)

        def between(self, x):
            return self.part(x)

    for compiled in (True, False):
        torch.manual_seed(0)
        stock = Parts(compiled)
        converted = Parts(compiled)
        converted.load_state_dict(stock.state_dict())
        if mode == "skip":
            wus_ext.set_skip(wus_ext.convert(converted), True)
            frozen(stock)
        else:
            wus_ext.convert(converted, full="fused")
        for _ in range(3):
            agree(stock, converted, images())


def test_deepcopy_and_pickle_inside_forward():
    class Copies(Net):
        def between(self, x):
            self.copied = copy.deepcopy(x)
            self.pointer = x.data_ptr()
            return x

    _, converted = twins(Copies, "skip")
    with torch.no_grad():
        converted(images())
    assert type(converted.copied) is torch.Tensor
    assert converted.pointer


def test_a_model_that_runs_a_model():
    inner = wus_ext.convert(Net(), full="fused")

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.conv = inner, nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x):
            return self.inner(torch.relu(self.conv(x)))

    torch.manual_seed(0)
    outer = wus_ext.convert(Outer(), full="fused")
    stock = wus_ext.revert(copy.deepcopy(outer))
    agree(stock, outer, images())
    for model in (stock, outer):
        run(model, images())
