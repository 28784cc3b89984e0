"""Full steps with full="fused": every chain against stock PyTorch, weights training."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import wus_ext
from tests.engine.chains import (
    chain,
    check,
    fused_chains,
    images,
    relative_error,
    run,
    saved_bytes,
    stock_chain,
)
from wus_ext.engine.conv.copies import Form
from wus_ext.engine.conv.geometry import Scheme


def build(name, *, channels_last=True, **settings):
    """A stock model, and its twin whose full steps are fused."""
    stock = stock_chain(name, channels_last)
    return stock, wus_ext.convert(copy.deepcopy(stock), full="fused", **settings)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("algo", ["direct", "f2", "f4"])
@chain
def test_a_full_step_equals_stock(name, algo):
    stock, fused = build(name, algo=algo)
    check(stock, fused, images(), tolerance=3e-5)
    assert fused_chains(fused, images())
    assert len(gradients(fused)) == len(list(fused.parameters()))
    for parameter in fused.parameters():
        assert parameter.grad.stride() == parameter.stride()


@chain
def test_layout_and_evaluation_mode(name):
    stock, fused = build(name, channels_last=False)
    check(stock, fused, images(channels_last=False), tolerance=3e-5)
    fused.load_state_dict(stock.state_dict())
    check(stock.eval(), fused.eval(), images(channels_last=False), tolerance=3e-5)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("after", ["none", "relu", "pool", "norm", "norm_relu"])
def test_an_input_without_gradient(after, skip):
    """The first layer of a network, with channels enough for every algorithm."""
    layers = {
        "none": [],
        "relu": [nn.ReLU()],
        "pool": [nn.ReLU(), nn.MaxPool2d(2)],
        "norm": [nn.BatchNorm2d(16)],
        "norm_relu": [nn.BatchNorm2d(16), nn.ReLU()],
    }[after]
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), *layers)
    fused = wus_ext.convert(copy.deepcopy(stock), full="fused")
    wus_ext.set_skip(fused, skip)
    x = images((2, 8, 12, 10))
    expected, actual = stock(x), fused(x)
    grad_output = torch.randn_like(expected)
    expected.backward(grad_output)
    actual.backward(grad_output)
    wanted = gradients(stock)
    largest = max(grad.norm() for grad in wanted.values())
    got = gradients(fused)
    assert set(got) == {name for name in wanted if not skip or name.endswith("bias")}
    for name, grad in got.items():
        assert (grad - wanted[name]).norm() <= 3e-5 * largest, name


@pytest.mark.parametrize("size", [1, 2, 4, 5, 13, 37])
@pytest.mark.parametrize("name", ["conv_relu", "conv_relu_pool", "conv_norm_relu"])
def test_awkward_sizes(name, size):
    x = images((3, 3, max(size, 6) if "pool" in name else size, max(size - 1, 5)))
    check(*build(name), x, tolerance=2e-3 if "norm" in name else 5e-5)


def train(model, batches, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)
    outputs = []
    for x in batches:
        optimizer.zero_grad()
        output = model(x)
        output.square().mean().backward()
        optimizer.step()
        outputs.append(output.detach())
    return outputs


@pytest.mark.parametrize("options", [{}, {"fused": True}], ids=["sgd", "fused_sgd"])
@pytest.mark.parametrize("name", ["conv_norm_relu", "functional", "linear", "block"])
def test_training_follows_stock(name, options):
    """Weights change between steps, and fused optimizers do not tell by their versions."""
    stock, fused = build(name)
    batches = [images() for _ in range(4)]
    expected, actual = train(stock, batches, **options), train(fused, batches, **options)
    for skip in (False, True):
        wus_ext.set_skip(fused, skip)
        for mode in (True, False):
            x = images()
            actual.append(fused.train(mode)(x).detach())
            expected.append(stock.train(mode)(x).detach())
    for mine, theirs in zip(actual, expected, strict=True):
        assert relative_error(mine, theirs) < 1e-4
    for mine, theirs in zip(fused.parameters(), stock.parameters(), strict=True):
        assert relative_error(mine, theirs) < 1e-4


def test_layers_whose_weights_train_share_the_memory_of_what_is_made_of_them():
    _, fused = build("conv_relu", algo="f4")
    train(fused, [images()])
    packed = fused._skip_engine.packed
    assert not packed._layers
    shared = packed._workspace.buffer
    form = Form("winograd", int(Scheme.F4))
    largest = max(form.shape(fused[2].weight, dgrad).numel() for dgrad in (False, True))
    assert wus_ext.packed_bytes(fused) == shared.nbytes == 4 * largest
    train(fused, [images()])
    assert packed._workspace.buffer is shared


def test_a_graph_keeps_the_transformed_weights_that_it_was_made_with():
    """A skip step's graph outlives full steps after it."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
    fused = wus_ext.convert(copy.deepcopy(stock), full="fused", memory_budget=None)
    x = images((2, 8, 12, 10))
    late = x.clone().requires_grad_()
    with wus_ext.skip_weight_updates(fused):
        output = fused(late)
    train(fused, [images((2, 8, 12, 10)) for _ in range(2)])
    output.backward(torch.ones_like(output))
    expected = x.clone().requires_grad_()
    stock(expected).backward(torch.ones_like(output))
    assert relative_error(late.grad, expected.grad) < 3e-5


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    "layer", [nn.Conv2d(3, 8, 3, padding=1), nn.Linear(10, 8)], ids=["conv", "linear"]
)
def test_a_graph_refuses_a_weight_that_it_shares(layer, skip):
    model = wus_ext.convert(nn.Sequential(copy.deepcopy(layer), nn.ReLU()), full="fused")
    wus_ext.set_skip(model, skip)
    x = torch.randn((2, 3, 6, 6) if isinstance(layer, nn.Conv2d) else (2, 10), requires_grad=True)
    output = model(x).sum()
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


