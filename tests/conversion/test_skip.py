"""convert, revert, set_skip, skip_weight_updates: what they change and what they leave alone."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import wus_ext
from tests.cases import assert_near
from tests.conversion.skipping import BIASES, Net, backward, images, net, with_gradient


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
