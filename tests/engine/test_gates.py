"""Squeeze-and-excitation between chains: means of maps, and maps times a gate."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.ops import SqueezeExcitation

import wus_ext

from .chains import gradient_functions, images, saved_bytes, worst_error
from .faithful import agree, twins

GATE, MEAN = "Gate", "GlobalMeanFunction"
MODES = ("skip", "fused")


class Library(nn.Module):
    """Torchvision's: an adaptive pool, the gate first."""

    def __init__(self, channels, activation):
        super().__init__()
        self.block = SqueezeExcitation(channels, 4, activation=activation)

    def forward(self, x):
        return self.block(x)


class Own(nn.Module):
    """As others write it: a mean, the image first."""

    def __init__(self, channels, activation, keepdim=True):
        super().__init__()
        self.first, self.second = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.activation, self.keepdim = activation(), keepdim

    def forward(self, x):
        y = x.mean((-1, 2), self.keepdim)
        y = y if self.keepdim else y[:, :, None, None]
        return x * torch.sigmoid(self.second(self.activation(self.first(y))))


class Dropped(Own):
    def __init__(self, channels, activation):
        super().__init__(channels, activation, keepdim=False)


class Net(nn.Module):
    def __init__(self, kind=Library, activation=nn.ReLU, channels=8):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.activation = activation()
        self.gate = kind(channels, activation)
        self.last = nn.Conv2d(channels, 6, 1)

    def forward(self, x):
        return self.last(self.gate(self.activation(self.norm(self.conv(x)))))


def nodes(output):
    """The gradient functions behind a tensor that are ours, by the end of their names."""
    names = [name.split("::")[-1].rstrip(">") for name in gradient_functions(output)]
    return sorted(name for name in names if name in (GATE, MEAN))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Library, Own, Dropped])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.SiLU, nn.Hardswish])
def test_it_is_fused_and_right(kind, activation, mode):
    stock, ours = twins(Net, mode, kind, activation)
    x = images((2, 3, 9, 7))
    assert nodes(copy.deepcopy(ours)(x)) == [GATE, MEAN]
    agree(stock, ours, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 9, 7), (2, 1, 7), (2, 9, 1), (1, 1, 1), (5, 2, 2)])
@pytest.mark.parametrize("channels", [1, 2, 17])
def test_any_size_has_stock_s_values_and_strides(size, channels, mode):
    def net(kind):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, channels, 1), nn.ReLU(), kind(channels, nn.ReLU)
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)

    for kind in (Library, Own):
        stock, ours = net(kind), wus_ext.convert(net(kind), full="fused")
        wus_ext.set_skip(ours, mode == "skip")
        x = images((size[0], 3, *size[1:]))
        expected, actual = stock(x), ours(x)
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected)
        assert worst_error(net(kind), wus_ext.convert(net(kind), full="fused"), x) < 1e-5


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16(mode):
    stock, ours = twins(Net, mode, Library, nn.SiLU)
    exact, x = copy.deepcopy(stock).double(), images((4, 3, 16, 16))
    gradients = []
    for model, image in ((exact, x.double()), (stock, x), (ours, x)):
        image = image.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=model is not exact):
            output = model(image)
        if model is ours:
            assert nodes(output) == [GATE, MEAN]
        output.backward(torch.ones_like(output))
        gradients.append(image.grad.double())
    error = [(g - gradients[0]).norm() / gradients[0].norm() for g in gradients[1:]]
    assert error[1] < 1.2 * error[0]


class Bare(nn.Module):
    """An image of the user's own, which no chain has made, and a function of it."""

    def __init__(self, function, channels=3):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, channels).view(1, channels, 1, 1))
        self.conv, self.function = nn.Conv2d(channels, 4, 1), function

    def forward(self, x):
        return self.conv(self.function(x, self.scale))


