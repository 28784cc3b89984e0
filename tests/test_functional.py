"""Every operator against its stock twin, and the proof that a skip step skips."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from tests.cases import (
    CONV_CASES,
    CONV_TRANSPOSE_CASES,
    DEVICES,
    DTYPES,
    LINEAR_SHAPES,
    ConvCase,
    assert_near,
    layouts,
)
from wus_ext import functional, reference

ids = str
CONVOLUTIONS = CONV_CASES + CONV_TRANSPOSE_CASES


def operands(case: ConvCase, dtype=torch.float32, device="cpu"):
    input = torch.randn(case.input, dtype=dtype, device=device)
    weight = torch.randn(case.weight, dtype=dtype, device=device)
    bias = torch.randn(case.out_channels, dtype=dtype, device=device) if case.bias else None
    return input, weight, bias


def both(case: ConvCase):
    """The operator of a case and its twin."""
    return getattr(functional, case.op), getattr(reference, case.op)


def leaves(*tensors):
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def gradients(function, input, weight, bias, grad_output=None, **options):
    input, weight, bias = leaves(input, weight, bias)
    output = function(input, weight, bias, **options)
    if grad_output is None:
        grad_output = torch.randn_like(output)
    output.backward(grad_output)
    grads = {
        "input": input.grad,
        "weight": weight.grad,
        "bias": None if bias is None else bias.grad,
    }
    return output.detach(), grads, grad_output


def check_against_twin(op, twin, input, weight, bias, **options):
    expected, wanted, grad_output = gradients(twin, input, weight, bias, skip_wgrad=True, **options)
    actual, got, _ = gradients(op, input, weight, bias, grad_output, skip_wgrad=True, **options)
    assert_near(actual, expected, "output")
    assert actual.stride() == expected.stride()
    assert_near(got["input"], wanted["input"], "input gradient")
    assert_near(got["bias"], wanted["bias"], "bias gradient")
    assert got["weight"] is None


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=ids)
def test_convolutions_equal_stock(case, dtype, device):
    check_against_twin(*both(case), *operands(case, dtype, device), **case.options)


@pytest.mark.parametrize("layout", ["every_other", "transposed", "channels_last"])
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=ids)
def test_convolutions_in_every_layout(case, layout):
    input, weight, bias = operands(case)
    if layout not in layouts(input):
        pytest.skip(f"no {layout} for {len(case.input)} dimensions")
    check_against_twin(*both(case), layouts(input)[layout], weight, bias, **case.options)


def test_conv2d_takes_an_expanded_upstream_gradient():
    input, weight, bias = operands(CONV_CASES[0])
    grad_output = torch.randn(2, 16, 1, 1).expand(2, 16, 9, 7)
    _, wanted, _ = gradients(
        reference.conv2d, input, weight, bias, grad_output, padding=1, skip_wgrad=True
    )
    _, got, _ = gradients(
        functional.conv2d, input, weight, bias, grad_output, padding=1, skip_wgrad=True
    )
    assert_near(got["input"], wanted["input"], "input gradient")
    assert_near(got["bias"], wanted["bias"], "bias gradient")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("shape", LINEAR_SHAPES.values(), ids=LINEAR_SHAPES)
def test_linear_equals_stock(shape, dtype, bias, device):
    make = {"dtype": dtype, "device": device}
    input, weight = torch.randn(shape, **make), torch.randn(7, 12, **make)
    check_against_twin(
        functional.linear,
        reference.linear,
        input,
        weight,
        torch.randn(7, **make) if bias else None,
    )


@pytest.mark.parametrize("case", CONVOLUTIONS, ids=ids)
def test_full_convolutions_are_stock_bit_for_bit(case):
    tensors = operands(case)
    op, twin = both(case)
    expected, wanted, grad_output = gradients(twin, *tensors, **case.options)
    actual, got, _ = gradients(op, *tensors, grad_output, **case.options)
    assert torch.equal(actual, expected)
    for name, grad in wanted.items():
        assert (grad is None and got[name] is None) or torch.equal(got[name], grad), name


def test_full_linear_is_stock_bit_for_bit():
    tensors = torch.randn(5, 12), torch.randn(7, 12), torch.randn(7)
    expected, wanted, grad_output = gradients(reference.linear, *tensors)
    actual, got, _ = gradients(functional.linear, *tensors, grad_output)
    assert torch.equal(actual, expected)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)


def saved_storages(function, *tensors, **options):
    """Storages that autograd keeps for backward while `function` runs."""
    saved = set()

    def pack(tensor):
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*tensors, **options)
    return saved, output


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "every_other"])
@pytest.mark.parametrize("case", [c for c in CONVOLUTIONS if c.input[0] != 0], ids=ids)
def test_convolutions_save_the_weight_only(case, layout):
    op = both(case)[0]
    input, weight, bias = operands(case)
    input, weight, bias = leaves(layouts(input).get(layout, input), weight, bias)
    saved, output = saved_storages(op, input, weight, bias, skip_wgrad=True, **case.options)
    assert output.requires_grad
    assert saved == {weight.untyped_storage().data_ptr()}
    if case.bias:
        saved, output = saved_storages(
            op, input.detach(), weight, bias, skip_wgrad=True, **case.options
        )
        assert output.requires_grad
        assert not saved


def test_stock_conv2d_saves_its_input():
    """What the test above would see if nothing were skipped."""
    input, weight, bias = leaves(*operands(CONV_CASES[0]))
    saved, _ = saved_storages(reference.conv2d, input, weight, bias, padding=1, skip_wgrad=True)
    assert input.untyped_storage().data_ptr() in saved


def test_linear_saves_the_weight_only():
    input, weight, bias = leaves(torch.randn(5, 12), torch.randn(7, 12), torch.randn(7))
    saved, _ = saved_storages(functional.linear, input, weight, bias, skip_wgrad=True)
    assert saved == {weight.untyped_storage().data_ptr()}
    saved, output = saved_storages(functional.linear, input.detach(), weight, bias, skip_wgrad=True)
    assert output.requires_grad
    assert not saved


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (2, 0, 1, 3), (0, 0, 2, 2)], ids=ids)
def test_pad_equals_stock_and_saves_nothing(mode, padding):
    input = torch.randn(2, 3, 5, 4, requires_grad=True)
    saved, actual = saved_storages(functional.pad, input, padding, mode)
    assert not saved
    stock = {"zeros": "constant"}.get(mode, mode)
    expected = torch.nn.functional.pad(input, padding, stock)
    assert torch.equal(actual, expected)
    grad_output = torch.randn_like(expected)
    (got,) = torch.autograd.grad(actual, input, grad_output)
    (wanted,) = torch.autograd.grad(expected, input, grad_output)
    assert_near(got, wanted, "input gradient")


def events(function):
    """Names of the operators that ran."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        function()
    return {event.name for event in profiler.events()}


