"""Steps in which nothing or little trains: no backward pass where none is needed."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import wus_ext
from tests.cases import assert_near
from tests.conversion.controlled import pair
from tests.conversion.skipping import BIASES, Net, backward, images, net, with_gradient
from tests.engine.chains import (
    CHAINS,
    gradient_functions,
    relative_error,
    run,
    saved_bytes,
)
from tests.engine.chains import images as program_images


def chains_in_backward(output: torch.Tensor) -> int:
    """How many fused chains a backward pass of this output goes through."""
    kinds = "ConvAct", "ConvAddAct", "ConvNormAct", "LinearAct"
    return sum(any(kind in name for kind in kinds) for name in gradient_functions(output))


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
