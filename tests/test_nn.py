"""Drop-in layers: stock in a full step, stock over a constant weight in a skip step."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import wus_ext
from tests.cases import DTYPES, assert_near


@dataclass(frozen=True)
class LayerCase:
    name: str
    kind: str
    args: tuple
    input: tuple[int, ...]
    options: dict = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name

    def make(self, **extra) -> tuple[nn.Module, nn.Module]:
        """A stock layer and its drop-in with the same parameters, drawn away from 0 and 1."""
        stock = getattr(nn, self.kind)(*self.args, **self.options, **extra)
        with torch.no_grad():
            for parameter in stock.parameters():
                parameter.copy_(torch.randn_like(parameter))
        layer = getattr(wus_ext.nn, self.kind)(*self.args, **self.options, **extra)
        layer.load_state_dict(stock.state_dict())
        return stock, layer


IMAGE = (2, 4, 7, 6)

CONVS = [
    LayerCase("plain", "Conv2d", (4, 6, 3), IMAGE),
    LayerCase("no_bias", "Conv2d", (4, 6, 3), IMAGE, {"bias": False}),
    LayerCase("padded", "Conv2d", (4, 6, 3), IMAGE, {"padding": 1}),
    LayerCase("stride_2", "Conv2d", (4, 6, 3), IMAGE, {"stride": 2, "padding": (0, 1)}),
    LayerCase("rectangle", "Conv2d", (4, 6, (3, 2)), IMAGE, {"stride": (1, 2)}),
    LayerCase("dilated", "Conv2d", (4, 6, 3), IMAGE, {"dilation": 2, "padding": 2}),
    LayerCase("groups", "Conv2d", (4, 6, 3), IMAGE, {"groups": 2}),
    LayerCase("depthwise", "Conv2d", (4, 8, 3), IMAGE, {"groups": 4, "padding": 1}),
    LayerCase("valid", "Conv2d", (4, 6, 3), IMAGE, {"padding": "valid"}),
    LayerCase("unbatched", "Conv2d", (4, 6, 3), IMAGE[1:], {"padding": 1}),
    LayerCase("empty_batch", "Conv2d", (4, 6, 3), (0, 4, 7, 6), {"padding": 1}),
]
for mode in ("zeros", "reflect", "replicate", "circular"):
    for name, padding, kernel in (
        ("pad_1", 1, 3),
        ("pad_2x0", (2, 0), (5, 2)),
        ("same", "same", 3),
        ("same_even", "same", (4, 2)),
    ):
        options = {"padding": padding, "padding_mode": mode}
        CONVS.append(LayerCase(f"{mode}_{name}", "Conv2d", (4, 6, kernel), IMAGE, options))
CONVS += [
    LayerCase(
        "reflect_unbatched",
        "Conv2d",
        (4, 6, 3),
        IMAGE[1:],
        {"padding": 1, "padding_mode": "reflect"},
    ),
    LayerCase(
        "circular_groups_strided",
        "Conv2d",
        (4, 8, 3),
        IMAGE,
        {"padding": 2, "padding_mode": "circular", "groups": 4, "stride": 2, "dilation": 2},
    ),
]

VOLUME = (2, 4, 3, 4, 5)
CONVS += [
    LayerCase("1d", "Conv1d", (4, 6, 3), (2, 4, 7), {"padding": 1}),
    LayerCase("1d_unbatched", "Conv1d", (4, 6, 3), (4, 7), {"stride": 2, "groups": 2}),
    LayerCase("3d", "Conv3d", (4, 6, 2), VOLUME, {"bias": False}),
    LayerCase("3d_same", "Conv3d", (4, 6, (2, 3, 1)), VOLUME, {"padding": "same"}),
    LayerCase("transposed_1d", "ConvTranspose1d", (4, 6, 3), (2, 4, 7), {"stride": 2}),
    LayerCase("transposed_2d", "ConvTranspose2d", (4, 6, 2), IMAGE, {"stride": 2}),
    LayerCase("transposed_2d_groups", "ConvTranspose2d", (4, 6, 3), IMAGE, {"groups": 2}),
    LayerCase("transposed_3d", "ConvTranspose3d", (4, 6, 2), VOLUME, {"output_padding": 1,
                                                                      "stride": 2}),
]  # fmt: skip
for mode in ("reflect", "replicate", "circular"):
    options = {"padding": 1, "padding_mode": mode}
    CONVS.append(LayerCase(f"1d_{mode}", "Conv1d", (4, 6, 3), (2, 4, 7), options))
    CONVS.append(LayerCase(f"3d_{mode}", "Conv3d", (4, 6, 3), VOLUME, options))

LINEARS = [
    LayerCase("linear", "Linear", (5, 3), (4, 5)),
    LayerCase("linear_no_bias", "Linear", (5, 3), (4, 5), {"bias": False}),
    LayerCase("linear_1d", "Linear", (5, 3), (5,)),
    LayerCase("linear_3d", "Linear", (5, 3), (2, 4, 5)),
    LayerCase("linear_empty", "Linear", (5, 3), (0, 5)),
]

NORMS = [
    LayerCase(f"{kind}_{name}", kind, (4,), shape, options)
    for kind, shape in {
        "BatchNorm1d": (6, 4),
        "BatchNorm2d": (3, 4, 5, 2),
        "BatchNorm3d": (2, 4, 3, 2, 2),
    }.items()
    for name, options in {
        "default": {},
        "plain": {"affine": False},
        "batch_statistics": {"track_running_stats": False},
        "cumulative": {"momentum": None},
        "momentum_0": {"momentum": 0.0},
        "eps": {"eps": 0.3, "momentum": 0.7},
    }.items()
]
NORMS += [
    LayerCase("BatchNorm1d_sequence", "BatchNorm1d", (4,), (3, 4, 5)),
    LayerCase("GroupNorm", "GroupNorm", (2, 4), (3, 4, 5)),
    LayerCase("GroupNorm_plain", "GroupNorm", (2, 4), (3, 4, 5), {"affine": False}),
    LayerCase("LayerNorm", "LayerNorm", (5,), (3, 4, 5)),
    LayerCase("LayerNorm_2d", "LayerNorm", ((4, 5),), (3, 4, 5), {"eps": 0.1}),
    LayerCase("LayerNorm_no_bias", "LayerNorm", (5,), (3, 4, 5), {"bias": False}),
    LayerCase("RMSNorm", "RMSNorm", (5,), (3, 4, 5)),
    LayerCase("RMSNorm_plain", "RMSNorm", (5,), (3, 4, 5), {"elementwise_affine": False}),
    LayerCase("LayerNorm_plain", "LayerNorm", (5,), (3, 4, 5), {"elementwise_affine": False}),
]

CASES = CONVS + LINEARS + NORMS
by_name = pytest.mark.parametrize("case", CASES, ids=str)


def named(*names: str) -> list[LayerCase]:
    return [case for case in CASES if case.name in names]


def step(layer: nn.Module, input: torch.Tensor, grad_output=None):
    """Output, upstream gradient, input gradient and parameter gradients of one step."""
    input = input.clone().requires_grad_()
    layer.zero_grad(set_to_none=True)
    output = layer(input)
    if grad_output is None:
        grad_output = torch.randn_like(output)
    output.backward(grad_output)
    return (
        output.detach(),
        grad_output,
        input.grad,
        {n: p.grad for n, p in layer.named_parameters()},
    )


def assert_same(actual, expected, what: str) -> None:
    assert (actual is None) == (expected is None), f"{what}: {actual}, expected {expected}"
    if expected is not None:
        assert actual.dtype == expected.dtype, what
        assert torch.equal(actual, expected), f"{what} differs"


def assert_same_buffers(layer: nn.Module, stock: nn.Module) -> None:
    expected = dict(stock.named_buffers())
    assert [name for name, _ in layer.named_buffers()] == list(expected)
    for name, buffer in layer.named_buffers():
        assert_same(buffer, expected[name], name)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@by_name
def test_a_full_step_is_stock_bit_for_bit(case, training):
    stock, layer = case.make()
    stock.train(training)
    layer.train(training)
    for _ in range(2):
        input = torch.randn(case.input)
        output, grad_output, grad_input, grads = step(stock, input)
        got, _, got_input, got_grads = step(layer, input, grad_output)
        assert_same(got, output, "output")
        assert_same(got_input, grad_input, "input gradient")
        assert list(got_grads) == list(grads)
        for name, grad in grads.items():
            assert_same(got_grads[name], grad, name)
        assert_same_buffers(layer, stock)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@by_name
def test_a_skip_step_is_stock_over_a_constant_weight(case, training):
    stock, layer = case.make()
    stock.train(training)
    layer.train(training)
    layer.skip_wgrad = True
    if getattr(stock, "weight", None) is not None:
        stock.weight.requires_grad_(False)
    check = assert_same if case in NORMS else assert_near
    for _ in range(3):
        input = torch.randn(case.input)
        output, grad_output, grad_input, grads = step(stock, input)
        got, _, got_input, got_grads = step(layer, input, grad_output)
        check(got, output, "output")
        assert got.stride() == output.stride()
        check(got_input, grad_input, "input gradient")
        for name, grad in grads.items():
            assert (grad is None) == (name == "weight")
            check(got_grads[name], grad, name)
        assert_same_buffers(layer, stock)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", named("padded", "linear", "BatchNorm1d_default", "LayerNorm", "LayerNorm_2d"), ids=str
)
def test_a_skip_step_in_every_dtype(case, dtype):
    stock, layer = case.make(dtype=dtype)
    stock.weight.requires_grad_(False)
    layer.skip_wgrad = True
    input = torch.randn(case.input, dtype=dtype)
    output, grad_output, grad_input, grads = step(stock, input)
    got, _, got_input, got_grads = step(layer, input, grad_output)
    assert_near(got, output, "output")
    assert_near(got_input, grad_input, "input gradient")
    assert got_grads["weight"] is None
    assert_near(got_grads["bias"], grads["bias"], "bias")


@by_name
def test_biases_stand_still_too_where_they_are_told_to(case):
    stock, layer = case.make()
    stock.requires_grad_(False)
    layer.skip_wgrad = layer.skip_biases = True
    input = torch.randn(case.input)
    output, grad_output, grad_input, _ = step(stock, input)
    got, _, got_input, got_grads = step(layer, input, grad_output)
    assert_near(got, output, "output")
    assert_near(got_input, grad_input, "input gradient")
    assert set(got_grads.values()) <= {None}
    assert not layer(input).requires_grad
    layer.skip_wgrad = False  # alone it means nothing
    assert layer(input).requires_grad == any(True for _ in layer.parameters())


def saved_by(layer: nn.Module, input: torch.Tensor) -> set[int]:
    """Storages that backward keeps; the input is given an owner of its own first."""
    saved = set()

    def pack(tensor):
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(input)
    return saved


@pytest.mark.parametrize("case", [case for case in CONVS + LINEARS if 0 not in case.input], ids=str)
def test_a_skip_step_saves_the_weight_only(case):
    _, layer = case.make()
    input = torch.randn(case.input).requires_grad_()
    weight = layer.weight.untyped_storage().data_ptr()
    # A padded copy is stock's to save, so look at everything that is kept, not at the input only.
    assert saved_by(layer, input) - {weight}, "a full step keeps its input"
    layer.skip_wgrad = True
    assert saved_by(layer, input) == {weight}


@pytest.mark.parametrize(
    "case", named("plain", "linear", "BatchNorm2d_default", "LayerNorm"), ids=str
)
def test_nothing_is_done_for_a_first_layer_without_a_bias_that_trains(case):
    _, layer = case.make()
    layer.skip_wgrad = True
    assert layer(torch.randn(case.input)).requires_grad
    layer.bias.requires_grad_(False)
    assert not layer(torch.randn(case.input)).requires_grad


@by_name
def test_state_dict_keys_go_both_ways(case):
    stock, layer = case.make()
    assert list(stock.state_dict()) == list(layer.state_dict())
    stock.load_state_dict(layer.state_dict(), strict=True)
    layer.skip_wgrad = True
    layer.load_state_dict(stock.state_dict(), strict=True)
    assert list(stock.state_dict()) == list(layer.state_dict())


@by_name
def test_copies_keep_class_flag_and_values(case):
    _, layer = case.make()
    layer.skip_wgrad = True
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for made in (
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(file, weights_only=False),
    ):
        assert type(made) is type(layer)
        assert made.skip_wgrad is True
        for (name, got), (_, wanted) in zip(
            made.state_dict().items(), layer.state_dict().items(), strict=True
        ):
            assert got.data_ptr() != wanted.data_ptr() or wanted.numel() == 0
            assert_same(got, wanted, name)


@by_name
def test_a_drop_in_is_its_stock_class(case):
    stock, layer = case.make()
    assert isinstance(layer, getattr(nn, case.kind))
    assert repr(layer) == repr(stock)
    assert layer.skip_wgrad is False
    assert "skip_wgrad" not in layer.__dict__


def test_every_drop_in_is_public():
    for stock, layer in wus_ext.nn.DROP_INS.items():
        assert getattr(wus_ext.nn, stock.__name__) is layer
        assert layer.__doc__ != stock.__doc__


@pytest.mark.parametrize("case", named("plain", "linear", "BatchNorm2d_default"), ids=str)
def test_stock_errors_stay_stock_errors(case):
    stock, layer = case.make()
    layer.skip_wgrad = True
    bad = torch.randn(2, 9, 3, 3, 3)
    errors = []
    for module in (stock, layer):
        with pytest.raises((RuntimeError, ValueError)) as caught:
            module(bad)
        errors.append(caught.type)
    assert errors[0] is errors[1]


def test_the_weight_follows_a_hook_that_makes_it():
    """weight_norm's g and v are the parameters; the weight is made in each forward."""
    layer = wus_ext.nn.Linear(4, 3)
    with pytest.warns(FutureWarning, match="weight_norm"):
        layer = nn.utils.weight_norm(layer)
    expected = layer(torch.ones(2, 4))
    layer.skip_wgrad = True
    output = layer(torch.ones(2, 4))
    output.sum().backward()
    assert torch.equal(output, expected)
    assert {n for n, p in layer.named_parameters() if p.grad is not None} == {"bias"}


@pytest.mark.parametrize(
    ("name", "is_bias"),
    [
        ("bias", True),
        ("in_proj_bias", True),
        ("bias_hh_l0", True),
        ("bias_ih_l1_reverse", True),
        ("bias_k", True),
        ("bias_orig", True),
        ("relative_position_bias_table", True),
        ("layers.0.bias", True),
        ("weight", False),
        ("bias_layer.weight", False),
        ("unbiased_scale", False),
        ("debiaser", False),
    ],
)
def test_what_counts_as_a_bias(name, is_bias):
    assert wus_ext.nn.is_bias(name) is is_bias
