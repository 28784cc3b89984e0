"""The GPU's element-wise kernels against stock PyTorch on the CPU: the same values, bit for bit
where nothing is summed. On the emulated GPU always, on a real one where there is one."""

import pytest
import torch
import torch.nn.functional as F

from ..cpu.rows import POOL_SHAPES, SHAPES, dense, pack, rows_of, same, values

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)

#: Beyond one block in each direction: more than 32 octets of channels, more rows than blocks take.
WIDE = [(3, 4096), (2, 520, 3, 3), (9000, 8), (40000, 1), (5, 264, 16, 16)]


def cpu_values(shape, dtype, special=False):
    return values(shape, special).to(dtype)


def gradient(shape, dtype):
    return dense(torch.randn(shape)).to(dtype)


def at_offset(x):
    """The same values one element into a larger block, where no vector access is aligned."""
    block = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    moved = block[1:].as_strided(x.shape, x.stride(), 1).copy_(x)
    assert moved.data_ptr() % 8
    return moved


def assert_equal(results, expected):
    for result, value in zip(results, expected, strict=True):
        same(result, value)


def assert_bias_grad(actual, masked):
    """A sum in float32, whatever the gradient is."""
    exact = rows_of(masked).double().sum(0)
    magnitude = rows_of(masked).double().abs().sum(0)
    error = (actual.cpu().double() - exact).abs()
    assert actual.dtype == torch.float32
    bound = magnitude * 2e-6 + 1e-7
    assert (error <= bound).all(), f"error {error.max():.1e}"


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
def test_relu_mask_is_stock_relu(gpu, shape, special, dtype):
    x = cpu_values(shape, dtype, special)
    output, mask = gpu.ops.activate(gpu(x))
    same(output.cpu(), x.relu())
    same(mask.cpu(), pack(~(x <= 0)))
    assert dense(output).data_ptr() == output.data_ptr()


@pytest.mark.parametrize("channels", [13, 16])
def test_relu_mask_in_place(gpu, channels, dtype):
    x = cpu_values((2, channels, 3, 5), dtype, special=True)
    changed = gpu(x.clone())
    output, mask = gpu.ops.activate_(changed)
    assert output.data_ptr() == changed.data_ptr()
    same(changed.cpu(), x.relu())
    same(mask.cpu(), pack(~(x <= 0)))


@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
def test_sum_of_two(gpu, shape, dtype):
    x, z = cpu_values(shape, dtype, special=True), gradient(shape, dtype)
    output, mask = gpu.ops.activate(gpu(x), gpu(z))
    same(output.cpu(), (x + z).relu())
    same(mask.cpu(), pack(~(x + z <= 0)))


@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
def test_apply_mask(gpu, shape, dtype):
    x, g = cpu_values(shape, dtype), gradient(shape, dtype)
    _, mask = gpu.ops.activate(gpu(x))
    expected = torch.where(x > 0, g.float() * 1.25, 0.0).to(dtype)
    same(gpu.ops.apply_mask(gpu(g), mask, 1.25).cpu(), expected)


@pytest.mark.parametrize("shape", SHAPES + WIDE, ids=str)
def test_activate_grad(gpu, shape, dtype):
    x, g = cpu_values(shape, dtype, special=True), gradient(shape, dtype)
    y, mask = gpu.ops.activate(gpu(x))
    expected = torch.ops.aten.threshold_backward(g, y.cpu(), 0)
    grad_input, grad_bias = gpu.ops.activate_grad(gpu(g), mask)
    same(grad_input.cpu(), expected)
    assert_bias_grad(grad_bias, expected)
    nothing, again = gpu.ops.activate_grad(gpu(g), mask, need_grad_input=False)
    assert nothing.numel() == 0
    same(again, grad_bias)
    nothing, plain = gpu.ops.activate_grad(gpu(g), act=0)
    assert nothing.numel() == 0
    assert_bias_grad(plain, g)


@pytest.mark.parametrize("repeat", [1, 8], ids=["scalar", "vector"])
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_a_blocked_gradient_is_zero_whatever_it_was(gpu, special, repeat, dtype):
    x = torch.tensor([[-1.0, 1.0, 0.0, -0.0, float("nan")]], dtype=dtype).repeat(1, repeat)
    passed = torch.tensor([[0, special, 0, 0, special]], dtype=dtype).repeat(1, repeat)
    _, mask = gpu.ops.activate(gpu(x))
    g = gpu(torch.full_like(x, special))
    grad_input, grad_bias = gpu.ops.activate_grad(g, mask)
    same(grad_input.cpu(), passed)
    same(grad_bias.cpu(), passed[0].float())
    same(gpu.ops.apply_mask(g, mask).cpu(), passed)


def reference_code(x, relu):
    pooled, index = F.max_pool2d(x.float(), 2, return_indices=True)
    width = x.shape[3]
    code = index // width % 2 * 2 + index % width % 2
    if relu:
        code = torch.where(pooled <= 0, 4, code)
    return code.permute(0, 2, 3, 1).to(torch.uint8)


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [*POOL_SHAPES, (2, 520, 5, 4), (33, 24, 9, 8)], ids=str)
def test_pool_is_stock(gpu, shape, relu, special, dtype):
    x = cpu_values(shape, dtype, special)
    twin = x.float().requires_grad_()
    pooled = F.max_pool2d(twin.relu() if relu else twin, 2)
    g = gradient(pooled.shape, dtype)
    pooled.backward(g.float())

    output, code = gpu.ops.relu_max_pool(gpu(x), relu)
    same(output.cpu(), pooled.detach().to(dtype))
    same(code.cpu(), reference_code(x, relu))
    assert output.is_contiguous(memory_format=torch.channels_last)

    grad_input, grad_bias = gpu.ops.max_pool_bias_grad(gpu(g), code, shape[2:])
    same(grad_input.cpu(), twin.grad.to(dtype))
    assert_bias_grad(grad_bias, twin.grad.to(dtype))
    nothing, again = gpu.ops.max_pool_bias_grad(gpu(g), code, shape[2:], False)
    assert nothing.numel() == 0
    same(again, grad_bias)