def test_two_graphs_at_once():
    stock, fused = build("conv_norm_relu")
    first, second = images(), images()
    for model in (stock, fused):
        (model(first).square().mean() + model(second).square().mean()).backward()
        model(first).square().mean().backward()
    for name, grad in gradients(stock).items():
        scale = max(1e-3, grad.norm().item())
        assert (gradients(fused)[name] - grad).norm().item() < 1e-4 * scale + 1e-5, name


def test_skip_windows_and_full_steps_in_turn():
    stock, fused = build("conv_norm_relu_pool")
    weights = {name for name, p in stock.named_parameters() if not name.endswith("bias")}
    for skip in (False, True, False):
        wus_ext.set_skip(fused, skip)
        fused.zero_grad()
        run(fused, images())
        assert (
            (set(gradients(fused)) & weights == set())
            if skip
            else (set(gradients(fused)) >= weights)
        )


def test_some_layers_skip():
    stock, fused = build("conv_relu")
    wus_ext.set_skip(fused, True, layers="0")
    stock[0].weight.requires_grad_(False)
    check(stock, fused, images(), tolerance=3e-5)
    assert set(gradients(fused)) == {"0.bias", "2.weight", "2.bias"}


def test_a_frozen_weight_gets_no_gradient_and_saves_no_input():
    stock, fused = build("conv_relu")
    for model in (stock, fused):
        model[2].weight.requires_grad_(False)
    check(stock, fused, images(), tolerance=3e-5)
    assert "2.weight" not in gradients(fused)
    x = images()
    frozen, _ = saved_bytes(fused, x)
    fused[2].weight.requires_grad_()
    assert saved_bytes(fused, x)[0] == frozen + fused[:2](x).nbytes


def test_hooks_see_weight_gradients():
    _, fused = build("conv_relu")
    seen = []
    fused[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    run(fused, images())
    assert seen == [fused[2].weight.shape]


def test_a_shared_layer():
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, padding=1)
    stock = nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.ReLU(), layer, nn.ReLU())
    fused = wus_ext.convert(copy.deepcopy(stock), full="fused")
    check(stock, fused, images(channels_last=False), tolerance=3e-5)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_stay_fused(clone):
    stock, fused = build("conv_norm_relu")
    run(fused, images())
    fused.load_state_dict(stock.state_dict())
    cloned = clone(fused)
    check(stock, cloned, images(), tolerance=3e-5)
    assert fused_chains(cloned, images())


@pytest.mark.parametrize("prepare", [lambda m: m.double(), lambda m: m], ids=["float64", "float16"])
def test_elsewhere_a_full_step_is_stocks_bit_for_bit(prepare):
    stock, fused = map(prepare, build("conv_norm_relu"))
    x = images().to(next(stock.parameters()).dtype)
    with torch.autocast("cpu", torch.float16, enabled=x.dtype == torch.float32):
        expected, wanted, grad_output = run(stock, x)
        actual, got, _ = run(fused, x, grad_output)
    assert torch.equal(actual, expected)
    assert torch.equal(got, wanted)
    for name, grad in gradients(stock).items():
        assert torch.equal(gradients(fused)[name], grad), name


