"""Converted networks of torchvision and layers of torch.nn, whole steps against stock PyTorch."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import wus_ext
from tests.cases import assert_near
from tests.engine.chains import saved_bytes
from wus_ext.nn import is_bias

models = pytest.importorskip("torchvision").models


def vgg11() -> nn.Module:
    features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=False)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Dropout())
    return nn.Sequential(features, *head, nn.Linear(64, 5))


def convnext() -> nn.Module:
    setting = models.convnext.CNBlockConfig
    blocks = [setting(8, 16, 2), setting(16, 24, 1), setting(24, None, 1)]
    return models.ConvNeXt(blocks, layer_scale=0.5, num_classes=5)


def swin() -> nn.Module:
    return models.SwinTransformer([2, 2], 8, [1, 1], [2, 2], [2, 2], num_classes=5)


NETWORKS = {
    "alexnet": (lambda: models.alexnet(num_classes=5), 64),
    "vgg11": (vgg11, 32),
    "resnet18": (lambda: models.resnet18(num_classes=5), 32),
    "mobilenet_v2": (lambda: models.mobilenet_v2(num_classes=5, width_mult=0.25), 32),
    "vit": (lambda: models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5), 16),
    "convnext": (convnext, 32),
    "swin": (swin, 16),
}


def trains_in_a_skip_step(name: str) -> bool:
    path, _, last = name.rpartition(".")
    return is_bias(last) or (last == "original" and is_bias(path))


def step(model: nn.Module, inputs: tuple, grad_output=None):
    """One step with its own random numbers: output, upstream gradient, parameter gradients."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    output = model(*inputs)
    output = output[0] if isinstance(output, tuple) else output
    if grad_output is None:
        grad_output = torch.randn_like(output)
    output.backward(grad_output)
    return output.detach(), grad_output, {n: p.grad for n, p in model.named_parameters()}


def check_skip_step(model: nn.Module, stock: nn.Module, inputs: tuple) -> None:
    trained = {name for name, _ in stock.named_parameters() if trains_in_a_skip_step(name)}
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(name in trained)
    parameters = [id(parameter) for parameter in model.parameters()]
    with wus_ext.skip_weight_updates(model):
        expected, grad_output, wanted = step(stock, inputs)
        output, _, got = step(model, inputs, grad_output)
    assert_near(output, expected, "output")
    assert [id(parameter) for parameter in model.parameters()] == parameters
    # A deep network turns one rounding into many, and a gradient that cancels is noise.
    largest = max(grad.abs().max().item() for grad in wanted.values() if grad is not None)
    for name, grad in wanted.items():
        assert (got[name] is None) == (grad is None), name
        if grad is not None:
            scale = max(grad.abs().max().item(), 1e-2 * largest)
            assert (got[name] - grad).abs().max().item() <= 1e-3 * scale, name
    assert {name for name, grad in got.items() if grad is not None} == {
        name for name, grad in wanted.items() if grad is not None
    }


def check_full_step(model: nn.Module, stock: nn.Module, inputs: tuple) -> None:
    expected, grad_output, wanted = step(stock, inputs)
    output, _, got = step(model, inputs, grad_output)
    assert torch.equal(output, expected)
    assert list(got) == list(wanted)
    for name, grad in wanted.items():
        assert torch.equal(got[name], grad), name
    for (name, buffer), (_, other) in zip(
        model.named_buffers(), stock.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, other), name


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    make, size = NETWORKS[name]
    model = make()
    stock = copy.deepcopy(model)
    inputs = (torch.randn(2, 3, size, size),)
    wus_ext.convert(model)
    check_full_step(model, stock, inputs)
    names = {module: name for name, module in model.named_modules()}
    for norm in names:
        if isinstance(norm, nn.BatchNorm2d):  # two images at one pixel normalise to signs
            norm.eval()
            stock.get_submodule(names[norm]).eval()
    check_skip_step(model, stock, inputs)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight = self.first.weight
        self.out = nn.Linear(6, 11)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.second(self.first(self.embed(x)).relu()))


