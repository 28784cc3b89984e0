"""Which layers skip, and what of them: ``layers=`` and ``skip_biases=``, against stock PyTorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wus_ext
from tests.cases import assert_near
from tests.conversion.test_skip import BIASES, Net, backward, images, net, with_gradient
from tests.engine.chains import (
    CHAINS,
    check,
    fused_chains,
    relative_error,
    run,
    saved_bytes,
    stock_chain,
)
from tests.engine.chains import images as program_images

EVERYTHING = {name for name, _ in Net().named_parameters()}
WEIGHTS = EVERYTHING - BIASES


def pair(name: str, channels_last: bool = True, **settings: object) -> tuple[nn.Module, nn.Module]:
    """A stock model and a converted one of the same values."""
    stock = stock_chain(name, channels_last)
    return stock, wus_ext.convert(copy.deepcopy(stock), **settings)


def owners(model: nn.Module) -> list[str]:
    return [
        name
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(False))
    ]


def freeze(stock: nn.Module, layers: list[str], biases: bool = False) -> None:
    """Stock's own way to the same step."""
    for name, parameter in stock.named_parameters():
        inside = name.rpartition(".")[0] in layers
        is_bias = name.endswith("bias")
        parameter.requires_grad_(not inside or (is_bias and not biases))


# --- which layers ---------------------------------------------------------------------------


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


