"""convert, revert, set_skip, skip_weight_updates: what they change and what they leave alone."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import warnings

import pytest
import torch
from torch import nn

import wus_ext
from tests.cases import assert_near


class Net(nn.Module):
    """Every kind of parameter: drop-in layers, stock layers, raw ones, a module used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6) + 0.5)
        self.shift_bias = nn.Parameter(torch.randn(6))
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.twice = nn.Conv2d(6, 6, 1)
        self.up = nn.ConvTranspose2d(6, 6, 2, stride=2)
        self.act = nn.PReLU()
        self.head = nn.Linear(6, 4)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.twice(self.act(self.twice(self.norm(self.conv(x))))))

    def forward(self, x: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
        x = self.features(x).mean((2, 3)) * self.scale + self.shift_bias
        return self.head(gain * x)


BIASES = {"shift_bias", "conv.bias", "norm.bias", "twice.bias", "up.bias", "head.bias"}


def images(*size: int) -> torch.Tensor:
    return torch.randn(*(size or (2, 3, 6, 6)))


def net(**options) -> Net:
    return wus_ext.convert(Net(), **options)


def with_gradient(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def backward(model: nn.Module, x: torch.Tensor | None = None) -> torch.Tensor:
    output = model(images() if x is None else x)
    output.backward(torch.randn_like(output))
    return output.detach()


# --- convert and revert ---------------------------------------------------------------------


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


def test_only_biases_get_gradients():
    model = net()
    with wus_ext.skip_weight_updates(model):
        assert wus_ext.is_skipping(model)
        backward(model)
    assert not wus_ext.is_skipping(model)
    assert with_gradient(model) == BIASES
    backward(model)
    assert with_gradient(model) == {name for name, _ in model.named_parameters()}


def test_parts_called_directly():
    model = net()
    wus_ext.set_skip(model, True)
    for call in (model.features, nn.Sequential(model.conv, model.up), model.up):
        model.zero_grad()
        backward(call, images(2, 6, 5, 5) if call is model.up else None)
        assert with_gradient(model) <= BIASES
        assert "up.bias" in with_gradient(model)


def test_one_layer_may_be_told_to_train():
    model = net()
    wus_ext.set_skip(model, True)
    model.head.skip_wgrad = False
    backward(model)
    assert with_gradient(model) == BIASES | {"head.weight"}


def test_skip_gamma_false_trains_the_scale():
    model = net(skip_gamma=False)
    with wus_ext.skip_weight_updates(model):
        backward(model)
    assert with_gradient(model) == BIASES | {"norm.weight"}
    wus_ext.set_skip(model, True)
    wus_ext.convert(model, skip_gamma=True)
    model.zero_grad()
    backward(model)
    assert with_gradient(model) == BIASES
    wus_ext.set_skip(wus_ext.convert(model, skip_gamma=False), False)
    assert wus_ext.convert(model, skip_gamma=True).norm.skip_wgrad is False


def test_skip_gamma_false_reaches_norms_without_a_drop_in():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True))
    wus_ext.convert(model, skip_gamma=False)
    with wus_ext.skip_weight_updates(model):
        backward(model)
    assert with_gradient(model) == {"0.bias", "1.weight", "1.bias"}
    wus_ext.convert(model)
    model.zero_grad()
    with wus_ext.skip_weight_updates(model):
        backward(model)
    assert with_gradient(model) == {"0.bias", "1.bias"}


def test_stale_gradients_go_when_a_window_opens_and_only_then():
    model = net()
    backward(model)
    kept = {name: model.get_parameter(name).grad for name in BIASES}
    wus_ext.set_skip(model, True)
    assert with_gradient(model) == BIASES
    assert all(model.get_parameter(name).grad is grad for name, grad in kept.items())
    mine = torch.ones_like(model.conv.weight)
    model.conv.weight.grad = mine
    wus_ext.set_skip(model, True)
    with wus_ext.skip_weight_updates(model):
        backward(model)
    assert model.conv.weight.grad is mine
    assert torch.equal(mine, torch.ones_like(mine))
    wus_ext.set_skip(model, False)
    assert model.conv.weight.grad is mine


def test_contexts_nest_and_exceptions_restore():
    model = net()
    with wus_ext.skip_weight_updates(model) as same:
        assert same is model
        with wus_ext.skip_weight_updates(model):
            pass
        assert wus_ext.is_skipping(model)
    assert not wus_ext.is_skipping(model)
    with pytest.raises(KeyError), wus_ext.skip_weight_updates(model):
        raise KeyError
    assert not wus_ext.is_skipping(model)
    wus_ext.set_skip(model, True)
    with pytest.raises(KeyError), wus_ext.skip_weight_updates(model):
        raise KeyError
    assert wus_ext.is_skipping(model)


def test_a_forward_that_fails_leaves_the_parameters():
    model = net()
    before = [id(parameter) for parameter in model.parameters()]
    wus_ext.set_skip(model, True)
    with pytest.raises(RuntimeError):
        model(images(2, 5, 6, 6))
    assert [id(parameter) for parameter in model.parameters()] == before


@pytest.mark.parametrize("skip", [True, False])
def test_backward_follows_what_forward_decided(skip):
    model = net()
    wus_ext.set_skip(model, skip)
    output = model(images())
    wus_ext.set_skip(model, not skip)
    output.sum().backward()
    assert with_gradient(model) == (BIASES if skip else {n for n, _ in model.named_parameters()})


