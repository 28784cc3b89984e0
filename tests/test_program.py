"""The skip program: every fused chain against the stock chain, and when a model is not fused."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import wus_ext
from wus_ext.algorithms import Act
from wus_ext.chains import ConvChain, DropoutChain, LinearChain
from wus_ext.choice import packed_nbytes
from wus_ext.geometry import Scheme


class Functional(nn.Module):
    """The same chains through functions and methods, with a residual."""

    def __init__(self, channels=8, in_place=False):
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.third = nn.Conv2d(channels, channels, 3, padding=1)
        self.in_place = in_place

    def forward(self, x):
        x = F.relu(self.first(x))
        y = self.norm(self.second(x))
        if self.in_place:
            y += x
        else:
            y = x + y
        y = y.relu()
        return F.max_pool2d(torch.relu_(self.third(y)), 2)


class Block(nn.Module):
    """Two branches that both end in a norm: one takes the sum, the other stays a chain."""

    def __init__(self, channels=8):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.down = nn.Sequential(nn.Conv2d(channels, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + self.down(x))


def conv(*args, **kwargs):
    return nn.Conv2d(*args, **kwargs)


def untracked(norm):
    """Statistics that are kept but not tracked any more."""
    norm.track_running_stats = False
    return norm


def sequence(*layers):
    return lambda: nn.Sequential(*(copy.deepcopy(layer) for layer in layers))


CHANNELS = 16
CHAINS = {
    "conv": sequence(conv(3, 8, 3, padding=1), conv(8, CHANNELS, 3, padding=1)),
    "conv_relu": sequence(
        conv(3, 8, 3, padding=1), nn.ReLU(), conv(8, CHANNELS, 3, padding=1), nn.ReLU()
    ),
    "conv_relu_pool": sequence(
        conv(3, 8, 3, padding=1), nn.ReLU(True), nn.MaxPool2d(2),
        conv(8, CHANNELS, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2, 2),
    ),
    "conv_norm": sequence(
        conv(3, 8, 3, padding=1), conv(8, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)
    ),
    "conv_norm_relu": sequence(
        conv(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        conv(8, CHANNELS, 3, padding=1, bias=False), nn.BatchNorm2d(CHANNELS), nn.ReLU(),
    ),
    "conv_norm_relu_pool": sequence(
        conv(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        conv(8, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS), nn.ReLU(), nn.MaxPool2d(2),
    ),
    "norm_options": sequence(
        conv(3, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False), nn.ReLU(),
        conv(8, 8, 3, padding=1), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(),
        conv(8, 8, 3, padding=1), untracked(nn.BatchNorm2d(8)), nn.ReLU(),
        conv(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=None, eps=1e-2),
    ),
    "other_geometries": sequence(
        conv(3, 8, 3, padding=1), nn.ReLU(), conv(8, 8, 3, stride=2), nn.ReLU(),
        conv(8, 8, 1), nn.ReLU(), conv(8, 8, 3, padding=2, dilation=2), nn.ReLU(),
        conv(8, 8, 3, padding=1, groups=4), nn.ReLU(), conv(8, 8, (1, 3), padding=(0, 1)),
    ),
    "paddings": sequence(
        conv(3, 8, 3, padding=2), nn.ReLU(), conv(8, 8, 3), nn.ReLU(),
        conv(8, 8, 3, padding=2), nn.ReLU(), conv(8, 8, 3, padding="same"), nn.ReLU(),
        conv(8, 8, 3, padding=1, padding_mode="reflect"), nn.ReLU(),
    ),
    "odd_channels": sequence(
        conv(3, 13, 3, padding=1), nn.ReLU(), conv(13, 9, 3, padding=1), nn.BatchNorm2d(9),
        nn.ReLU(), conv(9, 1, 3, padding=1), nn.ReLU(),
    ),
    "functional": Functional,
    "in_place_sum": lambda: Functional(in_place=True),
    "block": lambda: nn.Sequential(conv(3, 8, 3, padding=1), nn.ReLU(), Block()),
    "linear": sequence(
        conv(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(16, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(True), nn.Linear(512, 3),
    ),
    "dropout": sequence(
        conv(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(0.3), nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.4), nn.Linear(24, 3),
    ),
}  # fmt: skip
chain = pytest.mark.parametrize("name", CHAINS)


def frozen(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def stock_chain(name, channels_last=True):
    """A stock model of the table, its scales and shifts away from one and zero."""
    torch.manual_seed(0)
    stock = CHAINS[name]()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return stock.to(memory_format=torch.channels_last) if channels_last else stock


def build(name, *, channels_last=True, **settings):
    """A stock model frozen stock's way, and its converted twin in a skip window."""
    stock = stock_chain(name, channels_last)
    skip = wus_ext.convert(copy.deepcopy(stock), **settings)
    wus_ext.set_skip(skip, True)
    return frozen(stock), skip