class Parts(nn.Module):
    """Names inside names, one module under two names, weights of children, raw lists."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.alias = self.body[0]
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.scales = nn.ParameterList([torch.rand(8) + 0.5])
        self.shared = nn.Linear(8, 8)
        self.shared.weight = self.body[1][0].weight

    def forward(self, x):
        x = self.attention(*3 * [self.body(x)], need_weights=False)[0]
        return self.shared(self.alias(x) * self.scales[0])


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


def chains_in_backward(output: torch.Tensor) -> int:
    """How many fused chains a backward pass of this output goes through."""
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [before for before, _ in node.next_functions]
    return sum(node.name().startswith(("ConvAct", "LinearAct", "ConvNorm")) for node in seen)


def test_no_backward_through_first_layers_that_stand_still():
    """FreezeOut: whatever comes before the first layer that trains costs a forward pass only."""
    _, skip = pair("conv_norm_relu_pool")
    x = program_images()
    wus_ext.set_skip(skip, True)
    assert chains_in_backward(skip(x)) == 2
    wus_ext.set_skip(skip, True, layers=["0", "1"], skip_biases=True)
    assert chains_in_backward(skip(x)) == 1
    run_without = saved_bytes(skip, x)[0]
    wus_ext.set_skip(skip, True, layers=["0", "1"])
    assert run_without < saved_bytes(skip, x)[0]
    wus_ext.set_skip(skip, True, layers=["0", "1", "4"], skip_biases=True)
    assert chains_in_backward(skip(x)) == 1  # the last norm's shift trains
    wus_ext.set_skip(skip, True, skip_biases=True)
    assert not skip(x).requires_grad
    assert saved_bytes(skip, x)[0] == 0


# --- only the gradient of the input -----------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False], ids=["fused", "layers"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", CHAINS)
def test_input_gradients_only(name, training, fuse):
    stock, skip = pair(name)
    wus_ext.convert(skip, fuse=fuse)
    for model in (stock.requires_grad_(False), skip):
        model.train(training)
    wus_ext.set_skip(skip, True, skip_biases=True)
    errors = []
    for _ in range(3):  # one input in ten has a value within rounding of zero
        x = program_images()
        expected, wanted, grad_output = run(stock, x)
        output, got, _ = run(skip, x, grad_output)
        errors.append(max(relative_error(output, expected), relative_error(got, wanted)))
        assert with_gradient(skip) == set()
    assert min(errors) < 2e-5
    for (key, mine), theirs in zip(skip.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=key)
    assert not skip(program_images()).requires_grad
    x = program_images().requires_grad_()
    if name != "dropout":  # there all that stock keeps is what its pooling layer keeps, too
        assert saved_bytes(skip, x)[0] <= saved_bytes(stock, x)[0]


def test_every_kind_of_parameter_stands_still():
    model, stock = net(skip_gamma=False), Net().requires_grad_(False)
    stock.load_state_dict(model.state_dict())
    wus_ext.set_skip(model, True, skip_biases=True)
    x = images().requires_grad_()
    y = x.detach().clone().requires_grad_()
    output, expected = model(x), stock(y)
    grad_output = torch.randn_like(output)
    output.backward(grad_output)
    expected.backward(grad_output)
    assert_near(output, expected, "output")
    assert_near(x.grad, y.grad, "input gradient")
    assert with_gradient(model) == set()
    assert not model(images()).requires_grad
    for layers in ("norm", None):  # the scale trains again, too
        wus_ext.set_skip(model, True, layers=layers)
    backward(model)
    assert with_gradient(model) == BIASES | {"norm.weight"}


def test_parametrized_and_shared_biases_stand_still():
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 5), nn.LSTM(5, 4, batch_first=True))
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Tanh(), unsafe=True)
    model[1].bias = nn.Parameter(torch.randn(5))
    wus_ext.convert(model)
    with wus_ext.skip_weight_updates(model, skip_biases=True):
        x = torch.randn(2, 3, 6, requires_grad=True)
        model(x)[0].square().sum().backward()
    assert x.grad.abs().sum() > 0
    assert with_gradient(model) == set()


def test_an_attack_on_the_images():
    """Projected gradient steps through a network in evaluation mode, against stock."""
    torch.manual_seed(0)
    stock = wus_ext.models.vgg11(batch_norm=True, num_classes=5).eval()
    model = wus_ext.convert(copy.deepcopy(stock), algo="direct")
    clean, label = torch.rand(2, 3, 32, 32), torch.tensor([1, 3])

    def attacked(attacked_model: nn.Module) -> torch.Tensor:
        x = clean.clone()
        for _ in range(3):
            x.requires_grad_()
            loss = F.cross_entropy(attacked_model(x), label)
            (grad,) = torch.autograd.grad(loss, x)
            x = (x.detach() + 0.01 * grad.sign()).clamp(clean - 0.02, clean + 0.02)
        return x

    expected = attacked(stock)
    with wus_ext.skip_weight_updates(model, skip_biases=True):
        assert (attacked(model) == expected).float().mean() > 0.999
    assert with_gradient(model) == set()


# --- state ------------------------------------------------------------------------------------


def copied(model: nn.Module) -> dict[str, nn.Module]:
    return {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}


def test_copies_keep_which_layers_skip():
    model = net()
    wus_ext.set_skip(model, True, layers=["conv", "act"], skip_biases=True)
    wus_ext.set_skip(model, True, layers="")
    wus_ext.set_skip(model, False, layers=["twice", "up"])
    wus_ext.set_skip(model, True, layers="conv", skip_biases=True)
    expected = BIASES - {"conv.bias"} | {"twice.weight", "up.weight"}
    for made in (model, *copied(model).values()):
        backward(made)
        assert with_gradient(made) == expected
        made.zero_grad()
        wus_ext.set_skip(made, False)
        backward(made)
        assert with_gradient(made) == EVERYTHING


def test_revert_ends_every_window():
    model = Parts()
    attributes = [set(module.__dict__) for module in model.modules()]
    wus_ext.set_skip(wus_ext.convert(model), True, skip_biases=True)
    wus_ext.revert(model)
    assert [set(module.__dict__) for module in model.modules()] == attributes
    backward(model, torch.randn(2, 3, 8))
    assert with_gradient(model) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize("skip_biases", [False, True])
def test_layers_converted_in_a_window_of_all_join_it(skip_biases):
    model = wus_ext.convert(nn.Sequential(nn.Linear(3, 3)))
    wus_ext.set_skip(model, True, skip_biases=skip_biases)
    model.append(nn.Sequential(nn.Linear(3, 3), nn.PReLU()))
    wus_ext.convert(model)
    backward(model, torch.randn(2, 3).requires_grad_())
    assert with_gradient(model) == (set() if skip_biases else {"0.bias", "1.0.bias"})


def test_layers_converted_in_a_window_of_some_train():
    model = wus_ext.convert(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    wus_ext.set_skip(model, True, layers="0")
    model.append(nn.Linear(3, 3))
    wus_ext.convert(model)
    backward(model, torch.randn(2, 3))
    assert with_gradient(model) == {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias"}


def test_contexts_restore_which_layers_skip():
    model = net()
    wus_ext.set_skip(model, True, layers="conv")
    with wus_ext.skip_weight_updates(model, skip_biases=True):
        with wus_ext.skip_weight_updates(model, layers="head"):
            backward(model)
            assert with_gradient(model) == {"head.bias"}
        model.zero_grad()
        backward(model, images().requires_grad_())
        assert with_gradient(model) == set()
    backward(model)
    assert with_gradient(model) == EVERYTHING - {"conv.weight"}


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_follows_which_layers_skip(reentrant):
    from torch.utils.checkpoint import checkpoint

    block = wus_ext.convert(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    wus_ext.set_skip(block, True, layers="0", skip_biases=True)
    x = torch.randn(2, 3, requires_grad=True)
    checkpoint(block, x, use_reentrant=reentrant).sum().backward()
    assert with_gradient(block) == {"2.weight", "2.bias"}


def test_functional_call_in_a_mixed_step():
    model = net()
    wus_ext.set_skip(model, True, layers=["conv", ""])
    wus_ext.set_skip(model, False, layers="head")
    given = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    torch.func.functional_call(model, given, (images(),)).sum().backward()
    got = {name for name, tensor in given.items() if tensor.grad is not None}
    assert got == BIASES | {"head.weight"}


def test_models_built_from_drop_ins_need_no_convert():
    model = nn.Sequential(wus_ext.nn.Linear(3, 3), nn.ReLU(), wus_ext.nn.Linear(3, 2))
    wus_ext.set_skip(model, True, layers="2", skip_biases=True)
    backward(model, torch.randn(2, 3))
    assert with_gradient(model) == {"0.weight", "0.bias"}


def test_chains_read_the_state_of_their_layers():
    _, skip = pair("linear")
    for layers in ("0", "4", "6"):
        wus_ext.set_skip(skip, False)
        wus_ext.set_skip(skip, True, layers=layers)
        fused = fused_chains(skip, program_images())
        assert [chain.split()[0] for chain in fused] == ["conv" if layers == "0" else "linear"]
