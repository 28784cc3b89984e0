"""Which layers skip, and what of them: ``layers=`` and ``skip_biases=``, against stock PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wus_ext
from tests.cases import assert_near
from tests.conversion.controlled import EVERYTHING, WEIGHTS, Parts, freeze, owners, pair
from tests.conversion.skipping import BIASES, backward, net, with_gradient
from tests.engine.chains import (
    CHAINS,
    check,
    fused_chains,
    relative_error,
    run,
    saved_bytes,
)
from tests.engine.chains import images as program_images


@pytest.mark.parametrize(
    ("layers", "still"),
    [
        ("conv", {"conv.weight"}),
        (["conv", "head"], {"conv.weight", "head.weight"}),
        ({"t*e"}, {"twice.weight"}),
        ("[cn]o*", {"conv.weight", "norm.weight"}),
        ("act", {"act.weight"}),
        ("", WEIGHTS),
        ("*", WEIGHTS),
        ([], set()),
        (lambda name, module: name == "up", {"up.weight"}),
        (lambda name, module: isinstance(module, nn.Conv2d), {"conv.weight", "twice.weight"}),
        (lambda name, module: module._parameters.get("scale") is not None, WEIGHTS),
    ],
    ids=["name", "names", "set", "glob", "stock_layer", "root", "star", "none", "by_name",
         "by_type", "all_inside"],
)  # fmt: skip
def test_which_layers(layers, still):
    model = net()
    wus_ext.set_skip(model, True, layers=layers)
    assert wus_ext.is_skipping(model) == bool(still)
    backward(model)
    assert with_gradient(model) == EVERYTHING - still
    wus_ext.set_skip(model, False)
    assert not wus_ext.is_skipping(model)
    backward(model)
    assert with_gradient(model) == EVERYTHING
    with wus_ext.skip_weight_updates(model, layers=layers):
        assert wus_ext.is_skipping(model) == bool(still)
    assert not wus_ext.is_skipping(model)


@pytest.mark.parametrize(
    ("layers", "still"),
    [
        ("body", {"body.0.weight"}),  # body.1.0 shares its weight with a layer that trains
        ("body.0", {"body.0.weight"}),
        ("alias", {"body.0.weight"}),
        ("body.?.0", set()),
        (["body.1", "shared"], {"body.1.0.weight"}),
        ("attention", {"attention.in_proj_weight", "attention.out_proj.weight"}),
        ("attention.out_proj", {"attention.out_proj.weight"}),
        ("*_proj", {"attention.out_proj.weight"}),
        ("scales", {"scales.0"}),
    ],
)
def test_names_mean_what_is_inside(layers, still):
    stock = Parts()
    model = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(model, True, layers=layers)
    x = torch.randn(2, 3, 8)
    grad_output = torch.randn(2, 3, 8)
    model(x).backward(grad_output)
    everything = {name for name, _ in stock.named_parameters()}
    assert with_gradient(model) == everything - still
    stock(x).backward(grad_output)
    for name, parameter in model.named_parameters():
        # A weight that is shared sees those uses alone that train.
        if name not in still and not (name == "body.1.0.weight" and "body" in layers):
            assert_near(parameter.grad, stock.get_parameter(name).grad, name)


@pytest.mark.parametrize(("still", "trains"), [("body.1.0", "shared"), ("shared", "body.1.0")])
def test_a_shared_weight_gets_its_gradient_where_it_trains(still, trains):
    stock = Parts()
    model = wus_ext.convert(copy.deepcopy(stock))
    stock.get_submodule(trains).weight = nn.Parameter(stock.shared.weight.detach().clone())
    mine = torch.ones(8, 8)
    model.shared.weight.grad = mine
    wus_ext.set_skip(model, True, layers=still)
    assert model.shared.weight.grad is mine  # it still trains, so its gradient is no leftover
    model.shared.weight.grad = None
    x, grad_output = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    model(x).backward(grad_output)
    stock(x).backward(grad_output)
    assert_near(model.shared.weight.grad, stock.get_submodule(trains).weight.grad, "shared weight")


def test_calls_add_up_and_the_last_one_decides():
    model = net()
    wus_ext.set_skip(model, True, layers="conv")
    wus_ext.set_skip(model, True, layers="head", skip_biases=True)
    backward(model)
    assert with_gradient(model) == EVERYTHING - {"conv.weight", "head.weight", "head.bias"}
    wus_ext.set_skip(model, False, layers="conv")
    wus_ext.set_skip(model, True, layers="head")
    assert wus_ext.is_skipping(model)
    model.zero_grad()
    backward(model)
    assert with_gradient(model) == EVERYTHING - {"head.weight"}
    wus_ext.set_skip(model, False, layers="head")
    assert not wus_ext.is_skipping(model)
    wus_ext.set_skip(model, True, skip_biases=True)
    wus_ext.set_skip(model, True)
    model.zero_grad()
    backward(model)
    assert with_gradient(model) == BIASES
    wus_ext.set_skip(model, False, layers=["norm", "act"])
    model.zero_grad()
    backward(model)
    assert with_gradient(model) == BIASES | {"norm.weight", "act.weight"}


def test_stale_gradients_go_layer_by_layer():
    model = net()
    backward(model)
    wus_ext.set_skip(model, True, layers="conv")
    assert with_gradient(model) == EVERYTHING - {"conv.weight"}
    mine = model.conv.weight.grad = torch.ones_like(model.conv.weight)
    wus_ext.set_skip(model, True, layers=["conv", "head"])
    assert model.conv.weight.grad is mine
    assert with_gradient(model) == EVERYTHING - {"head.weight"}
    wus_ext.set_skip(model, True, layers="conv", skip_biases=True)
    assert model.conv.weight.grad is mine
    assert with_gradient(model) == EVERYTHING - {"head.weight", "conv.bias"}


def test_errors_of_a_selection():
    model = net()
    for layers, message in (
        ("con", r"no module's name matches 'con'; there are conv, "),
        (["conv", "twicee"], r"no module's name matches 'twicee'; there are twice, "),
        ("no_such_thing.0.1", r"no module's name matches 'no_such_thing.0.1'; there are "),
        (lambda name, module: False, r"the predicate chose none of 7 layers"),
    ):
        with pytest.raises(ValueError, match=f"layers: {message}"):
            wus_ext.set_skip(model, True, layers=layers)
    with pytest.raises(ValueError, match=r"layers: what was chosen \(ReLU\) has nothing"):
        wus_ext.set_skip(
            wus_ext.convert(nn.Sequential(nn.Linear(2, 2), nn.ReLU())), True, layers="1"
        )
    for layers, kind in ((3, "int"), (model.conv, "Conv2d"), ([model.conv], "Conv2d")):
        message = rf"layers: expected a name pattern, several of them, or a predicate.*got {kind}"
        with pytest.raises(TypeError, match=message):
            wus_ext.set_skip(model, True, layers=layers)
    with pytest.raises(TypeError, match="skip_biases: expected a bool, got int"):
        wus_ext.set_skip(model, True, skip_biases=1)
    with pytest.raises(ValueError, match="skip_biases: needs skip=True"):
        wus_ext.set_skip(model, False, skip_biases=True)
    assert not wus_ext.is_skipping(model)
    backward(model)
    with (
        pytest.raises(ValueError, match="matches 'x'"),
        wus_ext.skip_weight_updates(model, layers="x"),
    ):
        pytest.fail("entered a window of no layer")
    assert with_gradient(model) == EVERYTHING


# --- steps of which some layers skip ----------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("every", [0, 1, 2], ids=["even", "odd", "convs"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_mixed_step_equals_stock(name, every, training):
    stock, skip = pair(name)
    if not training:
        run(stock, program_images())
        skip.load_state_dict(stock.state_dict())
    layers = owners(stock)[every::2] if every < 2 else [
        name for name, module in stock.named_modules() if isinstance(module, nn.Conv2d)
    ]  # fmt: skip
    freeze(stock, layers)
    wus_ext.set_skip(skip, True, layers=layers)
    check(stock.train(training), skip.train(training), program_images(), tolerance=2e-5)
    skipping = [skip.get_submodule(name) for name in layers]
    if any(isinstance(layer, nn.Conv2d | nn.Linear) for layer in skipping):
        assert fused_chains(skip, program_images())


def test_a_layer_that_trains_is_stock_bit_for_bit():
    """Its saved tensors, its gradients; only the layer that skips rounds in its own way."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    skip = wus_ext.convert(copy.deepcopy(stock))
    wus_ext.set_skip(skip, True, layers="2")
    stock[2].weight.requires_grad_(False)
    x = torch.randn(2, 3, 12, 12)
    first, expected = nn.Sequential(*skip[:2]), nn.Sequential(*stock[:2])
    output, grad, grad_output = run(skip[:2], x)
    wanted, wanted_grad, _ = run(expected, x, grad_output)
    assert torch.equal(output, wanted)
    assert torch.equal(grad, wanted_grad)
    assert torch.equal(first[0].weight.grad, expected[0].weight.grad)
    ours, theirs = saved_bytes(skip, x)[0], saved_bytes(stock, x)[0]
    first_relu, mask = stock[:2](x).nbytes, 2 * 8 * 8
    assert ours == first_relu + mask
    assert theirs == first_relu + stock(x).nbytes