def images(size=(2, 3, 12, 10), channels_last=True):
    x = torch.randn(size)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def run(model, x, grad_output=None, seed=1):
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)
    output = model(x)
    if grad_output is None:
        grad_output = torch.randn_like(output)
    output.backward(grad_output)
    return output.detach(), x.grad, grad_output


def relative_error(actual, expected):
    """Of all values together; a gradient may differ where rounding flips one ReLU."""
    scale = expected.double().norm().clamp(min=1e-3)
    return ((actual.double() - expected.double()).norm() / scale).item()


def check(stock, skip, x, tolerance):
    """Outputs, gradients and buffers agree.

    A value within rounding of zero may pass one ReLU and not the other; it is about one input in
    ten that has one. So one input of three has to agree, which no systematic error survives.
    """
    for _ in range(3):
        error = worst_error(stock, skip, x)
        if error < tolerance:
            return
        x = torch.randn_like(x)
    raise AssertionError(f"relative error {error:.1e}, at most {tolerance:.1e} wanted")


def worst_error(stock, skip, x):
    stock.zero_grad()
    skip.zero_grad()
    expected, wanted, grad_output = run(stock, x)
    actual, got, _ = run(skip, x, grad_output)
    assert actual.shape == expected.shape
    errors = [relative_error(actual, expected), relative_error(got, wanted)]
    # A bias in front of batch statistics has a gradient of zero; stock's is the rounding of others.
    scale = 1 + max(p.grad.norm().item() for p in stock.parameters() if p.grad is not None)
    biases = 0
    for (name, mine), (_, theirs) in zip(
        skip.named_parameters(), stock.named_parameters(), strict=True
    ):
        if theirs.grad is None:
            assert mine.grad is None, name
        else:
            biases += 1
            errors.append((mine.grad - theirs.grad).norm().item() / scale)
    assert biases
    for (name, mine), (_, theirs) in zip(skip.named_buffers(), stock.named_buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=name)
    return max(errors)


def program(model):
    """The program derived last."""
    return next(reversed(model._skip_programs._programs.values()), None)


@pytest.mark.parametrize("algo", ["direct", "f2", "f4"])
@chain
def test_a_chain_equals_stock(name, algo):
    stock, skip = build(name, algo=algo)
    check(stock, skip, images(), tolerance=2e-5)
    assert program(skip).chains


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


@pytest.mark.parametrize("name", ["conv_norm_relu", "block", "conv_norm_relu_pool", "functional"])
def test_frozen_statistics(name):
    """norm="frozen" is stock with the norm layers in evaluation mode."""
    stock, skip = build(name, norm="frozen")
    run(stock, images())
    skip.load_state_dict(stock.state_dict())
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    check(stock, skip, images(), tolerance=3e-5)


@pytest.mark.parametrize("fuse", [True, False])
def test_frozen_statistics_layer_by_layer_too(fuse):
    _, skip = build("conv_norm_relu", norm="frozen", fuse=fuse)
    before = copy.deepcopy(dict(skip.named_buffers()))
    run(skip, images())
    for name, buffer in skip.named_buffers():
        assert torch.equal(buffer, before[name]), name
    wus_ext.set_skip(skip, False)
    run(skip, images())
    assert not torch.equal(skip[1].running_mean, before["1.running_mean"])


