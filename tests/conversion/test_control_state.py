"""Which layers skip follows copies, contexts, checkpoints and conversions."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import wus_ext
from tests.conversion.controlled import EVERYTHING, Parts, pair
from tests.conversion.skipping import BIASES, backward, images, net, with_gradient
from tests.engine.chains import (
    fused_chains,
)
from tests.engine.chains import images as program_images


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
