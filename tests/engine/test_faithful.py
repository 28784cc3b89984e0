"""The user's own forward runs in every step: what people's forward methods really contain."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.engine.faithful import Net, agree, mode, twins

from .chains import fused_chains, images, relative_error


class Remembers(Net):
    """Attributes, buffers, lists, caches and counters written in forward."""

    def __init__(self):
        super().__init__()
        self.register_buffer("center", torch.zeros(8))
        self.seen, self.calls, self.cache = [], 0, {}

    def between(self, x):
        self.features = x
        self.seen.append(x)
        self.calls += 1
        self.cache[tuple(x.shape)] = x.shape[0]
        pooled = x.mean((2, 3))
        if self.training:
            self.center = 0.9 * self.center + 0.1 * pooled.detach().mean(0)
        return x - self.center[:, None, None]


@mode
def test_forward_writes(mode):
    stock, converted = twins(Remembers, mode)
    for _ in range(3):
        agree(stock, converted, images())
    assert converted.calls == 3
    assert converted.cache == {(2, 8, 12, 10): 2}
    for kept in (converted.features, *converted.seen):
        assert type(kept) is torch.Tensor
        assert kept.untyped_storage().nbytes() == kept.numel() * 4
    assert relative_error(converted.features, stock.features) < 1e-4
    assert set(converted.state_dict()) == set(stock.state_dict())
    converted.features = converted.seen = stock.features = stock.seen = None
    copy.deepcopy(converted)


class Asks(Net):
    """Python questions: types, values, attributes that change, random draws."""

    scale = 1.0

    def between(self, x):
        assert isinstance(x, torch.Tensor)
        assert type(x) is torch.Tensor
        assert x.requires_grad == torch.is_grad_enabled()
        assert x.is_floating_point()
        assert not x.is_sparse
        assert len(x) == x.shape[0] == x.size(0)
        if x.mean() > 0.1 and self.scale < 2:
            x = x * self.scale
        if torch.rand(()) < 0.5:
            return x + torch.rand_like(x)
        return x


@mode
def test_forward_asks(mode):
    stock, converted = twins(Asks, mode)
    for scale in (1.0, 1.5, 3.0):
        stock.scale = converted.scale = scale
        agree(stock, converted, images())


def test_every_branch_is_taken():
    class Branches(Net):
        def between(self, x):
            return x if torch.rand(()) < 0.5 else self.second(x)

    _, converted = twins(Branches, "skip")
    lengths = {len(fused_chains(converted, images())) for _ in range(20)}
    assert lengths == {3, 4}


@mode
@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.mul_(2),
        lambda x: x.add_(1).relu_(),
        lambda x: (x, x.mul_(2))[0],
        lambda x: (x.view(-1).mul_(2), x)[1] if x.is_contiguous() else x.mul_(2),
        lambda x: (x[:, :4].zero_(), x)[1],
        lambda x: x.flatten(2).transpose(1, 2).transpose(1, 2).unflatten(2, (12, 10)),
        lambda x: torch.cat([x[:, 4:], x[:, :4]], 1),
        lambda x: x + x,
        lambda x: x + x.detach(),
        lambda x: x.clone(),
        lambda x: F.relu(x, inplace=True) * 2,
        lambda x: torch.stack([x, x.sin()]).sum(0),
        lambda x: x.data + x,
        lambda x: torch.where(x > 0.5, x, x * 0.5),
        lambda x: F.dropout(x, 0.5),
        lambda x: F.max_pool2d(x, 2) * 1.0,
        lambda x: F.max_pool2d(x, 2, ceil_mode=True, return_indices=True)[0],
        lambda x: sum(x.unbind(0)).expand(2, -1, -1, -1) + x,
        lambda x: torch.from_dlpack(x.detach()) + x,
        lambda x: torch.utils.dlpack.from_dlpack(x.detach()) * x,
        lambda x: x + float(x.detach().numpy().sum()) * 0.01,
        lambda x: x.to(torch.float64).to(torch.float32),
        lambda x: torch.vmap(lambda image: image * 2)(x),
    ],
)
def test_what_is_done_with_an_output(mode, between):
    class Between(Net):
        def activation(self, x):
            return x  # stock's ReLU keeps its output, and backward would refuse writes to it

        def between(self, x):
            return between(x)

    stock, converted = twins(Between, mode)
    for _ in range(2):
        agree(stock, converted, images())


@mode
@pytest.mark.parametrize(
    "forward",
    [
        # the output of a convolution under a second name, before and after it is taken in
        lambda m, x: ((y := m.first(x)), torch.relu(y) + y)[1],
        lambda m, x: ((y := m.first(x)), (z := torch.relu(y)), y.mul_(2), z + y)[3],
        lambda m, x: ((y := m.first(x)), (z := y), torch.relu_(y), z * 2)[3],
        lambda m, x: ((y := m.norm(m.first(x))), torch.cat([y, y.relu()], 1)[:, :8])[1],
        lambda m, x: ((y := m.first(x)), (a := y + 1), (b := y.relu()), a * b)[3],
        lambda m, x: ((y := m.first(x)), m.norm(y) + y)[1],
        lambda m, x: ((y := m.first(x)), m.second(y) + y)[1],
        lambda m, x: ((y := m.first(x)), m.second(y.relu()) + m.second(y))[1],
        lambda m, x: ((y := m.first(x)), (r := x.mean(1, True).expand_as(y)), y + r, r + y)[3],
        lambda m, x: ((y := m.first(x)), (z := y + y.detach()), y.relu_() + z)[2],
    ],
)
def test_several_names_for_one_output(mode, forward):
    class Shared(Net):
        def forward(self, x):
            return self.head(forward(self, x).mean((2, 3)))

    stock, converted = twins(Shared, mode)
    for _ in range(2):
        agree(stock, converted, images())


@mode
def test_an_input_written_in_place_while_its_layer_waits(mode):
    class Overwrites(Net):
        def forward(self, x):
            x = x * 1.0
            y = self.first(x)
            x.fill_(7)
            return y

    stock, converted = twins(Overwrites, mode)
    with torch.no_grad():
        x = images()
        torch.testing.assert_close(converted(x), stock(x), rtol=1e-4, atol=1e-5)


@mode
@pytest.mark.parametrize("write", ["in_place", "swap", "data"])
def test_parameters_written_between_call_and_use(mode, write):
    class Quantises(Net):
        def forward(self, x):
            weight = self.first.weight
            before = weight.data.clone()
            if write == "data":
                weight.data = weight.data.sign() * 0.1
                y = self.first(x)
                return y.detach() * 1.0 + 0 * (setattr(weight, "data", before) or 0)
            y = self.first(x)
            with torch.no_grad():
                self.first.bias.add_(1)
                if write == "swap":
                    bias, self.first.bias = self.first.bias, nn.Parameter(torch.zeros(8))
                    del bias
            return y

    if mode == "skip" and write == "data":
        pytest.skip("in a skip step forward reads a constant, whose memory is the weight's")
    stock, converted = twins(Quantises, mode)
    with torch.no_grad():
        x = images()
        torch.testing.assert_close(converted(x), stock(x), rtol=1e-4, atol=1e-5)


class Hooked(Net):
    """Gradient hooks and kept gradients, before and after an output is used."""

    def __init__(self, when, how):
        super().__init__()
        self.when, self.how = when, how

    def watch(self, x):
        if self.how == "retain":
            x.retain_grad()
            self.kept = x
        else:
            x.register_hook(lambda grad: self.grads.append(grad) or grad * 2)

    def forward(self, x):
        self.grads = []
        x = torch.relu(self.norm(self.first(x)))
        if self.when == "before":
            self.watch(x)
        y = torch.relu(self.second(x))
        if self.when == "after":
            self.watch(x)
        return self.head(y.mean((2, 3))) + x.mean((1, 2, 3))[:, None]


@mode
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["hook", "retain"])
def test_gradient_hooks(mode, when, how):
    stock, converted = twins(Hooked, mode, when, how)
    agree(stock, converted, images())
    if how == "retain":
        assert relative_error(converted.kept.grad, stock.kept.grad) < 1e-4
    else:
        (mine,), (theirs,) = converted.grads, stock.grads
        assert relative_error(mine, theirs) < 1e-4


def test_grad_cam_outside_of_forward():
    class Cam(Net):
        def between(self, x):
            self.map = x
            return x

    stock, converted = twins(Cam, "skip")
    x = images()
    for model in (stock, converted):
        output = model(x.clone().requires_grad_())
        model.map.retain_grad()
        output[:, 1].sum().backward()
    assert relative_error(converted.map.grad, stock.map.grad) < 1e-4


@mode
def test_forward_hooks_see_plain_tensors(mode):
    stock, converted = twins(Net, mode)
    seen = {"stock": [], "converted": []}
    for name, model in (("stock", stock), ("converted", converted)):
        for layer in (model.first, model.norm):
            layer.register_forward_hook(
                lambda module, args, output, name=name: seen[name].append(output.detach().clone())
            )
    agree(stock, converted, images())
    for mine, theirs in zip(seen["converted"], seen["stock"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@mode
def test_a_forward_replaced_on_an_instance(mode):
    stock, converted = twins(Net, mode)
    for model in (stock, converted):
        forward = model.second.forward
        model.second.forward = lambda x, forward=forward: forward(x) * 100
    agree(stock, converted, images())


Pair = namedtuple("Pair", "first second")


@dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor


@mode
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, y: OrderedDict(out=x, aux=y),
        lambda x, y: {"a": [x], "b": (y,)},
        Pair,
        Output,
        lambda x, y: (x, y, None, 3),
    ],
)
def test_output_types(mode, wrap):
    class Wraps(Net):
        def forward(self, x):
            y = self.first(x)
            return wrap(self.second(torch.relu(y)), y)

    stock, converted = twins(Wraps, mode)
    expected, actual = stock(images()), converted(images())
    assert type(actual) is type(expected)
    flat = torch.utils._pytree.tree_leaves(vars(actual) if isinstance(actual, Output) else actual)
    assert all(type(x) in (torch.Tensor, int, type(None)) for x in flat)


@mode
def test_inputs_of_other_kinds(mode):
    class Keywords(Net):
        def forward(self, x, *, scale=1.0, extra=None):
            y = super().forward(x) * scale
            return y if extra is None else y + extra["more"]

    stock, converted = twins(Keywords, mode)
    x = images()
    for kwargs in ({"scale": 2.0}, {"extra": {"more": torch.ones(4)}}):
        torch.testing.assert_close(converted(x, **kwargs), stock(x, **kwargs), rtol=1e-4, atol=1e-5)
    assert fused_chains(converted, nn.Parameter(x)) == fused_chains(converted, x)


class Tagged(torch.Tensor):
    """A subclass by __torch_function__ alone."""


@mode
def test_a_tensor_subclass_as_input(mode):
    stock, converted = twins(Net, mode)
    x = images().as_subclass(Tagged)
    expected, actual = stock(x), converted(x)
    assert type(actual) is type(expected) is Tagged
    torch.testing.assert_close(
        actual.as_subclass(torch.Tensor),
        expected.as_subclass(torch.Tensor),
        rtol=1e-4,
        atol=1e-5,
    )


@mode
def test_numbers_changed_later(mode):
    class Pools(Net):
        def __init__(self):
            super().__init__()
            self.pool = nn.MaxPool2d(2)

        def between(self, x):
            return self.pool(x)

    stock, converted = twins(Pools, mode)
    agree(stock, converted, images())
    for model in (stock, converted):
        model.pool.kernel_size, model.norm.eps, model.norm.momentum = 3, 0.5, 0.7
        model.second.stride = (2, 1)
    agree(stock, converted, images())


@mode
def test_one_norm_in_two_places_counts_in_order(mode):
    class Siamese(Net):
        def forward(self, x):
            a = self.norm(self.first(x))
            b = self.norm(self.first(x * 3 + 1))
            unused = self.norm(self.first(x + 5))
            del unused
            return self.head((b.relu() + a.relu()).mean((2, 3)))

    stock, converted = twins(Siamese, mode)
    for _ in range(2):
        agree(stock, converted, images())


@mode
def test_statistics_read_in_forward(mode):
    class Reads(Net):
        def forward(self, x):
            y = self.norm(self.first(x))
            self.read = self.norm.running_mean.clone()
            return y.relu()

    stock, converted = twins(Reads, mode)
    for model in (stock, converted):
        torch.manual_seed(3)
        model(images())
    torch.testing.assert_close(converted.read, stock.read, rtol=1e-4, atol=1e-6)