@pytest.mark.parametrize("name", ["conv_norm_relu", "block"])
def test_gamma_trains_if_asked(name):
    stock, skip = build(name, skip_gamma=False)
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_()
    check(stock, skip, images(), tolerance=2e-5)


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


@pytest.mark.parametrize(
    ("name", "acts"),
    [
        ("conv_relu_pool", [Act.RELU_POOL, Act.RELU_POOL]),
        ("conv_norm_relu", [Act.RELU, Act.RELU]),
        ("functional", [Act.RELU, Act.RELU, Act.RELU_POOL]),
        ("in_place_sum", [Act.RELU, Act.RELU, Act.RELU_POOL]),
        ("block", [Act.RELU, Act.RELU, Act.RELU, Act.NONE]),
    ],
)
def test_what_is_fused(name, acts):
    _, skip = build(name)
    skip(images())
    assert [c.act for c in program(skip).chains.values()] == acts


def test_linear_chains():
    _, skip = build("dropout")
    skip(images())
    kinds = [type(c) for c in program(skip).chains.values()]
    assert kinds == [ConvChain, DropoutChain, LinearChain, LinearChain]


def saved_bytes(model, x):
    known = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers(), x]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    return sum(t.untyped_storage().nbytes() for t in saved.values()), output


@pytest.mark.parametrize(("name", "part"), [("conv_relu", 0.04), ("conv_relu_pool", 0.2)])
def test_masks_are_saved_instead_of_activations(name, part):
    stock, skip = build(name)
    stocks, _ = saved_bytes(stock, images((4, 3, 16, 16)))
    ours, _ = saved_bytes(skip, images((4, 3, 16, 16)))
    assert 0 < ours <= part * stocks


def check_gradients(stock, skip, x):
    """Gradients of parameters only, of an input without one."""
    expected = stock(x)
    grad_output = torch.randn_like(expected)
    expected.backward(grad_output)
    skip(x).backward(grad_output)
    for (name, mine), theirs in zip(skip.named_parameters(), stock.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None), name
        if theirs.grad is not None:
            assert (mine.grad - theirs.grad).norm() < 2e-4 * (1 + theirs.grad.norm()), name


@pytest.mark.parametrize("name", ["conv_norm_relu", "conv_norm_relu_pool", "norm_options"])
def test_a_norm_without_an_input_gradient_keeps_its_mask_only(name):
    stock, skip = build(name)
    x = images()
    z = stock[0](x).nbytes
    assert saved_bytes(skip, x)[0] <= saved_bytes(skip, x.clone().requires_grad_())[0] - z
    check_gradients(stock, skip, x)
    for norm in stock:
        if isinstance(norm, nn.BatchNorm2d):
            norm.requires_grad_(True)
    stock.zero_grad()
    skip = wus_ext.convert(copy.deepcopy(stock), skip_gamma=False)
    wus_ext.set_skip(skip, True)
    check_gradients(stock, skip, x)


def test_a_residual_without_an_input_gradient():
    stock, skip = build("block")
    first = ["0", "2.conv1", "2.bn1"]
    wus_ext.set_skip(skip, True, layers=first, skip_biases=True)
    for name in first:
        stock.get_submodule(name).requires_grad_(False)
    check_gradients(stock, skip, images())
    assert stock[2].down[1].bias.grad is not None
    assert stock[2].bn2.bias.grad is not None


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