FUNCTIONS = {
    "gate of every image": lambda x, s: x * s.expand(len(x), -1, 1, 1),
    "gate of the batch": lambda x, s: x * s,
    "map": lambda x, s: x * x.mean(1, keepdim=True).sigmoid(),
    "number": lambda x, s: x * 2.0,
    "square": lambda x, s: x * x,
    "other type": lambda x, s: (x * s.expand(len(x), -1, 1, 1).double()).float(),
    "gate in another layout": lambda x, s: x * s.expand(len(x), 3, 2, 2)[..., 1:, 1:],
    "in place": lambda x, s: x.clone().mul_(s.expand(len(x), -1, 1, 1)),
    "mean of the type asked for": lambda x, s: (
        x * x.mean((2, 3), True, dtype=torch.float64).float()
    ),
    "mean of lines": lambda x, s: x * x.mean(2, True),
    "mean of channels": lambda x, s: x * x.mean((1, 2), True),
    "mean of all": lambda x, s: x * x.mean(),
    "smaller": lambda x, s: x * F.interpolate(F.adaptive_avg_pool2d(x, (1, 2)), x.shape[2:]),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_neighbours(name, mode):
    stock, ours = twins(Bare, mode, FUNCTIONS[name])
    agree(stock, ours, images((2, 3, 8, 8)))


class Seen(Net):
    """Somebody looks at the gradient of what is squeezed, before it is or later."""

    def __init__(self, squeeze, look, late):
        super().__init__()
        self.squeeze, self.look, self.late = squeeze, look, late

    def forward(self, x):
        x = self.activation(self.norm(self.conv(x)))
        if not self.late:
            self.look(self, x)
        y = self.squeeze(x)
        if self.late:
            self.look(self, x)
        return self.last(y)


SQUEEZES = {
    "mean alone": lambda x: x.mean((2, 3), True),
    "pool alone": lambda x: F.adaptive_avg_pool2d(x, 1),
    "gate": lambda x: x * x.mean((2, 3), True),
}


def scaled(model, x):
    x.register_hook(lambda g: g.mul_(2))


def held_too(model, x):
    model.inner = x
    x.retain_grad()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("squeeze", SQUEEZES)
@pytest.mark.parametrize("look", [scaled, held_too])
@pytest.mark.parametrize("late", [False, True])
def test_gradients_that_are_looked_at(squeeze, look, late, mode):
    stock, ours = twins(Seen, mode, SQUEEZES[squeeze], look, late)
    agree(stock, ours, images((2, 3, 9, 7)))
    if look is held_too:
        assert ours.inner.grad.stride() == stock.inner.grad.stride()
        torch.testing.assert_close(ours.inner.grad, stock.inner.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("squeeze", SQUEEZES)
def test_gradients_that_are_asked_for(squeeze, mode):
    gradients = []
    x = images((2, 3, 9, 7))
    for model in twins(Seen, mode, SQUEEZES[squeeze], held_too, True):
        output = model(x)
        (grad,) = torch.autograd.grad(output.square().sum(), model.inner)
        grad[0, 0, 0, 0] = 7
        gradients.append(grad)
    assert gradients[0].stride() == gradients[1].stride()
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


class Flat(nn.Module):
    """Its image's gradient comes back in NCHW."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(-1, 1, 3).view(1, 3, 1, 1))
        self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(192, 4)

    def forward(self, x):
        return self.head((x * self.scale.expand(len(x), -1, 1, 1)).flatten(1))


def test_a_gradient_in_another_layout():
    gradients = []
    image = images((2, 3, 8, 8))
    for model in twins(Flat, "fused"):
        x = image.clone().requires_grad_()
        gradients.append(torch.autograd.grad(model(x).square().sum(), [x, model.scale]))
    for expected, actual in zip(*gradients, strict=True):
        assert actual.stride() == expected.stride()
        torch.testing.assert_close(actual, expected)


class NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


LAYERS = {
    "linear": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 8)),
    "dropout alone": lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout()),
    "3-D linear": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Linear(4, 4), nn.Flatten()),
    "conv1d": lambda: nn.Sequential(nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 1), nn.Flatten()),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*SQUEEZES, "nothing", *LAYERS])
def test_where_no_gradient_comes_none_goes(name, mode):
    """Also through chains and layers: a parameter has no gradient then, not one of zeros."""
    if name in LAYERS:
        models, image = twins(LAYERS[name], mode), torch.randn(4, 8)
    else:
        squeeze = {"nothing": lambda x: x, **SQUEEZES}[name]
        models = twins(Seen, mode, squeeze, lambda model, x: None, True)
        image = images((2, 3, 9, 7))
    for model in models:
        x = image.clone().requires_grad_()
        (NoGradient.apply(model(x)).sum() + x.sum()).backward()
        assert all(p.grad is None for p in model.parameters())
        assert torch.equal(x.grad, torch.ones_like(x))


class Alone(Bare):
    """Without a fused layer in the way."""

    def forward(self, x):
        return self.function(x, self.scale)


def test_the_gate_has_a_second_derivative():
    image = images((2, 3, 8, 8))

    def twice(model):
        x = image.clone().requires_grad_()
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, model.scale])

    stock, ours = twins(Alone, "fused", FUNCTIONS["gate of every image"])
    assert nodes(ours(image)) == [GATE]
    for actual, expected in zip(twice(ours), twice(stock), strict=True):
        torch.testing.assert_close(actual, expected)


def test_an_image_that_was_changed_is_refused_as_by_stock():
    stock, ours = twins(
        Bare, "fused", lambda x, s: kept.append(x * 1) or kept[-1] * s.expand(2, -1, 1, 1)
    )
    for model in (stock, ours):
        kept = []
        output = model(images((2, 3, 8, 8)))
        kept[0].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_no_more_is_saved_than_by_stock():
    stock, ours = twins(Net, "skip", Own, nn.ReLU)
    x = images((4, 3, 32, 32))
    assert saved_bytes(ours, x)[0] <= saved_bytes(stock, x)[0]


@pytest.mark.parametrize("kind", [Library, Own])
def test_stock_full_steps_are_stock_bit_for_bit(kind):
    torch.manual_seed(0)
    stock = Net(kind).to(memory_format=torch.channels_last)
    ours, x = wus_ext.convert(copy.deepcopy(stock)), images((2, 3, 9, 7))
    for model in (stock, ours):
        output = model(x)
        assert nodes(output) == []
        output.square().sum().backward()
    for actual, expected in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(actual.grad, expected.grad)


def test_a_gate_may_change_where_its_image_needs_no_gradient():
    def function(x, s):
        gate = s.sigmoid().expand(len(x), -1, 1, 1).clone()
        y = x * gate
        gate.mul_(2)
        return y

    stock, ours = twins(Bare, "fused", function)
    for model in (stock, ours):
        model(images((2, 3, 8, 8))).sum().backward()
        model.scale.grad = None


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.scale = nn.Conv2d(3, 4, 1), nn.Parameter(torch.ones(()))

    def forward(self, x):
        parts = [torch.randn(3, 5, 4), torch.randn(3, 7, 6)]
        nested = torch.nested.nested_tensor(parts, requires_grad=True)
        return self.conv(x) + (nested * 2.0).to_padded_tensor(0.0).sum() * self.scale


@pytest.mark.parametrize("mode", MODES)
def test_nested_tensors(mode):
    agree(*twins(Nested, mode), images((2, 3, 8, 8)))


BAD = {
    "mean": lambda x: x.mean((6, 7)),
    "mean over one": lambda x: x.mean((2, 7)),
    "pool": lambda x: torch.ops.aten.adaptive_avg_pool2d(x, [1]),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused_as_by_stock(bad):
    refused = []
    for model in twins(Seen, "fused", BAD[bad], lambda model, x: None, False):
        with pytest.raises((IndexError, RuntimeError)) as error:
            model(images())
        refused.append((error.type, str(error.value).splitlines()[0]))
    assert refused[0] == refused[1]


def test_symbolic_sizes():
    def half(x):
        return F.adaptive_avg_pool2d(x, (x.shape[2] // 2, x.shape[3] // 2))

    for model in twins(Bare, "fused", lambda x, s: half(x)):
        graph = make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
            images((2, 3, 8, 8))
        )
        assert graph(images((2, 3, 8, 8))).shape == (2, 4, 4, 4)


class Statistics(nn.Module):
    """A gate that is a view of running statistics, which the norm is about to move."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        gate = self.norm.running_mean.view(1, -1, 1, 1)
        y = self.norm(self.conv(x))
        return self.last(x * gate) + self.last(y)


@pytest.mark.parametrize("mode", MODES)
def test_running_statistics_as_a_gate(mode):
    agree(*twins(Statistics, mode), images((1, 3, 8, 8)))