ONE_OF_EACH = [
    case
    for case in CONVOLUTIONS
    if case.name in ("3x3", "1d", "3d", "transposed_1d", "transposed_2d", "transposed_3d")
]
one_of_each = pytest.mark.parametrize("case", ONE_OF_EACH, ids=ids)


@one_of_each
def test_no_weight_gradient_kernel_runs(case):
    input, weight, bias = leaves(*operands(case))
    op = both(case)[0]

    def step(skip):
        return lambda: op(input, weight, bias, skip_wgrad=skip, **case.options).sum().backward()

    assert "aten::convolution_backward" in events(step(skip=False))
    skipped = events(step(skip=True))
    assert not {name for name in skipped if "convolution_backward" in name}
    assert not {name for name in skipped if "backward_weights" in name}


def test_no_weight_gradient_product_runs_in_linear():
    input, weight, bias = leaves(torch.randn(5, 12), torch.randn(7, 12), torch.randn(7))

    def products(skip):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            functional.linear(input, weight, bias, skip_wgrad=skip).sum().backward()
        return sum(event.name in ("aten::mm", "aten::addmm") for event in profiler.events())

    assert products(skip=False) == 3
    assert products(skip=True) == 2


@pytest.mark.parametrize("case", [c for c in CONVOLUTIONS if c.input[0] != 0], ids=ids)
def test_gradcheck_and_double_backward(case):
    input, weight, bias = leaves(*operands(case, torch.float64))
    variables = (input,) if bias is None else (input, bias)

    def op(input, bias=None):
        return both(case)[0](input, weight, bias, skip_wgrad=True, **case.options)

    assert torch.autograd.gradcheck(op, variables, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, variables, fast_mode=True)


@pytest.mark.parametrize("shape", LINEAR_SHAPES.values(), ids=LINEAR_SHAPES)
def test_linear_gradcheck_and_double_backward(shape):
    input, weight, bias = leaves(
        torch.randn(shape).double(), torch.randn(7, 12).double(), torch.randn(7).double()
    )

    def op(input, bias):
        return functional.linear(input, weight, bias, skip_wgrad=True)

    assert torch.autograd.gradcheck(op, (input, bias), fast_mode=True)
    assert torch.autograd.gradgradcheck(op, (input, bias), fast_mode=True)