def test_a_scale_that_trains_is_not_folded_away():
    """In evaluation mode a norm of constant statistics joins its convolution, but for this."""
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    skip = wus_ext.convert(copy.deepcopy(stock), skip_gamma=False)
    freeze(stock, ["0"])
    wus_ext.set_skip(skip, True)
    check(stock, skip, torch.randn(2, 3, 9, 9), tolerance=2e-5)
    assert skip[1].weight.grad is not None


@pytest.mark.parametrize("still", [["0", "1"], ["1", "3"], ["0", "4"]], ids=str)
@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "layers"])
def test_frozen_statistics_are_those_of_layers_that_skip(still, fuse):
    stock, skip = pair("conv_norm_relu")
    run(stock, program_images())  # moves the running statistics
    skip.load_state_dict(stock.state_dict())
    wus_ext.convert(skip, norm="frozen", fuse=fuse)
    freeze(stock, still)
    for name in set(still) & {"1", "4"}:
        stock[int(name)].eval()
    wus_ext.set_skip(skip, True, layers=still)
    check(stock, skip, program_images(), tolerance=2e-5)


def test_packed_weights_go_with_the_layers_that_leave():
    _, skip = pair("conv_relu_pool", memory_budget=None)
    wus_ext.set_skip(skip, True)
    run(skip, program_images())
    whole = wus_ext.packed_bytes(skip)
    wus_ext.set_skip(skip, False, layers="3")
    first = wus_ext.packed_bytes(skip)
    assert 0 <= first < whole
    run(skip, program_images())
    assert wus_ext.packed_bytes(skip) == first
    wus_ext.set_skip(skip, True, layers="3")
    run(skip, program_images())
    assert wus_ext.packed_bytes(skip) == whole
    wus_ext.set_skip(skip, False)
    assert wus_ext.packed_bytes(skip) == 0


def test_a_layer_by_layer_policy_follows_stock():
    """Layers come and go for twelve steps; weights that trained are packed anew."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
              nn.MaxPool2d(2), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
              nn.Linear(16 * 16, 5))  # fmt: skip
    stock = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    skip = wus_ext.convert(copy.deepcopy(stock))
    start = copy.deepcopy(stock.state_dict())
    optimizers = [torch.optim.SGD(m.parameters(), 0.05, momentum=0.9) for m in (stock, skip)]
    names = owners(stock)
    for step in range(12):
        still = [name for i, name in enumerate(names) if (step // 2 + i) % 3 == 0]
        freeze(stock, still)
        wus_ext.set_skip(skip, False)
        wus_ext.set_skip(skip, True, layers=still)
        x, label = torch.randn(8, 3, 8, 8), torch.randint(5, (8,))
        for model, optimizer in zip((stock, skip), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(x), label).backward()
            optimizer.step()
    for name, value in stock.state_dict().items():
        moved = value - start[name]
        assert moved.norm() > 0
        assert relative_error(skip.state_dict()[name] - start[name], moved) < 1e-2, name
