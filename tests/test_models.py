"""The networks: shapes, sizes, layers, and that they train."""

from __future__ import annotations

import copy
import functools
from functools import partial

import pytest
import torch
from torch import nn

import wus_ext.nn as wnn
from wus_ext.models import alexnet, resnet18, vgg11, vgg16

NETWORKS = {
    "alexnet": alexnet,
    "vgg11": vgg11,
    "vgg11_bn": partial(vgg11, batch_norm=True),
    "vgg16": vgg16,
    "vgg16_bn": partial(vgg16, batch_norm=True),
    "resnet18": resnet18,
}
network = pytest.mark.parametrize("name", NETWORKS)


@functools.cache
def built(name):
    """One network of each kind in eval mode, for tests that change nothing: building is slow."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return NETWORKS[name]().eval()


def images(n=2):
    return torch.randn(n, 3, 32, 32)


@network
@pytest.mark.parametrize("num_classes", [1, 100])
def test_output_shape(name, num_classes):
    assert NETWORKS[name](num_classes).eval()(images()).shape == (2, num_classes)


# Convolution kxk, i -> o: k*k*i*o weights + o biases. Linear i -> o: i*o + o. Batch norm: 2*o.
ALEXNET = {
    "conv": 1_792 + 110_784 + 663_936 + 884_992 + 590_080,
    "linear": 1024 * 4096 + 4096 + 4096 * 4096 + 4096,
    "last": 4096 + 1,  # per class
}
VGG_LINEAR = 2 * (512 * 512 + 512)
VGG11_CONV = 1_792 + 73_856 + 295_168 + 590_080 + 1_180_160 + 3 * 2_359_808
# 3-64-64, 64-128-128, 128-256-256-256, 256-512-512-512, 512-512-512-512
VGG16_CONV = (
    (1_792 + 36_928)
    + (73_856 + 147_584)
    + (295_168 + 2 * 590_080)
    + (1_180_160 + 2 * 2_359_808)
    + 3 * 2_359_808
)
# Per stage: four 3x3 convolutions, the 1x1 shortcut, and two batch norm parameters per channel.
RESNET_STEM = 9 * 3 * 64 + 2 * 64
RESNET_LAYER1 = 4 * (9 * 64 * 64) + 4 * 2 * 64
RESNET_LAYER2 = 9 * 64 * 128 + 3 * (9 * 128 * 128) + 64 * 128 + 5 * 2 * 128
RESNET_LAYER3 = 9 * 128 * 256 + 3 * (9 * 256 * 256) + 128 * 256 + 5 * 2 * 256
RESNET_LAYER4 = 9 * 256 * 512 + 3 * (9 * 512 * 512) + 256 * 512 + 5 * 2 * 512

# name: (total for 10 classes, the same by hand)
SIZES = {
    "alexnet": (23_272_266, ALEXNET["conv"] + ALEXNET["linear"] + 10 * ALEXNET["last"]),
    "vgg11": (9_750_922, VGG11_CONV + VGG_LINEAR + 10 * 513),
    "vgg11_bn": (9_756_426, VGG11_CONV + VGG_LINEAR + 10 * 513 + 2 * 2752),
    "vgg16": (15_245_130, VGG16_CONV + VGG_LINEAR + 10 * 513),
    "vgg16_bn": (15_253_578, VGG16_CONV + VGG_LINEAR + 10 * 513 + 2 * 4224),
    "resnet18": (
        11_173_962,
        RESNET_STEM + RESNET_LAYER1 + RESNET_LAYER2 + RESNET_LAYER3 + RESNET_LAYER4 + 10 * 513,
    ),
}
PER_CLASS = {"alexnet": 4097}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_count(name):
    def count(model):
        return sum(p.numel() for p in model.parameters())

    total, by_hand = SIZES[name]
    assert count(built(name)) == total == by_hand
    with torch.device("meta"):
        assert count(NETWORKS[name](100)) == total + 90 * PER_CLASS.get(name, 513)


@network
def test_layers_are_wus_ext_layers(name):
    layers = [m for m in built(name).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) >= 8
    assert all(type(layer) in (wnn.Conv2d, wnn.Linear) for layer in layers)


@network
def test_biases_are_torchvisions(name):
    convs = [m for m in built(name).modules() if isinstance(m, nn.Conv2d)]
    with_bias = [conv.bias is not None for conv in convs]
    assert with_bias == [name != "resnet18"] * len(convs)


@network
def test_every_relu_is_a_module_of_its_own(name):
    """So that hooks and fusion see each once."""
    calls = []
    relus = [m for m in built(name).modules() if isinstance(m, nn.ReLU)]
    handles = [relu.register_forward_hook(lambda m, *_: calls.append(m)) for relu in relus]
    built(name)(images())
    for handle in handles:
        handle.remove()
    assert len(calls) == len(set(calls)) == len(relus) > 0


@network
def test_he_initialisation_of_convolutions(name):
    for module in built(name).modules():
        if isinstance(module, nn.Conv2d):
            expected = (2 / module.weight[0].numel()) ** 0.5
            # The standard error of a sampled deviation is about expected / sqrt(2 * samples).
            tolerance = 6 / (2 * module.weight.numel()) ** 0.5
            assert abs(module.weight.std() / expected - 1) < tolerance
            assert module.bias is None or not module.bias.any()


@network
def test_state_dict_round_trip(name):
    torch.manual_seed(1)
    target = NETWORKS[name]().eval()
    x = images()
    expected = built(name)(x)
    assert not torch.equal(target(x), expected)
    target.load_state_dict(built(name).state_dict())
    torch.testing.assert_close(target(x), expected)


@network
def test_traces_with_fx(name):
    x = images()
    traced = torch.fx.symbolic_trace(built(name))
    assert torch.equal(traced(x), built(name)(x))


@network
def test_deepcopy_is_independent(name):
    x = images()
    expected = built(name)(x)
    clone = copy.deepcopy(built(name))
    assert torch.equal(clone(x), expected)
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert not clone(x).any()
    assert torch.equal(built(name)(x), expected)


@network
def test_channels_last(name):
    x = images()
    expected = built(name)(x)
    model = copy.deepcopy(built(name)).to(memory_format=torch.channels_last)
    actual = model(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("build", [alexnet, vgg11, vgg16], ids=["alexnet", "vgg11", "vgg16"])
def test_dropout(build):
    model = build(dropout=0.25)
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.25, 0.25]
    x = images()
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
    assert build(dropout=0.0).state_dict().keys() == model.state_dict().keys()


@network
def test_learns_a_small_batch(name):
    """Four noisy colours, eight steps."""
    model = copy.deepcopy(built(name))
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    y = torch.arange(4)
    colours = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [-1, -1, -1]])
    x = colours[:, :, None, None] + 0.3 * images(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(9):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]


BAD_CLASSES = {
    "zero": (0, ValueError, "at least 1, got 0"),
    "negative": (-1, ValueError, "at least 1, got -1"),
    "float": (10.0, TypeError, "integer, got 10.0"),
    "none": (None, TypeError, "integer, got None"),
    "bool": (True, TypeError, "integer, got True"),
}


@network
@pytest.mark.parametrize(("value", "error", "text"), BAD_CLASSES.values(), ids=BAD_CLASSES.keys())
def test_bad_num_classes(name, value, error, text):
    with pytest.raises(error, match=f"num_classes must be .*{text}"):
        NETWORKS[name](value)


@pytest.mark.parametrize("build", [alexnet, vgg11, vgg16], ids=["alexnet", "vgg11", "vgg16"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(-0.1, ValueError), (1.1, ValueError), (float("nan"), ValueError), ("x", TypeError)],
)
def test_bad_dropout(build, value, error):
    with pytest.raises(error, match="dropout must be"):
        build(dropout=value)