@pytest.mark.parametrize("bias", [False, True])
@one_of_each
def test_opcheck_convolution(case, bias):
    input, weight, shift = leaves(*operands(case))
    ones = [1] * case.dims
    torch.library.opcheck(
        torch.ops.wus.convolution,
        (input, weight, shift if bias else None, ones, ones, ones),
        {"transposed": case.transposed, "output_padding": [0] * case.dims, "groups": 1},
    )


@pytest.mark.parametrize("bias", [False, True])
def test_opcheck_linear(bias):
    input, weight, shift = leaves(torch.randn(5, 12), torch.randn(7, 12), torch.randn(7))
    torch.library.opcheck(torch.ops.wus.linear, (input, weight, shift if bias else None))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=ids)
def test_autocast_as_stock(dtype, device):
    linear = [t.to(device) for t in (torch.randn(5, 12), torch.randn(7, 12), torch.randn(7))]
    with torch.autocast(device, dtype):
        check_against_twin(functional.linear, reference.linear, *linear)
        for case in ONE_OF_EACH:
            check_against_twin(*both(case), *operands(case, device=device), **case.options)


@pytest.mark.parametrize(
    ("needs_input", "needs_bias"), [(True, False), (False, True), (False, False)]
)
def test_only_what_is_needed_is_computed(needs_input, needs_bias):
    input, weight, bias = operands(CONV_CASES[0])
    input.requires_grad_(needs_input)
    weight.requires_grad_()
    bias.requires_grad_(needs_bias)
    output = functional.conv2d(input, weight, bias, padding=1, skip_wgrad=True)
    assert output.requires_grad == (needs_input or needs_bias)
    if output.requires_grad:
        output.sum().backward()
    assert (input.grad is not None) == needs_input
    assert (bias.grad is not None) == needs_bias
    assert weight.grad is None


def test_inference_mode_and_no_grad():
    input, weight, bias = operands(CONV_CASES[0])
    expected = reference.conv2d(input, weight, bias, padding=1)
    with torch.inference_mode():
        assert torch.equal(
            functional.conv2d(input, weight, bias, padding=1, skip_wgrad=True), expected
        )
    with torch.no_grad():
        output = functional.conv2d(input, weight.requires_grad_(), bias, padding=1, skip_wgrad=True)
    assert torch.equal(output, expected)
    assert not output.requires_grad


def test_a_weight_changed_before_backward_is_an_error():
    """The saved weight is the data gradient's; silently using a newer one would be wrong."""
    input, weight, bias = leaves(*operands(CONV_CASES[0]))
    output = functional.conv2d(input, weight, bias, padding=1, skip_wgrad=True)
    with torch.no_grad():
        weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"padding": "some"}, "padding: 'some' is not"),
        ({"padding": "same", "stride": 2}, "needs stride 1"),
        ({"stride": (1, 2, 3)}, "stride: expected an integer or 2 of them"),
    ],
)
def test_bad_options_are_named(options, message):
    input, weight, bias = operands(CONV_CASES[0])
    with pytest.raises(ValueError, match=message):
        functional.conv2d(input, weight, bias, skip_wgrad=True, **options)


def test_a_border_too_wide_is_named():
    with pytest.raises(ValueError, match="reflect fills a border of at most 3 pixels"):
        functional.pad(torch.randn(1, 1, 4, 4), (4, 0, 0, 0), "reflect")
    with pytest.raises(ValueError, match="mode: 'mirror'"):
        functional.pad(torch.randn(1, 1, 4, 4), (1, 1, 1, 1), "mirror")


def test_bad_shapes_are_errors():
    with pytest.raises(RuntimeError, match="expected 3 or 4 dimensions"):
        functional.conv2d(torch.randn(2, 3), torch.randn(4, 3, 3, 3), skip_wgrad=True)
    with pytest.raises(RuntimeError, match="weight must be"):
        functional.linear(torch.randn(2, 3), torch.randn(3), skip_wgrad=True)


def test_more_than_2_to_the_31_elements():
    """Shapes only: the fake kernels and the size arithmetic take 64 bits."""
    with torch.device("meta"):
        input = torch.empty(2**16, 64, 32, 32, requires_grad=True)
        weight, bias = torch.empty(64, 64, 3, 3), torch.empty(64, requires_grad=True)
        output = functional.conv2d(input, weight, bias, padding=1, skip_wgrad=True)
    output.backward(torch.empty_like(output))
    assert output.numel() == input.grad.numel() == 2**32
