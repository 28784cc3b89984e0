"""Converting and reverting: objects, classes, hooks and warnings."""

from __future__ import annotations

import logging
import warnings

import pytest
import torch
from torch import nn

import wus_ext
from tests.conversion.skipping import BIASES, Net, backward, net, with_gradient


def test_convert_keeps_every_object():
    model = Net()
    modules = [(name, id(module)) for name, module in model.named_modules()]
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    buffers = [(name, id(buffer)) for name, buffer in model.named_buffers()]
    keys, text = list(model.state_dict()), repr(model)
    random = torch.get_rng_state()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    for _ in range(2):
        assert wus_ext.convert(model) is model
        assert [(n, id(m)) for n, m in model.named_modules()] == modules
        assert [(n, id(p)) for n, p in model.named_parameters()] == parameters
        assert [(n, id(b)) for n, b in model.named_buffers()] == buffers
        assert list(model.state_dict()) == keys
        assert [module.training for module in model.modules()] == modes
        assert torch.equal(torch.get_rng_state(), random)
    assert isinstance(model, Net)
    assert isinstance(model.conv, wus_ext.nn.Conv2d)
    assert isinstance(model.up, wus_ext.nn.ConvTranspose2d)
    assert wus_ext.is_skipping(model) is False
    wus_ext.revert(model)
    assert repr(model) == text


def test_revert_leaves_no_trace():
    model, stock = Net(), Net()
    kinds = [type(module) for module in model.modules()]
    attributes = [set(module.__dict__) for module in model.modules()]
    wus_ext.set_skip(wus_ext.convert(model), True)
    for _ in range(2):
        assert wus_ext.revert(model) is model
        assert [type(module) for module in model.modules()] == kinds
        assert [set(module.__dict__) for module in model.modules()] == attributes
    with pytest.raises(ValueError, match=r"call wus_ext\.convert"):
        wus_ext.set_skip(model, True)
    stock.load_state_dict(model.state_dict(), strict=True)
    backward(model)
    assert with_gradient(model) == {name for name, _ in stock.named_parameters()}


def test_convert_again_after_layers_were_added():
    model = wus_ext.convert(nn.Sequential(nn.Linear(3, 3)))
    model.append(nn.Sequential(nn.Linear(3, 3), nn.PReLU()))
    wus_ext.convert(model)
    wus_ext.set_skip(model, True)
    backward(model, torch.randn(2, 3))
    assert with_gradient(model) == {"0.bias", "1.0.bias"}


def test_layers_converted_in_a_window_join_it():
    model = wus_ext.convert(nn.Sequential(nn.Linear(3, 3)))
    wus_ext.set_skip(model, True)
    model.append(nn.Linear(3, 3))
    wus_ext.convert(model)
    backward(model, torch.randn(2, 3))
    assert with_gradient(model) == {"0.bias", "1.bias"}


def test_nested_converted_models():
    inner = wus_ext.convert(Net())
    outer = wus_ext.convert(nn.Sequential(inner, nn.Linear(4, 2)), skip_gamma=False)
    wus_ext.set_skip(outer, True)
    backward(outer)
    expected = {f"0.{name}" for name in BIASES} | {"1.bias", "0.norm.weight"}
    assert with_gradient(outer) == expected
    assert all(isinstance(parameter, nn.Parameter) for parameter in inner.parameters())


def test_a_converted_part_of_a_stock_model():
    model = nn.Sequential(wus_ext.convert(nn.Sequential(nn.Linear(3, 3), nn.PReLU())))
    model.append(nn.Linear(3, 2))
    wus_ext.set_skip(model, True)
    backward(model, torch.randn(2, 3))
    assert with_gradient(model) == {"0.0.bias", "1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("root", "shape"),
    [
        (lambda: nn.Conv2d(3, 4, 3), (2, 3, 5, 5)),
        (lambda: nn.Linear(3, 4), (2, 3)),
        (lambda: nn.BatchNorm2d(3), (2, 3, 4, 4)),
        (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 4, 4)),
    ],
    ids=["Conv2d", "Linear", "BatchNorm2d", "ConvTranspose2d"],
)
def test_a_root_that_is_a_layer(root, shape):
    model = root()
    kind = type(model)
    assert wus_ext.convert(wus_ext.convert(model)) is model
    with wus_ext.skip_weight_updates(model):
        backward(model, torch.randn(shape))
    assert with_gradient(model) == {"bias"}
    assert type(wus_ext.revert(model)) is kind


