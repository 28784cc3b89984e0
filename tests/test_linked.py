"""Chains whose ReLU is undone by the chain above: the same results, bit for bit."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext import linked, options

from .test_program import CHAINS, build, images, program, run


class Shared(nn.Module):
    """The first output goes to two layers, or to one twice."""

    def __init__(self, twice):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.twice = twice

    def forward(self, x):
        x = self.first(x).relu()
        y = self.second(x)
        return (y + x).relu() if self.twice else y.relu() * x.mean()


def twins(name, **settings):
    """Two models in a skip window, the second linked."""
    _, unlinked = build(name, **settings)
    link = copy.deepcopy(unlinked)
    return unlinked, wus_ext.convert(link, epilogues=("plain",), **settings)


def equal(unlinked, link, x):
    for model in (unlinked, link):
        model.zero_grad()
    *expected, grad_output = run(unlinked, x)
    *actual, _ = run(link, x, grad_output)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)
    parameters = zip(link.named_parameters(), unlinked.parameters(), strict=True)
    for (name, mine), theirs in parameters:
        assert (mine.grad is None) == (theirs.grad is None), name
        assert mine.grad is None or torch.equal(mine.grad, theirs.grad), name


def links(model):
    """How many chains leave their ReLU to the one above."""
    return sum(getattr(c, "above", None) is not None for c in program(model).chains.values())


@pytest.fixture
def passes(monkeypatch):
    """Which layers masked a gradient for the layer below."""
    names = []
    two_passes = linked._two_passes

    def counted(layer, *args):
        names.append(type(layer).__name__)
        return two_passes(layer, *args)

    monkeypatch.setattr(linked, "_two_passes", counted)
    return names


#: Chains that are linked with the direct algorithm, and those that are with the default one, where
#: Winograd has the mask in its own kernels.
LINKED = {
    "conv": (0, 0), "conv_relu": (1, 0), "conv_relu_pool": (0, 0), "conv_norm": (0, 0),
    "conv_norm_relu": (0, 0), "conv_norm_relu_pool": (0, 0), "norm_options": (0, 0),
    "other_geometries": (5, 5), "paddings": (2, 0), "odd_channels": (0, 0), "functional": (0, 0),
    "in_place_sum": (0, 0), "block": (0, 0), "linear": (2, 2), "dropout": (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("algo", ["direct", "auto"])
@pytest.mark.parametrize("name", CHAINS)
def test_linked_is_unlinked(name, algo, passes):
    unlinked, link = twins(name, algo=algo)
    equal(unlinked, link, images())
    assert len(passes) == LINKED[name][algo == "auto"]


def test_a_frozen_norm_and_a_sum_are_linked(passes):
    unlinked, link = twins("block", norm="frozen", algo="direct")
    equal(unlinked, link, images())
    assert passes == ["Direct"]  # conv1 of the block; its input has two users
    unlinked.eval()
    link.eval()
    equal(unlinked, link, images())


@pytest.mark.parametrize("twice", [True, False])
def test_one_user_only(twice, passes):
    unlinked = wus_ext.convert(Shared(twice), algo="direct")
    link = wus_ext.convert(copy.deepcopy(unlinked), algo="direct", epilogues=("plain",))
    for model in (unlinked, link):
        wus_ext.set_skip(model, True)
    equal(unlinked, link, images())
    assert not passes
    assert not links(link)


@pytest.mark.parametrize("above", ["2", "6"])
def test_a_layer_that_does_not_skip_breaks_the_link(above, passes):
    unlinked, link = twins("other_geometries")
    for model in (unlinked, link):
        wus_ext.set_skip(model, False, layers=above)
    equal(unlinked, link, images())
    assert links(link) == 5
    assert len(passes) == 3


def test_dropout_in_evaluation_mode_is_linked(passes):
    unlinked, link = twins("dropout")
    equal(unlinked.eval(), link.eval(), images())
    assert passes == ["FrozenProduct"]


@pytest.mark.parametrize("name", ["other_geometries", "linear"])
def test_biases_that_stand_still(name, passes):
    unlinked, link = twins(name)
    for model in (unlinked, link):
        wus_ext.set_skip(model, True, skip_biases=True)
    equal(unlinked, link, images())
    assert passes


@pytest.mark.parametrize("name", ["conv_relu", "linear"])
def test_a_layer_without_bias(name):
    unlinked, link = twins(name, algo="direct")
    for model in (unlinked, link):
        layer = model[4 if name == "linear" else 0]
        layer.bias = None
        equal(model, copy.deepcopy(model), images())
    equal(unlinked, link, images())


def test_images_without_gradient():
    """The bottom of a network: the gradient of the first layer's bias needs no image gradient."""
    unlinked, link = twins("conv_relu", algo="direct")
    for model in (unlinked, link):
        torch.manual_seed(1)
        model(images()).square().sum().backward()
    for mine, theirs in zip(link.parameters(), unlinked.parameters(), strict=True):
        assert mine.grad is theirs.grad or torch.equal(mine.grad, theirs.grad)
    assert link[0].bias.grad.any()


def test_without_gradients():
    unlinked, link = twins("conv_relu", algo="direct")
    x = images()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(link(x), unlinked(x))


@pytest.mark.parametrize("name", ["other_geometries", "linear"])
def test_the_same_is_saved(name):
    sizes = []
    for model in twins(name):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.setdefault(t.data_ptr(), t), lambda t: t
        ):
            model(images().requires_grad_())
        sizes.append(sorted(t.nbytes for t in saved.values()))
    assert sizes[0] == sizes[1]
    assert sizes[0]


def test_backward_twice():
    _, link = twins("other_geometries")
    x = images().requires_grad_()
    output = link(x)
    biases = [p for n, p in link.named_parameters() if n.endswith("bias")]
    g = torch.randn_like(output)
    first = torch.autograd.grad(output, biases, g, retain_graph=True)
    for mine, theirs in zip(torch.autograd.grad(output, biases, g), first, strict=True):
        assert torch.equal(mine, theirs)


def test_no_second_derivative():
    _, link = twins("linear")
    x = images().requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(link(x).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("plain", "expected a collection of names out of plain, cublaslt, cudnn"),
        (3, "expected a collection of names"),
        (("plain", "lt"), "'lt' is not one of plain, cublaslt, cudnn"),
    ],
)
def test_epilogues_are_checked(value, message):
    with pytest.raises(ValueError, match=f"epilogues: {message}"):
        wus_ext.convert(nn.Linear(2, 2), epilogues=value)


def test_an_epilogue_that_is_not_built_is_refused(monkeypatch):

    monkeypatch.setattr(options, "build_info", lambda: {"cuda": None})
    with pytest.raises(
        ValueError, match=r"'cublaslt' is not part of this build .*'cuda'.* is None"
    ):
        wus_ext.convert(nn.Linear(2, 2), epilogues=["cublaslt"])