class TiedByHand(nn.Module):
    """Uses a child's weight itself, and a list of raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.scales = nn.ParameterList([torch.rand(6), torch.rand(6)])
        self.out_bias = nn.Parameter(torch.randn(11))

    def forward(self, x):
        hidden = self.embed(x) * self.scales[0] + self.scales[1]
        return nn.functional.linear(hidden, self.embed.weight, self.out_bias)


class OwnConv(nn.Conv2d):
    """Overrides forward: must be left alone."""

    def forward(self, x):
        return super().forward(x.tanh()) * 2.0


class Attention(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x):
        return self.attention(x, x, x, need_weights=False)[0]


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(
            nn.utils.weight_norm(nn.Linear(6, 5)), nn.utils.weight_norm(nn.Linear(5, 3))
        )


def parametrized() -> nn.Module:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(6, 5)),
        parametrizations.spectral_norm(nn.Linear(5, 5)),
        nn.Linear(5, 3),
    )
    nn.utils.parametrize.register_parametrization(model[2], "bias", nn.Tanh(), unsafe=True)
    return model


def pruned() -> nn.Module:
    from torch.nn.utils import prune

    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))
    prune.l1_unstructured(model[0], "weight", 0.3)
    prune.random_unstructured(model[0], "bias", 0.3)
    return model


TOKENS, VECTOR, SEQUENCE = torch.tensor([[1, 5, 2], [3, 3, 9]]), (4, 6), (2, 5, 8)

LAYERS = {
    "tied": (Tied, TOKENS),
    "tied_by_hand": (TiedByHand, TOKENS),
    "embedding_bag": (
        lambda: nn.Sequential(nn.EmbeddingBag(11, 6), nn.Linear(6, 2)),
        TOKENS,
    ),
    "attention": (Attention, SEQUENCE),
    "attention_bias_kv": (lambda: Attention(add_bias_kv=True), SEQUENCE),
    "attention_kdim": (lambda: Attention(kdim=8, vdim=8), SEQUENCE),
    "transformer": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ),
        SEQUENCE,
    ),
    "lstm": (lambda: nn.LSTM(8, 4, num_layers=2, bidirectional=True, batch_first=True), SEQUENCE),
    "lstm_proj": (lambda: nn.LSTM(8, 4, proj_size=3), SEQUENCE),
    "gru": (lambda: nn.GRU(8, 4, batch_first=True), SEQUENCE),
    "rnn": (lambda: nn.RNN(8, 4), SEQUENCE),
    "conv1d": (lambda: nn.Conv1d(5, 4, 3), SEQUENCE),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (1, 2, 4, 4, 4)),
    "conv_transpose": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 2, 3), nn.PReLU()),
        (1, 2, 6, 6),
    ),
    "own_conv": (lambda: nn.Sequential(OwnConv(2, 4, 3), nn.Conv2d(4, 2, 1)), (1, 2, 6, 6)),
    "bilinear_in_parts": (lambda: nn.Sequential(nn.Linear(6, 4), nn.RMSNorm(4)), VECTOR),
    "instance_norm": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)),
        (2, 2, 6, 6),
    ),
    "old_weight_norm": (old_weight_norm, VECTOR),
    "parametrized": (parametrized, VECTOR),
    "pruned": (pruned, VECTOR),
}


@pytest.mark.filterwarnings("ignore:RNN module weights")
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    make, given = LAYERS[name]
    torch.manual_seed(3)
    model = make()
    torch.manual_seed(3)
    stock = make()
    inputs = (given if isinstance(given, torch.Tensor) else torch.randn(given),)
    kinds = [type(module) for module in model.modules()]
    wus_ext.convert(model)
    check_full_step(model, stock, inputs)
    check_skip_step(model, stock, inputs)
    for parameter in stock.parameters():
        parameter.requires_grad_(True)
    check_full_step(model, stock, inputs)
    wus_ext.revert(model)
    assert [type(module) for module in model.modules()] == kinds


@pytest.mark.filterwarnings("ignore:RNN module weights")
@pytest.mark.parametrize("name", LAYERS)
def test_layers_save_no_more_than_stock(name):
    make, given = LAYERS[name]
    stock = make()
    model = wus_ext.convert(make())
    input = given if isinstance(given, torch.Tensor) else torch.randn(given).requires_grad_()
    full = saved_bytes(stock, input)[0]
    for key, parameter in stock.named_parameters():
        parameter.requires_grad_(trains_in_a_skip_step(key))
    with wus_ext.skip_weight_updates(model):
        ours = saved_bytes(model, input)[0]
    assert ours <= saved_bytes(stock, input)[0] <= full


#: Values kept next to the input, parameters and buffers, for an input of 4 rows of 6.
NEEDED = {
    "layer_norm": (lambda: nn.LayerNorm(6), 2 * 4),  # mean and deviation of each row
    "group_norm": (lambda: nn.GroupNorm(2, 6), 2 * 4 * 2),
    "rms_norm": (lambda: nn.RMSNorm(6), 4),
    "batch_norm": (lambda: nn.BatchNorm1d(6), 2 * 6),
    "linear": (lambda: nn.Linear(6, 6), 0),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), 0),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 4, 3), 0),
}


@pytest.mark.parametrize("name", NEEDED)
def test_a_layer_saves_what_its_data_gradient_needs(name):
    make, values = NEEDED[name]
    layer = wus_ext.convert(nn.Sequential(make()), fuse=False)
    with wus_ext.skip_weight_updates(layer):
        assert saved_bytes(layer, torch.randn(4, 6, requires_grad=True))[0] <= 4 * values


def test_a_frozen_embedding_needs_no_backward():
    for embedding in (nn.Embedding(11, 6), nn.EmbeddingBag(11, 6)):
        model = wus_ext.convert(nn.Sequential(embedding, nn.ReLU()))
        assert model(TOKENS).requires_grad
        with wus_ext.skip_weight_updates(model):
            assert not model(TOKENS).requires_grad


def test_a_layer_parametrized_after_convert():
    model = wus_ext.convert(nn.Sequential(nn.Linear(6, 5), nn.Embedding(3, 2)))
    root = wus_ext.convert(TiedByHand())
    parametrizations.weight_norm(model[0])
    nn.utils.parametrize.register_parametrization(root, "out_bias", nn.Tanh(), unsafe=True)
    wus_ext.convert(model)
    assert "ParametrizedTiedByHand" in wus_ext.describe(root)
    for converted, layer, given in ((model, model[0], torch.randn(4, 6)), (root, root, TOKENS)):
        with wus_ext.skip_weight_updates(converted):
            layer(given).sum().backward()
        names = {name for name, p in converted.named_parameters() if p.grad is not None}
        assert names
        assert all(trains_in_a_skip_step(name) for name in names)