def test_a_sequential_root_stays_a_sequential():
    model = wus_ext.convert(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)))
    assert len(model) == 3
    assert model[-1].out_features == 2
    assert [type(layer) for layer in model] == [wus_ext.nn.Linear, nn.ReLU, wus_ext.nn.Linear]
    first = model[:2]
    assert isinstance(first, nn.Sequential)
    assert len(first) == 2
    assert first[0] is model[0]
    with wus_ext.skip_weight_updates(model):
        backward(first, torch.randn(2, 3))
    assert with_gradient(model) == {"0.bias"}


@pytest.mark.parametrize("skipping", [False, True])
def test_hooks_are_kept_and_called(skipping):
    model, calls = Net(), []
    for name in ("", "conv", "norm", "up", "head"):
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda m, args, name=name: calls.append(("pre", name)))
        module.register_forward_hook(lambda m, args, out, name=name: calls.append(("post", name)))
        module.register_full_backward_hook(
            lambda m, gi, go, name=name: calls.append(("back", name))
        )
    model.conv.bias.register_hook(lambda grad: calls.append(("bias", "conv")))
    model.conv.weight.register_hook(lambda grad: calls.append(("weight", "conv")))
    model.register_state_dict_post_hook(lambda m, state, prefix, meta: calls.append("state"))
    wus_ext.set_skip(wus_ext.convert(model), skipping)
    backward(model)
    expected = {(kind, name) for kind in ("pre", "post", "back") for name in ("", "conv", "norm")}
    assert expected <= set(calls)
    assert ("bias", "conv") in calls
    assert (("weight", "conv") in calls) == (not skipping)
    model.state_dict()
    assert calls[-1] == "state"


def test_a_class_with_demands_on_its_subclasses():
    seen = []

    class Tagged(nn.Module):
        def __init_subclass__(cls, *, tag, **kwargs):
            super().__init_subclass__(**kwargs)
            seen.append(tag)

    class Model(Tagged, tag="mine"):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x)

    model = wus_ext.convert(Model())
    assert seen == ["mine"]
    with wus_ext.skip_weight_updates(model):
        backward(model, torch.randn(2, 3))
    assert with_gradient(model) == {"layer.bias"}


def test_describe_and_log(caplog):
    with caplog.at_level(logging.INFO, "wus_ext"):
        model = net()
    text = wus_ext.describe(model)
    assert text in caplog.text
    assert text.startswith(
        "Net: 2 Conv2d, 1 BatchNorm2d, 1 ConvTranspose2d, 1 Linear; in a skip step 7 weight"
    )
    assert "6 bias tensors" in text
    assert wus_ext.describe(wus_ext.revert(model)).startswith("Net: no drop-in layer")


def test_warnings():
    with pytest.warns(UserWarning, match="ReLU has no weight to skip; nothing was converted"):
        wus_ext.convert(nn.ReLU())
    with pytest.warns(UserWarning, match="Linear has no bias: a skip step trains nothing"):
        wus_ext.convert(nn.Linear(3, 2, bias=False))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net()


def test_errors():
    for function in (wus_ext.convert, wus_ext.revert, wus_ext.is_skipping, wus_ext.describe):
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"):
            function(3)
    with pytest.raises(TypeError, match="got list"):
        wus_ext.set_skip([nn.Linear(2, 2)], True)
    for skip in (1, "yes", None):
        with pytest.raises(TypeError, match=f"skip: expected a bool, got {type(skip).__name__}"):
            wus_ext.set_skip(net(), skip)
    for function in (wus_ext.is_skipping, lambda model: wus_ext.set_skip(model, True)):
        with pytest.raises(ValueError, match=r"Net has no layer that can skip; call wus_ext"):
            function(Net())
    with (
        pytest.raises(ValueError, match="no layer that can skip"),
        wus_ext.skip_weight_updates(Net()),
    ):
        pytest.fail("an unconverted model entered a window")


def test_a_lazy_layer_is_an_error_until_it_is_made():
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyConv2d(3, 3))
    with pytest.raises(ValueError, match="lazy layer '0' has no parameters yet"):
        wus_ext.convert(model)
    assert type(model[0]) is nn.LazyLinear
    model = nn.Sequential(nn.LazyLinear(3))
    model(torch.randn(2, 4))
    assert isinstance(wus_ext.convert(model)[0], wus_ext.nn.Linear)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript():
    scripted = torch.jit.script(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="a TorchScript module cannot be converted"):
        wus_ext.convert(scripted)
    model = wus_ext.convert(nn.Sequential(scripted, nn.Linear(3, 2)))
    with wus_ext.skip_weight_updates(model):
        backward(model, torch.randn(2, 3))
    assert with_gradient(model) == {"0.bias", "1.bias"}


# --- windows --------------------------------------------------------------------------------
