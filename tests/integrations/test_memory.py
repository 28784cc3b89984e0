"""What people wrap around a model: checkpointing, clipping, averages of weights, copies, files."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import checkpoint

import wus_ext
from tests.integrations.zoo import CASES, call, freeze, saved_bytes
from wus_ext.nn import is_bias


class Block(nn.Module):
    """Half convolutions that the skip program fuses, half attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Conv2d(width, width, 3, padding=1),
        )
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x):
        x = (self.convs(x) + x).relu()
        y = self.norm(x.flatten(2).transpose(1, 2))
        y = self.attention(y, y, y, need_weights=False)[0]
        return x + y.transpose(1, 2).unflatten(2, x.shape[2:])


class Net(nn.Module):
    """Blocks, each checkpointed or not."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([Block(8), Block(8)])
        self.head = nn.Linear(8, 5)
        self.reentrant = reentrant

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(x.mean((2, 3)))


def images() -> torch.Tensor:
    return torch.randn(4, 3, 8, 8)


def backward(model: nn.Module, x: torch.Tensor, grad_output: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    torch.manual_seed(1)
    output = model(x)
    output.backward(grad_output)
    return output.detach()


def assert_alike(model: nn.Module, stock: nn.Module, *, exactly: bool) -> None:
    """Gradients and buffers."""
    largest = max(p.grad.norm() for p in stock.parameters() if p.grad is not None)
    for name, parameter in stock.named_parameters():
        got, wanted = model.get_parameter(name).grad, parameter.grad
        assert (got is None) == (wanted is None), name
        if wanted is None:
            continue
        if exactly:
            assert torch.equal(got, wanted), name
        else:
            assert (got - wanted).norm() <= 1e-4 * max(wanted.norm(), largest / 10), name
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, msg=name)


MODES = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])


@MODES
@pytest.mark.parametrize("whole", [True, False], ids=["whole_model", "blocks"])
def test_checkpointed_steps_equal_stocks(whole, reentrant):
    stock = Net(None if whole else reentrant)
    model = wus_ext.convert(copy.deepcopy(stock))
    wrap = {model: model, stock: stock}
    if whole:
        for made in wrap:
            wrap[made] = Whole(made, reentrant)
    for skip in (False, True, False):
        x, grad_output = images().requires_grad_(), torch.randn(4, 5)
        wus_ext.set_skip(model, skip)
        for name, parameter in stock.named_parameters():
            parameter.requires_grad_(not skip or is_bias(name))
        outputs = [backward(wrap[made], x, grad_output) for made in (model, stock)]
        if skip:
            torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
        assert_alike(model, stock, exactly=False)


class Whole(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x):
        return checkpoint(self.model, x, use_reentrant=self.reentrant)


@MODES
def test_checkpointing_saves_what_it_saves_in_stock(reentrant):
    stock = freeze(Net(reentrant))
    model = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(model, True)
    inputs = (images(),)
    assert saved_bytes(model, inputs) <= saved_bytes(stock, inputs)


@pytest.mark.parametrize(
    "clip",
    [
        lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05),
        lambda parameters: nn.utils.clip_grad_norm_(parameters, 0.05, foreach=True),
        lambda parameters: nn.utils.clip_grad_value_(parameters, 0.01),
    ],
    ids=["norm", "norm_foreach", "value"],
)
def test_clipping_sees_the_biases_only(clip):
    stock = freeze(Net())
    model = wus_ext.convert(copy.deepcopy(stock))
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    wus_ext.set_skip(model, True)
    x, grad_output = images(), torch.randn(4, 5)
    norms = []
    for made in (model, stock):
        backward(made, x, grad_output)
        norms.append(clip(made.parameters()))
    torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
    assert_alike(model, stock, exactly=False)


@pytest.mark.parametrize("use_buffers", [True, False], ids=["buffers", "no_buffers"])
def test_averaged_weights(use_buffers):
    """EMA through full and skip steps: what stands still is averaged with itself."""
    torch.manual_seed(0)
    model = wus_ext.convert(Net())
    stock = wus_ext.revert(copy.deepcopy(model))
    averages = [
        AveragedModel(made, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=use_buffers)
        for made in (model, stock)
    ]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for skip in (False, True, True, False, True):
        wus_ext.set_skip(model, skip)
        backward(model, images(), torch.randn(4, 5))
        optimizer.step()
        stock.load_state_dict(model.state_dict())
        for average, made in zip(averages, (model, stock), strict=True):
            average.update_parameters(made)
    for (name, got), (_, wanted) in zip(
        averages[0].state_dict().items(), averages[1].state_dict().items(), strict=True
    ):
        assert torch.equal(got, wanted), name
    assert all(isinstance(p, nn.Parameter) for p in averages[0].parameters())
    for average in averages:
        torch.manual_seed(1)
        update_bn([images().fill_(0.5), images().fill_(1.0)], average)
    x = images()
    torch.manual_seed(1)
    got = averages[0].eval()(x)
    torch.testing.assert_close(got, averages[1].eval()(x), rtol=1e-4, atol=1e-5)


def test_an_average_made_in_a_window():
    model = wus_ext.convert(Net())
    wus_ext.set_skip(model, True)
    backward(model, images(), torch.randn(4, 5))  # the skip program exists
    average = AveragedModel(model)
    average.update_parameters(model)
    x = images()
    assert torch.equal(average.eval()(x), model.eval()(x))
    shared = {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in average.parameters()
    }
    assert not shared


# --- copies and files, of other people's models ----------------------------------------------

NAMES = ("resnet18", "swin", "convnext_atto", "mobilevit", "bert", "detr")
SOME = pytest.mark.parametrize("case", [case for case in CASES if case.name in NAMES], ids=str)


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def skip_step(model: nn.Module, inputs) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    outputs = call(model, inputs)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@SOME
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), saved_and_loaded],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_taken_in_a_window(case, copied):
    model = wus_ext.convert(case.build())
    inputs = case.inputs()
    wus_ext.set_skip(model, True)
    made = copied(model)
    assert type(made) is type(model)
    wanted = skip_step(model, inputs)
    again = copied(model.eval()).train()  # a program and its transformed weights exist
    model.train()
    again.load_state_dict(made.state_dict())
    for twin in (made, again):
        got = skip_step(twin, inputs)
        assert got.keys() == wanted.keys()
        for name, grad in wanted.items():
            assert torch.equal(got[name], grad), name
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in made.parameters()}
    assert not shared


@SOME
def test_state_dicts_both_ways(case):
    stock, model = case.build(), wus_ext.convert(case.build())
    assert list(stock.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.mul_(1.1)
    wus_ext.set_skip(model, True)
    inputs = case.inputs()
    skip_step(model, inputs)  # weights that were transformed must not be remembered
    assert model.load_state_dict(stock.state_dict(), strict=True).missing_keys == []
    stock = case.build()
    stock.load_state_dict(model.state_dict(), strict=True)
    fresh = wus_ext.convert(stock)
    wus_ext.set_skip(fresh, True)
    wanted, got = skip_step(fresh, inputs), skip_step(model, inputs)
    for name, grad in wanted.items():
        assert torch.equal(got[name], grad), name
