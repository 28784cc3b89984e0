"""Chains whose ReLU is undone by the chain above: the same results, bit for bit."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import wus_ext
from tests.engine.chains import CHAINS, build, images, run
from wus_ext.engine import options
from wus_ext.engine.gpu import linked


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
    "other_geometries": (5, 3), "paddings": (2, 0), "odd_channels": (0, 0), "functional": (0, 0),
    "in_place_sum": (0, 0), "block": (0, 0), "linear": (2, 2), "dropout": (0, 0),
}  # fmt: skip


@pytest.mark.parametrize("algo", ["direct", "auto"])
@pytest.mark.parametrize("name", CHAINS)
def test_linked_is_unlinked(name, algo, passes):
    unlinked, link = twins(name, algo=algo, memory_budget=None)
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


@pytest.mark.parametrize("above", ["2", "6"])
def test_a_layer_that_does_not_skip_breaks_the_link(above, passes):
    unlinked, link = twins("other_geometries", algo="direct")
    for model in (unlinked, link):
        wus_ext.set_skip(model, False, layers=above)
    equal(unlinked, link, images())
    assert len(passes) == 3


def test_dropout_in_evaluation_mode_is_linked(passes):
    unlinked, link = twins("dropout")
    equal(unlinked.eval(), link.eval(), images())
    assert passes == ["Products"]


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
    upper_only = [node for node in steps(link(images())) if is_linked(node)]
    assert len(upper_only) == 1, "nothing is computed for the first layer's output"


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


def biases(model):
    return [p for n, p in model.named_parameters() if n.endswith("bias")]


def step(model, seed=0, backward=None, forward=None):
    """The output, and what backward leaves in the gradients."""
    torch.manual_seed(seed)
    x = images().requires_grad_()
    y = (forward or model)(x)
    (backward or y.backward)(torch.randn_like(y))
    return [y, x.grad, *(p.grad for p in model.parameters())]


def twice_before_backward(model):
    x, z = images().requires_grad_(), images().requires_grad_()
    outputs = model(x), model(z)
    for y in outputs:
        y.backward(torch.randn_like(y))
    return [*outputs, x.grad, z.grad, *(p.grad for p in model.parameters())]


def backward_twice(model):
    y = model(images().requires_grad_())
    g = torch.randn_like(y)
    return [
        grad
        for keep in (True, False)
        for grad in torch.autograd.grad(y, biases(model), g, retain_graph=keep)
    ]


def gradients_of_some(model):
    x = images().requires_grad_()
    wanted = [biases(model)[:1], biases(model)[1:2], [x], [biases(model)[-1], x]]
    y = model(x)
    g = torch.randn_like(y)
    return [grad for some in wanted for grad in torch.autograd.grad(y, some, g, retain_graph=True)]


def one_bias_trains(model, index):
    for i, bias in enumerate(biases(model)):
        bias.requires_grad_(i == index)
    return step(model)


def all_but_one_skip(model, index):
    wus_ext.set_skip(model, False, layers=str(layers(model)[index]))
    return step(model)


def layers(model):
    return [i for i, layer in enumerate(model) if getattr(layer, "bias", None) is not None]


def some_biases_stand_still(model):
    wus_ext.set_skip(model, True, layers=str(layers(model)[1]), skip_biases=True)
    return step(model)


def output_replaced(model, index):
    handle = model[index].register_forward_hook(lambda module, inputs, output: output * 2 - 0.1)
    first = step(model)
    handle.remove()
    return first + step(model)


def hooks_on_biases(model):
    for bias in biases(model):
        bias.register_hook(lambda grad: grad * 3)
    return step(model)


def checkpointed(model, reentrant):
    return step(model, forward=partial(checkpoint, model, use_reentrant=reentrant))


def saved_elsewhere(model):
    with torch.autograd.graph.save_on_cpu():
        return step(model)


def no_grad_between(model):
    with torch.no_grad():
        y = model(images())
    return [y, *step(model)]


def window_ends_before_backward(model):
    x = images().requires_grad_()
    y = model(x)
    wus_ext.set_skip(model, False)
    model(images())
    y.backward(torch.randn_like(y))
    return [y, x.grad, *(p.grad for p in model.parameters())]


def a_weight_moves(model):
    first = [t.clone() for t in step(model) if t is not None]
    with torch.no_grad():
        model[layers(model)[1]].weight.mul_(1.5)
    return first + step(model)


def forward_fails(model):
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 12, 10))
    return step(model)


def backward_fails(model):
    def fail(grad):
        raise ArithmeticError

    handle = biases(model)[1].register_hook(fail)
    with pytest.raises(ArithmeticError):
        step(model)
    handle.remove()
    model.zero_grad()
    return step(model)


def copied(model):
    return step(copy.deepcopy(model)) + step(pickle.loads(pickle.dumps(model)))


def contiguous_images(model):
    x = images(channels_last=False).requires_grad_()
    y = model(x)
    y.sum().backward()  # a gradient that is expanded
    return [y, x.grad, *(p.grad for p in model.parameters())]


SITUATIONS = [
    twice_before_backward,
    backward_twice,
    gradients_of_some,
    *(partial(one_bias_trains, index=i) for i in range(3)),
    *(partial(all_but_one_skip, index=i) for i in range(3)),
    some_biases_stand_still,
    partial(output_replaced, index=0),
    partial(output_replaced, index=1),
    hooks_on_biases,
    partial(checkpointed, reentrant=True),
    partial(checkpointed, reentrant=False),
    saved_elsewhere,
    no_grad_between,
    window_ends_before_backward,
    a_weight_moves,
    forward_fails,
    backward_fails,
    copied,
    contiguous_images,
]
#: One that is linked throughout, one whose upper layers are Winograd's, linear layers.
NETWORKS = {
    "direct": partial(twins, "other_geometries"),
    "settled": partial(twins, "paddings", algo="f4"),
    "linear": partial(twins, "linear"),
}


def named(situation):
    if not isinstance(situation, partial):
        return situation.__name__
    return "_".join([situation.func.__name__, *map(str, situation.keywords.values())])


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("situation", SITUATIONS, ids=named)
def test_situations(situation, network):
    results = []
    for model in NETWORKS[network]():
        torch.manual_seed(1)
        results.append(situation(model))
    assert any(t is not None and t.any() for t in results[0])
    for theirs, mine in zip(*results, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)


def test_an_output_in_between(passes):
    class Two(nn.Sequential):
        def forward(self, x):
            x = self[1](self[0](x))
            y = self[3](self[2](x))
            return x, self[5](self[4](y))

    results = []
    for epilogues in ((), ("plain",)):
        torch.manual_seed(0)
        convs = [nn.Conv2d(i, 8, 3, padding=1) for i in (3, 8, 8)]
        model = Two(*(layer for conv in convs for layer in (conv, nn.ReLU())))
        wus_ext.set_skip(wus_ext.convert(model, algo="direct", epilogues=epilogues), True)
        x = images().requires_grad_()
        first, second = model(x)
        (first.square().sum() + second.sum()).backward()
        results.append([first, second, x.grad, *(b.grad for b in biases(model))])
    assert all(map(torch.equal, *results))
    assert passes == ["Direct"]


def test_nothing_is_linked_unasked():
    unlinked, link = twins("other_geometries")
    x = images()
    assert any(map(is_linked, steps(link(x))))
    assert not any(map(is_linked, steps(unlinked(x))))


def test_masks_get_no_gradient():
    """Of a second output autograd would make a gradient of zeros."""
    _, link = twins("other_geometries")
    y = link(images())
    counts = []
    for node in steps(y):
        node.register_prehook(lambda grads: counts.append(len(grads)))
    y.sum().backward()
    assert set(counts) == {1}


def is_linked(node):
    return "Linked" in type(node).__name__


def steps(output):
    """All steps of backward."""
    found = [output.grad_fn]
    for node in found:
        found += [after for after, _ in node.next_functions if after is not None]
    return found


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