@pytest.mark.parametrize("shape", [(70, 64), (3, 64, 6, 6)], ids=str)
def test_unaligned_tensors_give_the_same_bits(gpu, shape, dtype):
    x, g = gpu(cpu_values(shape, dtype)), gpu(gradient(shape, dtype))
    _, mask = gpu.ops.activate(x)
    assert_equal(gpu.ops.activate(at_offset(x)), gpu.ops.activate(x))
    assert_equal(gpu.ops.activate(x, at_offset(g)), gpu.ops.activate(x, g))
    assert_equal(gpu.ops.activate_grad(at_offset(g), mask), gpu.ops.activate_grad(g, mask))
    same(gpu.ops.apply_mask(at_offset(g), mask), gpu.ops.apply_mask(g, mask))


def test_unaligned_pools_give_the_same_bits(gpu, dtype):
    x = gpu(cpu_values((3, 64, 7, 6), dtype))
    pooled, code = gpu.ops.relu_max_pool(x)
    assert_equal(gpu.ops.relu_max_pool(at_offset(x)), (pooled, code))
    g = gpu(gradient(pooled.shape, dtype))
    expected = gpu.ops.max_pool_bias_grad(g, code, (7, 6))
    assert_equal(gpu.ops.max_pool_bias_grad(at_offset(g), code, (7, 6)), expected)
    assert_equal(gpu.ops.max_pool_bias_grad(g, at_offset(code), (7, 6)), expected)


def test_gradient_of_any_strides(gpu, dtype):
    _, mask = gpu.ops.activate(gpu(cpu_values((2, 13, 4, 4), dtype)))
    g = gpu(torch.randn(2, 13, 4, 4).to(dtype))
    views = {
        "nchw": g,
        "sliced": torch.stack([g, g], -1)[..., 0],
        "expanded": g[:, :, :1, :1].expand(2, 13, 4, 4),
    }
    for view in views.values():
        assert_equal(gpu.ops.activate_grad(view, mask), gpu.ops.activate_grad(dense(view), mask))


def test_sums_repeat_bit_for_bit(gpu, dtype):
    g = gpu(gradient((8, 72, 33, 31), dtype))
    _, mask = gpu.ops.activate(gpu(gradient(g.shape, dtype)))
    pooled, code = gpu.ops.relu_max_pool(g)
    first = gpu.ops.activate_grad(g, mask)
    first_pooled = gpu.ops.max_pool_bias_grad(pooled, code, (33, 31))
    for _ in range(5):
        assert_equal(gpu.ops.activate_grad(g, mask), first)
        assert_equal(gpu.ops.max_pool_bias_grad(pooled, code, (33, 31)), first_pooled)


def test_sum_over_many_rows(gpu, dtype):
    g = ((torch.rand(300_000, 24) + 0.5) / 64).to(dtype)  # sums within float16's range
    _, total = gpu.ops.activate_grad(gpu(g), act=0)
    assert_bias_grad(total, g)


@pytest.mark.parametrize("shape", [(0, 8), (0, 8, 4, 4), (3, 0)], ids=str)
def test_no_elements(gpu, shape, dtype):
    x = gpu(dense(torch.empty(shape, dtype=dtype)))
    zeros = torch.zeros(shape[1])
    output, mask = gpu.ops.activate(x)
    assert output.shape == x.shape
    grad_input, grad_bias = gpu.ops.activate_grad(x, mask)
    assert grad_input.shape == x.shape
    same(grad_bias.cpu(), zeros)
    assert gpu.ops.apply_mask(x, mask).shape == x.shape
    if len(shape) == 4:
        output, code = gpu.ops.relu_max_pool(x)
        assert output.shape == (*shape[:2], 2, 2)
        same(gpu.ops.max_pool_bias_grad(output, code, shape[2:])[1].cpu(), zeros)


def test_bad_arguments_are_named(gpu, dtype):
    x = gpu(cpu_values((2, 8, 4, 4), dtype))
    _, mask = gpu.ops.activate(x)
    with pytest.raises(ValueError, match=r"input must be a float32, float16 or .* got Double"):
        gpu.ops.activate(x.double())
    with pytest.raises(ValueError, match=r"mask must be .* \[32, 1\].* got Byte of size \[31, 1\]"):
        gpu.ops.activate_grad(x, mask[:31])
    with pytest.raises(ValueError, match="input must be dense"):
        gpu.ops.activate_(x.contiguous())
    with pytest.raises(ValueError, match="other has size"):
        gpu.ops.activate(x, x[:1])
    other = torch.float16 if dtype == torch.float32 else torch.float32
    with pytest.raises(ValueError, match=r"other must be .* as input is"):
        gpu.ops.activate(x, x.to(other))
    with pytest.raises(ValueError, match="H and W at least 2"):
        gpu.ops.relu_max_pool(x[:, :, :1])
    _, code = gpu.ops.relu_max_pool(x)
    with pytest.raises(ValueError, match=r"grad_output must be .* got size \[2, 8, 4, 4\]"):
        gpu.ops.max_pool_bias_grad(x, code, (4, 4))
    with pytest.raises(ValueError, match="code must be"):
        gpu.ops.max_pool_bias_grad(x[:, :, :2, :2], code[..., :2], (4, 4))
