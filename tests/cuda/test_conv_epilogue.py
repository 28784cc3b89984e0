"""cuDNN's kernels for data gradient, mask and bias gradient against two passes: on a real GPU, and
everything around it with a stand-in for the kernel where there is none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wus_ext
from wus_ext.engine import activation, autograd, options, support
from wus_ext.engine.conv import algorithm as algorithms
from wus_ext.engine.conv import choice
from wus_ext.engine.gpu import conv_epilogue, linked, tuning

from ..cpu.rows import dense, pack, rows_of, same
from .steps import check_replay, results

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class StandIn:
    """The kernel's operators, out of ATen's."""

    def __init__(self):
        self.asked, self.tf32, self.calls, self.has = [], [], 0, True

    def conv_dgrad_relu_exists(self, grad, weight, input_size, padding, dilation, sum, tf32):
        self.asked.append((*grad.shape, sum))
        self.tf32.append(tf32)
        return self.has

    def conv_dgrad_relu(self, grad, weight, mask, input_size, padding, dilation, sum, tf32):
        self.calls += 1
        numbers = ([1, 1], padding, dilation, True, [0, 0], 1)
        dgrad = torch.ops.aten.convolution(grad, weight, None, *numbers)
        assert tuple(dgrad.shape[2:]) == tuple(input_size)
        keep = unpacked(mask, dgrad.size(1)).view(dense(dgrad).permute(0, 2, 3, 1).shape)
        dgrad = dense(torch.where(keep.permute(0, 3, 1, 2) > 0, dgrad, 0))
        return dgrad, dgrad.float().sum((0, 2, 3)) if sum else dgrad.new_empty(0)


class Counted:
    """The real operators, counted."""

    def __init__(self):
        self.asked, self.tf32, self.calls = [], [], 0

    def conv_dgrad_relu_exists(self, grad, *rest):
        self.asked.append((*grad.shape, rest[-2]))
        self.tf32.append(rest[-1])
        return torch.ops.wus.conv_dgrad_relu_exists(grad, *rest)

    def conv_dgrad_relu(self, *arguments):
        self.calls += 1
        return torch.ops.wus.conv_dgrad_relu(*arguments)


def unpacked(mask, channels):
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=mask.device) & 1
    return bits.flatten(1)[:, :channels]


@pytest.fixture(params=["one_kernel", "sum_apart"])
def cudnn(gpu, monkeypatch, request):
    if gpu.device == "cpu":
        operators = StandIn()
        monkeypatch.setitem(support.TYPES, "cpu", FLOATS)
        for module in (activation, algorithms, autograd, linked):
            monkeypatch.setattr(module, "ops", gpu.ops)
        monkeypatch.setattr(conv_epilogue, "sums", gpu.ops)
        for module in (choice, conv_epilogue):
            monkeypatch.setattr(module, "on_gpu", lambda tensor: True)
        monkeypatch.setattr(options, "build_info", lambda: {"cudnn_frontend": "stand-in"})
    elif wus_ext.build_info()["cudnn_frontend"] is None:
        pytest.skip("wus_ext was built without cuDNN's graphs")
    else:
        operators = Counted()
    monkeypatch.setattr(conv_epilogue, "ops", operators)
    always = tuning.Choices(lambda way: 1.0 if way.__name__ == request.param else 2.0)
    monkeypatch.setattr(conv_epilogue, "choices", always)
    operators.device = gpu.device
    return operators


def network(*channels, kernel=3, **conv):
    layers = []
    for i, o in zip(channels, channels[1:]):  # noqa: B905, RUF007
        layers += [nn.Conv2d(i, o, kernel, **({"padding": kernel // 2} | conv)), nn.ReLU()]
    return nn.Sequential(*layers)


def twins(model, cudnn, dtype):
    model = model.to(cudnn.device, dtype, memory_format=torch.channels_last)
    models = [model, copy.deepcopy(model)]
    for model, names in zip(models, ((), ("cudnn",)), strict=True):
        wus_ext.set_skip(wus_ext.convert(model, epilogues=names), True)
    return models


def compare(models, cudnn, dtype, size=(3, 8, 9, 7)):
    x = dense(torch.randn(size)).to(cudnn.device, dtype)
    with torch.no_grad():
        g = torch.randn(models[0](x).shape).to(cudnn.device, dtype)
    expected, actual = (results(model, x, g) for model in models)
    for mine, theirs in zip(actual, expected, strict=True):
        assert mine.dtype == theirs.dtype
        error = (mine.double() - theirs.double()).norm() / theirs.double().norm()
        assert error <= 8 * torch.finfo(dtype).eps, f"{error:.1e}"
    return actual


def need(cudnn):
    if cudnn.device == "cuda" and not cudnn.calls:
        pytest.skip("this cuDNN has no such kernel")


@pytest.mark.parametrize("channels", [1, 8, 13, 24, 264])
def test_unpack_mask(gpu, channels):
    keep = torch.rand(5, channels, 3, 2) < 0.5
    mask = gpu(pack(keep))
    same(gpu.ops.unpack_mask(mask, channels).cpu(), rows_of(keep).to(torch.int8))
    assert gpu.ops.unpack_mask(mask[:0], channels).shape == (0, channels)
    with pytest.raises(ValueError, match="mask must be a contiguous uint8 tensor"):
        gpu.ops.unpack_mask(mask, channels + 8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_three_layers(cudnn, dtype):
    compare(twins(network(8, 16, 24, 8), cudnn, dtype), cudnn, dtype)
    need(cudnn)
    assert len(cudnn.asked) == 4  # two layers, with and without the sum
    assert cudnn.calls >= 2


@pytest.mark.parametrize(
    "conv", [{"kernel": 1}, {"kernel": 5}, {"padding": 0}, {"padding": 2, "dilation": 2}], ids=str
)
def test_geometries(cudnn, conv):
    compare(twins(network(8, 16, 8, **conv), cudnn, torch.bfloat16), cudnn, torch.bfloat16)
    need(cudnn)
    assert cudnn.calls


@pytest.mark.parametrize(
    ("channels", "conv"),
    [((8, 12, 8), {}), ((8, 16, 12), {}), ((8, 16, 8), {"stride": 2}), ((8, 16, 8), {"groups": 2})],
    ids=str,
)
def test_what_does_not_suit_is_never_asked_for(cudnn, channels, conv):
    compare(twins(network(*channels, **conv), cudnn, torch.bfloat16), cudnn, torch.bfloat16)
    assert not cudnn.asked


@pytest.mark.parametrize(("flag", "value"), [("deterministic", True), ("enabled", False)])
def test_what_cudnn_must_not_do_is_never_asked_for(cudnn, monkeypatch, flag, value):
    """No choice may depend on times where runs must be alike."""
    monkeypatch.setattr(torch.backends.cudnn, flag, value)
    compare(twins(network(8, 16, 8), cudnn, torch.bfloat16), cudnn, torch.bfloat16)
    assert not cudnn.asked


@pytest.fixture
def convolutions():
    """Their precision, as it was afterwards."""
    settings = torch.backends.cudnn.conv
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_tf32_is_as_it_was_set(cudnn, convolutions, precision):
    """By torch's new setting, next to which asking for the old one may raise."""
    convolutions.fp32_precision = precision
    _, model = twins(network(8, 16, 8), cudnn, torch.float32)
    x = dense(torch.randn(3, 8, 9, 7)).to(cudnn.device).requires_grad_()
    model(x).sum().backward()
    assert cudnn.tf32 == [precision == "tf32"] * 2