def test_second_derivatives_are_refused():
    _, fused = build("conv_relu")
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(fused(x).sum(), x, create_graph=True)


def test_compiled_full_steps_are_stock():
    stock, fused = build("conv_relu")
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    x = images()
    expected, wanted, grad_output = run(stock, x)
    actual, got, _ = run(compiled, x, grad_output)
    assert torch.equal(actual, expected)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"full": "fast"}, "full: 'fast'"), ({"full": "fused", "fuse": False}, "needs fuse=True")],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        wus_ext.convert(nn.Linear(2, 2), **settings)


def test_evaluation_leaves_nothing_of_weights_that_train():
    stock, fused = build("conv_norm_relu")
    run(fused, x := images())
    before = wus_ext.packed_bytes(fused)
    stock.load_state_dict(fused.state_dict())
    with torch.no_grad():
        assert relative_error(fused.eval()(x), stock.eval()(x)) < 2e-5
    assert not fused._skip_engine.packed._layers
    assert wus_ext.packed_bytes(fused) == before


LARGE = nn.Sequential(
    nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
    nn.Linear(8 * 6 * 5, 1200), nn.ReLU(), nn.Linear(1200, 4),
)  # fmt: skip


def silent_update(model):
    """Changes weights as torch's fused optimizers do: no version tells."""
    for parameter in model.parameters():
        parameter.data.mul_(1.2)


def skip_step(model, x):
    with wus_ext.skip_weight_updates(model):
        run(model, x)


def stock_step(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        run(model, x)


def evaluate(model, x):
    with torch.no_grad():
        model.eval()(x)
    model.train()


@pytest.mark.parametrize("last", [run, skip_step, evaluate])
@pytest.mark.parametrize("between", [run, stock_step, evaluate])
@pytest.mark.parametrize("first", [run, skip_step, evaluate])
def test_no_copy_outlives_a_silent_update(first, between, last):
    """Whatever ran before, what runs next sees the weights as they are."""
    torch.manual_seed(0)
    stock = copy.deepcopy(LARGE)
    fused = wus_ext.convert(copy.deepcopy(LARGE), full="fused")
    x = images((4, 8, 12, 10))
    first(fused, x)
    between(fused, x)
    silent_update(fused)
    if last is skip_step:  # what skips is updated after a step that trains it
        run(fused, x)
        silent_update(fused)
    last(fused, x)
    stock.load_state_dict(fused.state_dict())
    context = wus_ext.skip_weight_updates(fused) if last is skip_step else nullcontext()
    with context, torch.no_grad():
        for mode in (False, True):
            error = relative_error(fused.train(mode)(x), stock.train(mode)(x))
            assert error < 1e-5


@pytest.mark.parametrize("full", ["stock", "fused"])
def test_layers_that_take_turns_to_skip(full):
    """Each trains while the other skips, under an optimizer that raises no versions."""
    torch.manual_seed(0)
    stock = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()
    )
    model = wus_ext.convert(copy.deepcopy(stock), full=full)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    for turn in range(4):
        optimizer.zero_grad()
        with wus_ext.skip_weight_updates(model, layers="02"[turn % 2]):
            model(images((2, 8, 12, 10))).square().mean().backward()
        optimizer.step()
    stock.load_state_dict(model.state_dict())
    x = images((2, 8, 12, 10))
    for layer in "02":
        with wus_ext.skip_weight_updates(model, layers=layer):
            assert relative_error(model(x), stock(x)) < 1e-5


def test_torch_func_runs_stock():
    stock, fused = build("conv_relu")
    x = images()
    expected, actual = (
        torch.func.grad(lambda x, model=model: model(x).sum())(x) for model in (stock, fused)
    )
    assert torch.equal(actual, expected)
    outputs = [torch.func.jvp(model, (x,), (torch.ones_like(x),)) for model in (stock, fused)]
    for mine, theirs in zip(*outputs, strict=True):
        assert torch.equal(mine, theirs)


def test_weights_made_in_inference_mode():
    with torch.inference_mode():
        stock, fused = build("conv_norm_relu")
        x = images()
        for mode in (True, False):
            assert relative_error(fused.train(mode)(x), stock.train(mode)(x)) < 1e-5