def test_a_skip_step_equals_stock_with_constant_weights():
    model, stock = net(), Net()
    stock.load_state_dict(model.state_dict(), strict=True)
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(name in BIASES)
    wus_ext.set_skip(model, True)
    for gain in (1.0, 2.0):
        x = images().requires_grad_()
        y = x.detach().clone().requires_grad_()
        output, expected = model(x, gain=gain), stock(y, gain=gain)
        grad_output = torch.randn_like(output)
        output.backward(grad_output)
        expected.backward(grad_output)
        assert_near(output, expected, "output")
        assert_near(x.grad, y.grad, "input gradient")
        for name, parameter in model.named_parameters():
            assert_near(parameter.grad, stock.get_parameter(name).grad, name)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point():
            assert_near(buffer, stock.get_buffer(name), name)
    assert model.norm.num_batches_tracked == stock.norm.num_batches_tracked == 2


def test_evaluation_in_a_window_equals_stock():
    model, stock = net().eval(), Net().eval()
    stock.load_state_dict(model.state_dict())
    x = images()
    wus_ext.set_skip(model, True)
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            assert_near(model(x), stock(x), "output")


# --- copies ---------------------------------------------------------------------------------


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def pickled(protocol: int):
    return lambda model: pickle.loads(pickle.dumps(model, protocol))


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, saved_and_loaded, pickled(2), pickled(5)],
    ids=["deepcopy", "torch.save", "pickle_2", "pickle_5"],
)
@pytest.mark.parametrize("skipping", [False, True])
def test_copies(copied, skipping):
    model = net()
    backward(model)
    wus_ext.set_skip(model, skipping)
    model.zero_grad()
    made = copied(model)
    assert type(made) is type(model)
    assert isinstance(made, Net)
    assert wus_ext.is_skipping(made) is skipping
    for (name, got), (_, wanted) in zip(
        made.state_dict().items(), model.state_dict().items(), strict=True
    ):
        assert torch.equal(got, wanted), name
        assert got.data_ptr() != wanted.data_ptr(), name
    for skip in (True, False):
        wus_ext.set_skip(made, skip)
        made.zero_grad()
        backward(made)
        assert with_gradient(made) == (BIASES if skip else {n for n, _ in made.named_parameters()})
    assert with_gradient(model) == set()
    assert type(wus_ext.revert(made)) is Net


def test_state_dicts_load_both_ways():
    model, stock = net(), Net()
    stock.load_state_dict(model.state_dict(), strict=True)
    wus_ext.set_skip(model, True)
    model.load_state_dict(Net().state_dict(), strict=True)
    model.load_state_dict(Net().state_dict(), strict=True, assign=True)
    backward(model)
    assert with_gradient(model) == BIASES


def test_a_class_that_copies_itself():
    class Counted(nn.Sequential):
        copies = 0

        def __deepcopy__(self, memo):
            made = type(self)(*(copy.deepcopy(layer, memo) for layer in self))
            made.copies = self.copies + 1
            return made

    model = wus_ext.convert(Counted(nn.Linear(3, 2)))
    made = copy.deepcopy(copy.deepcopy(model))
    assert type(made) is type(model)
    assert made.copies == 2


# --- optimizers -----------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": lambda p, f: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, foreach=f),
    "adamw": lambda p, f: torch.optim.AdamW(p, 0.1, weight_decay=0.1, foreach=f),
    "rmsprop": lambda p, f: torch.optim.RMSprop(p, 0.1, momentum=0.9, foreach=f),
}


@pytest.mark.parametrize("foreach", [False, True], ids=["loop", "foreach"])
@pytest.mark.parametrize("made_first", [False, True], ids=["convert_first", "optimizer_first"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_skipped_weights_stand_still(optimizer, made_first, foreach):
    model = Net()
    if not made_first:
        wus_ext.convert(model)
    optimizer = optimizer(model.parameters(), foreach)
    wus_ext.convert(model)

    def steps(count):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(count):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()
        return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}

    everything = {name for name, _ in model.named_parameters()}
    assert steps(2) == everything
    backward(model)  # gradients of a full step are left over when the window opens
    wus_ext.set_skip(model, True)
    assert steps(3) == BIASES
    wus_ext.set_skip(model, False)
    assert steps(1) == everything


def test_gradients_accumulate():
    model, stock = net(), Net()
    stock.load_state_dict(model.state_dict())
    batches = [images(), images()]
    wus_ext.set_skip(model, True)
    for x in batches:
        model(x).square().sum().backward()
        stock(x).square().sum().backward()
    assert with_gradient(model) == BIASES
    for name in BIASES:
        assert_near(model.get_parameter(name).grad, stock.get_parameter(name).grad, name)


def test_a_loss_of_a_skip_and_a_full_forward():
    """Each forward decides for itself: the weights see the full one only."""
    model, alone = net(), Net()
    alone.load_state_dict(model.state_dict())
    x, y = images(), images()
    with wus_ext.skip_weight_updates(model):
        loss = model(x).square().sum()
    (loss + model(y).square().sum()).backward()
    alone(y).square().sum().backward()
    for name, parameter in alone.named_parameters():
        if name not in BIASES:
            assert_near(model.get_parameter(name).grad, parameter.grad, name)
