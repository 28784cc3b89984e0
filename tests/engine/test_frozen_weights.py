"""Weights at requires_grad=False stand still without a window: steps that equal stock's, and cost
what a skip step's do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import wus_ext
from wus_ext.nn import is_bias

from .chains import chain, fused_chains, images, relative_error, run, saved_bytes, stock_chain


def all_but_biases(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_bias(name))


def everything(model):
    model.requires_grad_(False)


def all_but_the_last_layer(model):
    model.requires_grad_(False)
    last = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))][-1]
    last.requires_grad_(True)


def layers_but_not_norms(model):
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.requires_grad_(False)


def norms(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.requires_grad_(False)


FREEZING = {
    f.__name__: f
    for f in (all_but_biases, everything, all_but_the_last_layer, layers_but_not_norms, norms)
}
freezing = pytest.mark.parametrize("freeze", FREEZING.values(), ids=FREEZING)


def twins(name, freeze=all_but_biases, **settings):
    """A stock model with frozen weights, and a converted copy."""
    stock = stock_chain(name)
    freeze(stock)
    return stock, wus_ext.convert(copy.deepcopy(stock), **settings)


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def compare(stock, model, x, tolerance=3e-5):
    """Outputs, gradients and buffers, of one input of three: rounding may flip a ReLU."""
    errors = []
    for _ in range(3):
        for each in (stock, model):
            each.zero_grad()
        expected, wanted, grad_output = run(stock, x)
        output, got, _ = run(model, x, grad_output)
        assert list(gradients(model)) == list(gradients(stock))
        pairs = [(output, expected), (got, wanted)]
        scale = max([g.norm().item() for g in gradients(stock).values()], default=1.0)
        error = [relative_error(a, b) for a, b in pairs]
        for a, b in zip(gradients(model).values(), gradients(stock).values(), strict=True):
            error.append((a - b).norm().item() / scale)  # of a bias before a norm: only rounding
        for a, b in zip(model.buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        errors.append(max(error))
        if errors[-1] < tolerance:
            return
        x = torch.randn_like(x)
    raise AssertionError(f"relative errors {errors}")


@chain
@freezing
@pytest.mark.parametrize("full", ["stock", "fused"])
def test_gradients_are_stocks(name, freeze, full):
    stock, model = twins(name, freeze, full=full)
    compare(stock, model, images())


@freezing
def test_in_evaluation_mode(freeze):
    stock, model = twins("conv_norm_relu_pool", freeze)
    compare(stock.eval(), model.eval(), images())


@chain
def test_runs_and_saves_what_a_skip_step_does(name):
    _, model = twins(name)
    skip = wus_ext.convert(stock_chain(name))
    wus_ext.set_skip(skip, True)
    x = images().requires_grad_()
    expected = fused_chains(skip, x)
    assert expected
    assert fused_chains(model, x) == expected
    assert saved_bytes(model, x)[0] == saved_bytes(skip, x)[0]


def test_what_trains_in_between_is_stocks_bit_for_bit():
    stock, model = twins("conv_norm_relu", norms)
    x = images()
    assert not fused_chains(model, x)
    stock(x)
    expected, wanted, grad_output = run(stock, x)
    output, got, _ = run(model, x, grad_output)
    assert torch.equal(output, expected)
    assert torch.equal(got, wanted)
    for a, b in zip(gradients(model).values(), gradients(stock).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("full", ["stock", "fused"])
def test_unfreezing_and_freezing_again(full):
    stock, model = twins("conv_norm_relu_pool", full=full)
    optimizers = [torch.optim.SGD(each.parameters(), 0.05, 0.9) for each in (stock, model)]
    before = model[4].weight.clone()
    for step, trains in enumerate([False, False, True, True, False, False]):
        x = images()
        for each, optimizer in zip((stock, model), optimizers, strict=True):
            each.requires_grad_(True)
            if not trains:
                all_but_biases(each)
            optimizer.zero_grad()
            run(each, x, seed=step)
            optimizer.step()
        assert torch.equal(model[4].weight, before) == (step < 2)
        if full == "stock" and trains:
            assert wus_ext.packed_bytes(model) == 0
    for a, b in zip(model.state_dict().values(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_unfrozen_a_full_step_is_stocks_bit_for_bit():
    stock, model = twins("conv_norm_relu_pool")
    x = images()
    run(model, x)
    stock.load_state_dict(model.state_dict())
    for each in (stock, model):
        each.requires_grad_(True).zero_grad()
    expected, wanted, grad_output = run(stock, x)
    output, got, _ = run(model, x, grad_output)
    assert torch.equal(output, expected)
    assert torch.equal(got, wanted)
    for name, grad in gradients(stock).items():
        assert torch.equal(model.get_parameter(name).grad, grad), name


def scale(weight):
    weight.data.mul_(0.5)  # a version that torch does not count


def flip_one_sign(weight):
    weight.data[0, 7, 1, 2].neg_()


def flip_all_signs(weight):
    weight.data.neg_()


def reorder(weight):
    weight.data.copy_(weight.data.flip(0))


def by_numpy(weight):
    weight.detach().numpy()[0] += 1


@pytest.mark.parametrize("algo", ["auto", "f2", "f4"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("write", [scale, flip_one_sign, flip_all_signs, reorder, by_numpy])
def test_a_weight_that_torch_did_not_see_change_is_packed_again(write, training, algo):
    stock, model = twins("conv_norm_relu", everything, algo=algo)
    x = images((2, 3, 24, 24))
    for each in (stock, model):
        each.train(training)
    for _ in range(2):
        compare(stock, model, x)
        assert wus_ext.packed_bytes(model) > 0
        for each in (stock, model):
            version = each[3].weight._version
            write(each[3].weight)
            assert each[3].weight._version == version
    compare(stock, model, x)


def test_statistics_that_torch_did_not_see_change_are_folded_again():
    stock, model = twins("conv_norm_relu", everything)
    for _ in range(2):
        compare(stock.eval(), model.eval(), images())
        for each in (stock, model):
            each[1].running_mean.data.add_(0.5)
            each[1].running_var.data.mul_(2)
    compare(stock, model, images())


def copies(model):
    packed = model._skip_engine.packed
    return {id(copy.tensor) for own in packed._layers.values() for copy in own.values()}


def test_copies_of_weights_stay_from_step_to_step():
    _, model = twins("conv_norm_relu", algo="f4", memory_budget=None)
    run(model, images())
    made = copies(model)
    assert made
    run(model, images())
    with torch.no_grad():
        model(images())
    run(model, images())
    assert copies(model) == made


def test_a_window_of_frozen_weights():
    stock, model = twins("conv_norm_relu", algo="f4", memory_budget=None)
    compare(stock, model, images())
    for each in (stock, model):
        scale(each[3].weight)
    with wus_ext.skip_weight_updates(model):
        compare(stock, model, images())
    for each in (stock, model):
        scale(each[3].weight)
    compare(stock, model, images())


def test_a_window_of_other_layers():
    stock, model = twins("block", all_but_the_last_layer)
    for each in (stock, model):
        each[0].requires_grad_(True)
    with wus_ext.skip_weight_updates(model, layers="0"):
        x = images()
        expected, wanted, grad_output = run(stock, x)
        output, got, _ = run(model, x, grad_output)
        assert relative_error(output, expected) < 3e-5
        assert relative_error(got, wanted) < 3e-4
    assert [name for name, _ in gradients(model).items() if name[0] == "0"] == ["0.bias"]


def test_evaluation_is_stocks_bit_for_bit():
    stock, model = twins("conv_norm_relu_pool", everything)
    for mode in (torch.no_grad, torch.inference_mode):
        for training in (True, False):
            for each in (stock, model):
                each.train(training)
            x = images()
            with mode():
                assert torch.equal(model(x), stock(x))
    assert wus_ext.packed_bytes(model) == 0


LAYERS = {
    "Conv1d": ((4, 6, 3), (2, 4, 9)),
    "Conv2d": ((4, 6, 3, 2, 1), (2, 4, 9, 8)),
    "Conv3d": ((4, 6, 3), (2, 4, 5, 6, 5)),
    "ConvTranspose1d": ((4, 6, 3, 2), (2, 4, 9)),
    "ConvTranspose2d": ((4, 6, 3), (2, 4, 9, 8)),
    "ConvTranspose3d": ((4, 6, 3), (2, 4, 5, 6, 5)),
    "Linear": ((4, 6), (2, 3, 4)),
}


def pair(kind):
    """A stock layer with a frozen weight, a drop-in with the same, and an input."""
    arguments, size = LAYERS[kind]
    stock, layer = getattr(nn, kind)(*arguments), getattr(wus_ext.nn, kind)(*arguments)
    layer.load_state_dict(stock.state_dict())
    for each in (stock, layer):
        each.weight.requires_grad_(False)
    return stock, layer, torch.randn(size)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_by_itself_does_not_save_its_input(kind):
    stock, layer, x = pair(kind)
    compare(stock, layer, x)
    x.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        layer(x)
    assert saved
    assert all(t.data_ptr() != x.data_ptr() for t in saved)


@pytest.mark.parametrize("kind", LAYERS)
def test_where_our_operators_are_not_known_stocks_run(kind):
    stock, layer, x = pair(kind)
    tangent = torch.randn_like(x)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (tangent,)),
        lambda f: (torch.func.grad(lambda x: f(x).square().sum())(x),),
        lambda f: (torch.func.vmap(f)(torch.stack([x, tangent])),),
        lambda f: (torch.func.jacrev(f)(x),),
        lambda f: forward_mode(f, x, tangent),
    ):
        for got, wanted in zip(transform(layer), transform(stock), strict=True):
            torch.testing.assert_close(got, wanted)


def forward_mode(function, x, tangent):
    with torch.autograd.forward_ad.dual_level():
        output = function(torch.autograd.forward_ad.make_dual(x, tangent))
        return tuple(torch.autograd.forward_ad.unpack_dual(output))


def test_what_is_exported_or_traced_knows_nothing_of_this_package():
    stock, model = twins("conv_norm_relu", everything)
    x = images()
    for each in (stock, model):
        each.eval()
    exported = torch.export.export(model, (x,))
    assert not any("wus." in str(node.target) for node in exported.graph.nodes)
    traced = torch.jit.trace(model, x)
    assert "wus::" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), stock(x))


def test_compiled():
    stock, model = twins("conv_norm_relu_pool")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images()
    expected, wanted, grad_output = run(stock, x)
    output, got, _ = run(compiled, x, grad_output)
    torch.testing.assert_close(output, expected)
    assert relative_error(got, wanted) < 1e-4


class Quantised(torch.Tensor):
    """A tensor with ways of its own."""

    calls = 0

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        Quantised.calls += function is nn.functional.conv2d
        return super().__torch_function__(function, types, args, kwargs or {})


def test_other_peoples_tensors_are_left_to_them():
    stock, model = twins("conv_relu", everything)
    weight = model[2].weight.detach()
    model[2].weight = nn.Parameter(weight.as_subclass(Quantised), requires_grad=False)
    x = images()
    Quantised.calls = 0
    expected, _, grad_output = run(stock, x)
    output, _, _ = run(model, x, grad_output)
    assert Quantised.calls
    torch.testing.assert_close(output.as_subclass(torch.Tensor), expected)


def test_second_derivatives():
    stock, layers = twins("conv_relu", everything, fuse=False)
    _, fused = twins("conv_relu", everything)
    x = images()

    def penalty(model):
        given = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(model(given).square().sum(), given, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), given)
        return second

    assert relative_error(penalty(layers), penalty(stock)) < 1e-4
    with pytest.raises(RuntimeError, match="requires_grad=False"):
        penalty(fused)


def test_with_checkpoints():
    stock, model = twins("block", everything)
    x = images()
    _, wanted, grad_output = run(stock, x)

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(model, x, use_reentrant=False)

    got = run(Checkpointed(), x, grad_output)[1]
    assert relative_error(got, wanted) < 3e-4


def test_a_copy_and_a_reverted_model():
    stock, model = twins("conv_norm_relu", everything)
    compare(stock, model, images())
    compare(copy.deepcopy(stock), copy.deepcopy(model), images())
    compare(stock, wus_ext.revert(model), images(), tolerance=1e-9)


def test_a_head_on_a_frozen_backbone():
    """The usual way: convert alone, no window, an optimizer over what trains."""
    stock, model = twins("block", all_but_the_last_layer)
    optimizers = [
        torch.optim.Adam([p for p in each.parameters() if p.requires_grad], 1e-3)
        for each in (stock, model)
    ]
    for step in range(4):
        x = images()
        for each, optimizer in zip((stock, model), optimizers, strict=True):
            optimizer.zero_grad()
            run(each, x, seed=step)
            optimizer.step()
    for a, b in zip(model.state_dict().values(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