class Unreadable(nn.Module):
    """Control flow on values: torch.fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


class MakesConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(x) * torch.tensor([2.0])


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x, scale=None):
        y = self.conv(x)
        return y if scale is None else y * scale


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


@pytest.mark.parametrize("cls", [Unreadable, MakesConstant])
def test_an_untraceable_model_runs_layer_by_layer(cls):
    torch.manual_seed(0)
    stock = frozen(cls())
    skip = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(skip, True)
    for x in (images() + 1, images() - 1):
        check(stock, skip, x, tolerance=1e-6)
    assert program(skip) is None


def test_other_ways_to_call_run_layer_by_layer():
    model = wus_ext.convert(TwoInputs())
    wus_ext.set_skip(model, True)
    x = images()
    assert torch.allclose(model(x, 2.0), 2 * model(x), atol=1e-6)
    assert torch.allclose(model(x, scale=torch.tensor(3.0)), 3 * model(x), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_take_the_plain_path(dtype):
    stock, skip = build("conv_norm_relu_pool")
    check(
        stock.to(dtype), skip.to(dtype), images().to(dtype), 1e-10 if dtype.itemsize == 8 else 0.1
    )


def test_autocast_takes_the_plain_path():
    _, skip = build("conv_relu")
    with torch.autocast("cpu", torch.bfloat16):
        output = skip(images())
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["conv_norm_relu", "linear"])
def test_copies_make_their_own_program(name):
    stock, skip = build(name)
    run(skip, images())
    for twin in (copy.deepcopy(skip), pickle.loads(pickle.dumps(skip))):
        assert program(twin) is None
        twin.load_state_dict(stock.state_dict())
        check(copy.deepcopy(stock), twin, images(), tolerance=2e-5)
        assert program(twin) is not program(skip)


def test_packed_weights_live_as_long_as_their_window():
    _, skip = build("conv_relu", algo="f4")
    assert wus_ext.packed_bytes(skip) == 0
    run(skip, images())
    packed = wus_ext.packed_bytes(skip)
    assert packed > 0
    run(skip, images())
    assert wus_ext.packed_bytes(skip) == packed
    wus_ext.set_skip(skip, False)
    assert wus_ext.packed_bytes(skip) == 0


def test_a_full_step_drops_the_packed_weights_of_single_skip_steps():
    _, skip = build("conv_relu", algo="f4")
    wus_ext.set_skip(skip, False)
    with wus_ext.skip_weight_updates(skip):
        run(skip, images())
    assert wus_ext.packed_bytes(skip) > 0
    run(skip, images())
    assert wus_ext.packed_bytes(skip) == 0


@pytest.mark.parametrize("algo", ["f2", "f4"])
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_a_changed_weight_is_packed_again(algo, norm):
    stock, skip = build("conv_norm_relu", algo=algo, norm=norm)
    if norm == "frozen":
        stock.eval()
    run(skip, images())
    with torch.no_grad():
        for model in (stock, skip):
            model[3].weight.mul_(0.5)
            model[4].weight.add_(0.25)
            model[4].running_var.copy_(torch.full((CHANNELS,), 2.0))
            model[4].running_mean.zero_()
    skip.load_state_dict(stock.state_dict())
    check(stock, skip, images(), tolerance=2e-5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "neither"])
def test_dropout_keeps_the_layout(layout):
    x = images()
    x = {
        "contiguous": x.contiguous(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "neither": x.transpose(2, 3),
    }[layout].requires_grad_()
    grad_output = torch.randn_like(x)
    results = []
    for dropout in (nn.Dropout(0.3), DropoutChain(nn.Dropout(0.3))):
        torch.manual_seed(1)
        output = dropout(x)
        results.append((output, *torch.autograd.grad(output, x, grad_output)))
        assert output.stride() == x.stride()
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("algo", ["direct", "f4"])
def test_evaluation_between_skip_steps_takes_the_newest_statistics(algo):
    stock, skip = build("conv_norm_relu", algo=algo)
    for factor in (1, 3):
        x = factor * images()
        for model in (stock, skip):
            run(model.train(), x)
        torch.testing.assert_close(skip.eval()(x), stock.eval()(x), rtol=1e-4, atol=1e-5)


def test_evaluation_packs_for_the_forward_pass_only():
    _, skip = build("conv_relu", algo="f4")
    with torch.no_grad():
        skip(images())
    forward_only = wus_ext.packed_bytes(skip)
    run(skip, images())
    assert 0 < forward_only < wus_ext.packed_bytes(skip)


@pytest.mark.parametrize("batches", [(2, 5, 3)])
def test_batch_sizes_share_packed_weights(batches):
    stock, skip = build("linear")
    packed = set()
    for batch in batches:
        check(stock, skip, images((batch, 3, 12, 10)), tolerance=2e-5)
        packed.add(wus_ext.packed_bytes(skip))
    assert len(packed) == 1


@pytest.mark.parametrize("budget", [0, 20_000, None])
def test_the_memory_budget_is_kept(budget):
    stock, skip = build("conv_relu", memory_budget=budget)
    check(stock, skip, images(), tolerance=2e-5)
    if budget is not None:
        assert wus_ext.packed_bytes(skip) <= budget
    else:
        assert wus_ext.packed_bytes(skip) > 20_000


def test_evaluation_takes_what_training_left_of_the_memory_budget():
    _, unlimited = build("conv_norm_relu")
    run(unlimited, images())
    budget = wus_ext.packed_bytes(unlimited)
    stock, skip = build("conv_norm_relu", memory_budget=budget)
    for _ in range(2):
        check(stock.train(), skip.train(), x := images(), tolerance=2e-5)
        assert wus_ext.packed_bytes(skip) == budget
        with torch.no_grad():
            assert relative_error(skip.eval()(x), stock.eval()(x)) < 2e-5
        assert wus_ext.packed_bytes(skip) == budget


def test_evaluations_in_one_window_see_the_scale_that_trains():
    """Here torch's fused SGD changes it, which raises no version counter."""
    stock = stock_chain("conv_norm_relu").eval()
    skip = wus_ext.convert(copy.deepcopy(stock), skip_gamma=False)
    wus_ext.set_skip(skip, True)
    x = images()
    for _ in range(2):
        with torch.no_grad():
            assert relative_error(skip(x), stock(x)) < 2e-5
        for model in (stock, skip):
            scale = [model[1].weight, model[4].weight]
            for weight in scale:
                weight.grad = torch.ones_like(weight)
            torch.optim.SGD(scale, lr=0.5, fused=True).step()