def test_each_shape_is_tried_once(cudnn):
    models = twins(network(8, 16, 8), cudnn, torch.bfloat16)
    compare(models, cudnn, torch.bfloat16)
    compare(models, cudnn, torch.bfloat16)
    assert cudnn.asked == [(3, 8, 9, 7, True), (3, 8, 9, 7, False)]
    compare(models, cudnn, torch.bfloat16, size=(3, 8, 5, 5))
    assert cudnn.asked[2:] == [(3, 8, 5, 5, True), (3, 8, 5, 5, False)]


def test_without_a_kernel_two_passes_are_made(cudnn):
    if cudnn.device == "cuda":
        pytest.skip("what exists is not known")
    cudnn.has = False
    unlinked, link = twins(network(8, 16, 8), cudnn, torch.bfloat16)
    x = dense(torch.randn(3, 8, 9, 7, dtype=torch.bfloat16))
    g = torch.randn(3, 8, 9, 7, dtype=torch.bfloat16)
    for mine, theirs in zip(results(link, x, g), results(unlinked, x, g), strict=True):
        assert torch.equal(mine, theirs)
    assert cudnn.asked
    assert not cudnn.calls


def test_the_same_bits_again(cudnn):
    model = twins(network(8, 64, 64), cudnn, torch.bfloat16)[1]
    x = dense(torch.randn(16, 8, 16, 16)).to(cudnn.device, torch.bfloat16)
    g = torch.randn(16, 64, 16, 16).to(cudnn.device, torch.bfloat16)
    first = results(model, x, g)
    need(cudnn)
    for mine, theirs in zip(results(model, x, g), first, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_goes_where_it_goes_in_two_passes(cudnn, value):
    """A gradient of NaN or infinity passes open ReLUs and no closed one."""
    models = twins(network(8, 16, 8, kernel=1), cudnn, torch.bfloat16)
    compare(models, cudnn, torch.bfloat16)
    need(cudnn)
    x = dense(torch.randn(3, 8, 9, 7)).to(cudnn.device, torch.bfloat16)
    g = torch.randn(3, 8, 9, 7).to(cudnn.device, torch.bfloat16)
    g[1, :, 4, 4] = value
    expected, actual = (results(model, x, g)[1].isfinite() for model in models)
    assert torch.equal(actual, expected)


def test_captured_in_a_graph(cudnn):
    if cudnn.device == "cpu":
        pytest.skip("needs a GPU")
    model = twins(network(8, 64, 64), cudnn, torch.bfloat16)[1]
    x = dense(torch.randn(16, 8, 16, 16)).to("cuda", torch.bfloat16)
    g = torch.randn(16, 64, 16, 16).to("cuda", torch.bfloat16)
    results(model, x, g)
    need(cudnn)
    check_replay(model, x, g)