def test_f2_fits_where_f4_does_not():
    pack = partial(torch.ops.wus.winograd_pack, scheme=int(Scheme.F2))
    budget = packed_nbytes(CHAINS["conv_relu"]()[2].weight, pack)
    _, skip = build("conv_relu", memory_budget=budget)
    run(skip, images())
    assert wus_ext.packed_bytes(skip) == budget


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"norm": "running"}, "norm: 'running' is not one of batch, frozen"),
        ({"algo": "fft"}, "algo: 'fft' is not one of auto, direct, f2, f4"),
        ({"memory_budget": -1}, "memory_budget: expected a number of bytes"),
        ({"memory_budget": 1.5}, "memory_budget: expected a number of bytes"),
        ({"fuse": 1}, "fuse: expected True or False"),
        ({"norm": "frozen", "skip_gamma": False}, "norm='frozen' needs skip_gamma=True"),
        ({"skip_gamma": None}, "skip_gamma: expected True or False"),
    ],
)
def test_bad_settings_are_named(settings, message):
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match=message):
        wus_ext.convert(model, **settings)
    assert type(model) is nn.Conv2d


def test_double_backward_through_a_fused_chain_is_an_error():
    _, skip = build("conv_relu")
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="fuse=False"):
        torch.autograd.grad(skip(x).sum(), x, create_graph=True)


def test_double_backward_works_layer_by_layer():
    stock, skip = build("conv", fuse=False)
    images_of_both = images()
    for model in (stock, skip):
        x = images_of_both.clone().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    for (name, mine), (_, theirs) in zip(
        skip.named_parameters(), stock.named_parameters(), strict=True
    ):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)


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
