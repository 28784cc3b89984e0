"""The GPU's batch norm against the same arithmetic in float64, and against stock PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from ..cpu.rows import POOL_SHAPES, SHAPES, dense, pack, rows_of, same

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NONE, MASK, POOL, RECOMPUTE = range(4)
#: The operators' arguments act, slope, pool.
ARGUMENTS = {NONE: (0,), MASK: (1,), POOL: (1, 0.0, [2, 2, 0, 0]), RECOMPUTE: (1,)}
NORM_SHAPES = [s for s in SHAPES if len(s) != 3 and s[0] and s != (1, 5, 1, 1)][::2]
EPS = 1e-5

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def near(actual, expected, roundings=1, dtype=None):
    """Within some roundings to the actual type, and float32's in between, of the largest value."""
    eps = torch.finfo(dtype or actual.dtype).eps
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    error = (actual.cpu().double() - expected.double()).abs()
    bound = roundings * eps * expected.double().abs() + 4e-6 * scale
    assert (error <= bound).all(), f"error {error.max():.1e}"


def along_channels(vector, x):
    return vector.double().view(-1, *([1] * (x.dim() - 2)))


class Expected:
    """act(scale * x + shift + residual), its gate and gradients, in float64 between roundings."""

    def __init__(self, x, scale, shift, act, residual=None):
        self.x, self.act = x.double(), act
        y = (self.x * along_channels(scale, x) + along_channels(shift, x)).float()
        if residual is not None:
            y = y + residual.float()
        self.y = y.to(x.dtype).double().requires_grad_()
        self.output = self.y if act == NONE else self.y.relu()
        if act == POOL:
            self.output = F.max_pool2d(self.output, 2)

    def gated(self, grad):
        return torch.autograd.grad(self.output, self.y, grad.double(), retain_graph=True)[0]


def tensors(shape, dtype, act):
    x = dense(torch.randn(shape) * 2 + 1).to(dtype)
    c = shape[1]
    scale, shift = torch.rand(c) + 0.5, torch.randn(c)
    g = dense(torch.randn((*shape[:2], shape[2] // 2, shape[3] // 2) if act == POOL else shape))
    return x, scale, shift, g.to(dtype)


def check(gpu, shape, act, dtype, residual=False):
    x, scale, shift, g = tensors(shape, dtype, act)
    z = dense(torch.randn(shape)).to(dtype) if residual else None
    expected = Expected(x, scale, shift, act, z)
    on = [gpu(t) for t in (x, scale, shift)]
    output, mask = gpu.ops.batch_norm_apply(*on, gpu(z) if residual else None, *ARGUMENTS[act])
    same(output.cpu(), expected.output.detach().to(dtype))
    assert dense(output).data_ptr() == output.data_ptr()
    if act == MASK:
        same(mask.cpu(), pack(expected.y > 0))
    saved = {
        NONE: {},
        MASK: {"mask": mask},
        POOL: {"mask": mask},
        RECOMPUTE: {"scale": on[1], "shift": on[2]},
    }[act]
    saved |= dict(zip(("act", "slope", "pool"), ARGUMENTS[act], strict=False))

    gated = expected.gated(g)
    mean = torch.randn(shape[1])
    ones = torch.ones(shape[1])
    *_, first, second = gpu.ops.batch_norm_grad_coefficients(
        gpu(g), on[0], gpu(mean), gpu(ones), **saved
    )
    deviation = expected.x - along_channels(mean, x)
    for actual, terms in ((first, gated), (second, gated * deviation)):
        assert actual.dtype == torch.float32
        error = (actual.cpu() - rows_of(terms).sum(0)).abs()
        assert (error <= 2e-6 * rows_of(terms).abs().sum(0) + 1e-6).all()

    a, b, c0 = torch.randn(3, shape[1])
    grad_input, grad_residual = gpu.ops.batch_norm_grad_input(
        gpu(g), on[0], *map(gpu, (a, b, c0)), **saved, need_grad_residual=act == MASK
    )
    a, b, c0 = (along_channels(t, x) for t in (a, b, c0))
    near(grad_input, a * gated + b * expected.x + c0)
    assert grad_input.dtype == dtype
    if act == MASK:
        same(grad_residual.cpu(), gated.to(dtype))


@each_dtype
@pytest.mark.parametrize("act", [NONE, MASK, RECOMPUTE])
@pytest.mark.parametrize("shape", [*NORM_SHAPES, (5, 264, 16, 16)], ids=str)
def test_norm_and_relu(gpu, shape, act, dtype):
    check(gpu, shape, act, dtype)


@each_dtype
@pytest.mark.parametrize("act", [NONE, MASK])
@pytest.mark.parametrize("shape", [(2, 13, 3, 5), (4, 64, 8, 8), (17, 100)], ids=str)
def test_norm_residual_and_relu(gpu, shape, act, dtype):
    check(gpu, shape, act, dtype, residual=True)


@each_dtype
@pytest.mark.parametrize("shape", [s for s in POOL_SHAPES if s[0]], ids=str)
def test_norm_relu_and_pool(gpu, shape, dtype):
    check(gpu, shape, POOL, dtype)


@each_dtype
@pytest.mark.parametrize("act", [NONE, MASK, POOL])
def test_without_a_scale_the_shift_is_a_bias(gpu, act, dtype):
    x, _, shift, _ = tensors((2, 24, 6, 4), dtype, act)
    actual = gpu.ops.batch_norm_apply(gpu(x), None, gpu(shift), None, *ARGUMENTS[act])
    expected = gpu.ops.batch_norm_apply(
        gpu(x), gpu(torch.ones(24)), gpu(shift), None, *ARGUMENTS[act]
    )
    for one, other in zip(actual, expected, strict=True):
        same(one, other)


@each_dtype
@pytest.mark.parametrize("act", [NONE, MASK, POOL])
def test_whole_step_is_stock(gpu, act, dtype):
    shape = (6, 24, 8, 8)
    x, weight, bias, g = tensors(shape, dtype, act)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    y = F.batch_norm(leaves[0], None, None, *leaves[1:], training=True, eps=EPS)
    y = y if act == NONE else F.max_pool2d(y.relu(), 2) if act == POOL else y.relu()
    g = torch.where(y.detach() < 1e-2, 0, g)  # near zero roundings decide whether ReLU passes
    ops, on = gpu.ops, gpu(x)
    mean, scale, shift, invstd = ops.batch_norm_train(
        on, gpu(weight), gpu(bias), None, None, 0.1, EPS
    )
    output, mask = ops.batch_norm_apply(on, scale, shift, None, *ARGUMENTS[act])
    near(output, y.detach(), 2)
    mask = None if act == NONE else mask
    if act == POOL and dtype != torch.float32:
        return  # values that differ may tie once rounded: the gradient goes elsewhere
    y.backward(g.double())
    behind = dict(zip(("act", "slope", "pool"), ARGUMENTS[act], strict=False))
    *abc, grad_bias, grad_weight = ops.batch_norm_grad_coefficients(
        gpu(dense(g)), on, mean, invstd, gpu(weight), mask, **behind
    )
    grad_input, _ = ops.batch_norm_grad_input(gpu(dense(g)), on, *abc, mask, **behind)
    near(grad_input, leaves[0].grad, 2)
    near(grad_bias, leaves[2].grad)
    near(grad_weight, leaves[1].grad)


@pytest.mark.parametrize("shape", [(2, 64, 16, 16), (1000, 13), (3, 3, 7, 7)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e3, -1e3])
def test_variance_survives_a_large_mean(gpu, shape, offset):
    x = dense(torch.randn(shape) + offset)
    mean, var = gpu.ops.batch_norm_stats(gpu(x))
    rows = rows_of(x).double()
    torch.testing.assert_close(mean.cpu().double(), rows.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.cpu().double(), rows.var(0, unbiased=False), rtol=2e-6, atol=0)


@pytest.mark.parametrize("where", [0, 1, 700])
def test_variance_survives_an_outlier(gpu, where):
    x = torch.randn(1000, 16)
    x[where] = 1e4
    _, var = gpu.ops.batch_norm_stats(gpu(x))
    expected = x.double().var(0, unbiased=False)
    torch.testing.assert_close(var.cpu().double(), expected, rtol=2e-6, atol=0)


def test_a_constant_channel_has_no_variance(gpu):
    mean, var = gpu.ops.batch_norm_stats(gpu(torch.full((1000, 20), 0.1)))
    assert var.min() >= 0
    assert var.max() < 1e-15
    torch.testing.assert_close(mean.cpu(), torch.full((20,), 0.1), rtol=1e-7, atol=0)


@each_dtype
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_value_spoils_its_channel(gpu, bad, dtype):
    x = dense(torch.randn(2, 20, 4, 4)).to(dtype)
    x[1, 17, 2, 2] = bad
    mean, var = gpu.ops.batch_norm_stats(gpu(x))
    scale, shift, _ = gpu.ops.batch_norm_scale_shift(mean, var, None, None, EPS)
    output = gpu.ops.batch_norm_apply(gpu(x), scale, shift, None, MASK)[0]
    assert output[:, 17].isnan().all()
    assert not output[:, :17].isnan().any()


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, 1 / 3])
def test_running_statistics_are_stock(gpu, momentum):
    x = dense(torch.randn(4, 13, 5, 5) * 3 + 2)
    running = [torch.randn(13), torch.rand(13)]
    expected = [t.clone() for t in running]
    F.batch_norm(x, *expected, training=True, momentum=momentum)
    running = [gpu(t) for t in running]
    gpu.ops.batch_norm_train(gpu(x), None, None, *running, momentum, EPS)
    for actual, value in zip(running, expected, strict=True):
        torch.testing.assert_close(actual.cpu(), value, rtol=5e-7, atol=1e-7)


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("offset", [None, torch.arange(13.0)], ids=["whole", "short"])
def test_all_of_a_training_step_in_one(gpu, offset, tracked):
    x, ops = gpu(dense(torch.randn(4, 13, 5, 5) * 3 + 2)), gpu.ops
    weight, bias = gpu(torch.rand(13)), gpu(torch.randn(13))
    running = [gpu(torch.randn(13)), gpu(torch.rand(13))]
    before = [t.clone() for t in running]
    offset = None if offset is None else gpu(offset)
    mean, var = ops.batch_norm_stats(x)
    given = running if tracked else [None, None]
    actual = ops.batch_norm_train(x, weight, bias, *given, 0.1, EPS, offset)
    expected = mean, *ops.batch_norm_scale_shift(mean, var, weight, bias, EPS)
    for one, other in zip(actual, expected, strict=True):
        same(one, other)
    if not tracked:
        assert all(map(torch.equal, running, before))
        return
    seen = mean if offset is None else mean + offset
    near(running[0], (0.9 * before[0] + 0.1 * seen).cpu())
    near(running[1], (0.9 * before[1] + 0.1 * var * 100 / 99).cpu())


def test_an_offset_that_is_not_finite_spoils_its_channel(gpu):
    offset = gpu(torch.tensor([0.0, float("inf"), float("nan"), 1.0]))
    _, scale, shift, _ = gpu.ops.batch_norm_train(
        gpu(torch.randn(8, 4)), None, None, None, None, 0.1, EPS, offset
    )
    assert shift.isnan().tolist() == [False, True, True, False]
    assert not scale.isnan().any()


@each_dtype
@pytest.mark.parametrize("act", [NONE, MASK, POOL, RECOMPUTE])
def test_sums_repeat_and_do_not_depend_on_alignment(gpu, act, dtype):
    x, scale, shift, g = (gpu(t) for t in tensors((8, 40, 18, 14), dtype, act))
    _, mask = gpu.ops.batch_norm_apply(x, scale, shift, None, *ARGUMENTS[act])
    saved = {MASK: {"mask": mask}, POOL: {"mask": mask}}.get(act, {})
    if act == RECOMPUTE:
        saved = {"scale": scale, "shift": shift}
    saved |= dict(zip(("act", "slope", "pool"), ARGUMENTS[act], strict=False))
    moved = torch.empty(x.numel() + 1, dtype=dtype, device=x.device)[1:]
    moved = moved.as_strided(x.shape, x.stride(), 1).copy_(x)
    mean, var = gpu.ops.batch_norm_stats(x)
    sums = gpu.ops.batch_norm_grad_coefficients(g, x, mean, var, **saved)
    for again in (x, moved):
        results = (
            *gpu.ops.batch_norm_stats(again),
            *gpu.ops.batch_norm_grad_coefficients(g, again, mean, var, **saved),
        )
        for result, first in zip(results, (mean, var, *sums), strict=True):
            same(result, first)


@each_dtype
def test_empty_batch_gives_empty_tensors(gpu, dtype):
    x, scale = gpu(torch.empty(0, 8, 4, 4, dtype=dtype)), gpu(torch.ones(8))
    assert gpu.ops.batch_norm_stats(x)[0].isnan().all()
    pool = ARGUMENTS[POOL]
    output, mask = gpu.ops.batch_norm_apply(x, scale, scale, None, *pool)
    assert output.shape == (0, 8, 2, 2)
    *_, grad_bias, grad_weight = gpu.ops.batch_norm_grad_coefficients(
        output, x, scale, scale, None, mask, None, None, *pool
    )
    assert not grad_bias.any()
    assert not grad_weight.any()
    grad_input, _ = gpu.ops.batch_norm_grad_input(
        output, x, scale, scale, scale, mask, None, None, *pool
    )
    assert grad_input.shape == x.shape
    running = gpu(torch.zeros(8)), gpu(torch.ones(8))
    assert gpu.ops.batch_norm_train(x, None, None, *running, 0.1, EPS)[1].isnan().all()
    assert running[0].tolist() == [0.0] * 8


def test_bad_arguments_are_named(gpu):
    x, scale = gpu(torch.randn(2, 8, 4, 4)), gpu(torch.ones(8))
    ops = gpu.ops
    with pytest.raises(ValueError, match=r"act must be .* got 7"):
        ops.batch_norm_apply(x, scale, scale, None, 7)
    with pytest.raises(ValueError, match=r"scale must be .* \[8\].* size \[4\]"):
        ops.batch_norm_apply(x, scale[:4], scale)
    with pytest.raises(ValueError, match=r"pool must be \[2, 2, 0, 0\] on a GPU"):
        ops.batch_norm_apply(x, scale, scale, None, 1, 0.0, [3, 2, 1, 0])
    with pytest.raises(ValueError, match="residual needs no pool"):
        ops.batch_norm_apply(x, scale, scale, x, *ARGUMENTS[POOL])
    with pytest.raises(ValueError, match="residual must be Float"):
        ops.batch_norm_apply(x, scale, scale, x.half(), 1)
    with pytest.raises(ValueError, match="mask, or scale and shift, must be given"):
        ops.batch_norm_grad_coefficients(x, x, scale, scale, act=1)
    with pytest.raises(ValueError, match="mask must be given for pool"):
        ops.batch_norm_grad_coefficients(
            x, x, scale, scale, None, None, None, None, *ARGUMENTS[POOL]
        )
    with pytest.raises(ValueError, match="mask must be given for ReLU or a pool only"):
        ops.batch_norm_grad_coefficients(
            x, x, scale, scale, None, torch.zeros(32, 1, dtype=torch.uint8)
        )
    with pytest.raises(ValueError, match="running_mean and running_var must be given together"):
        ops.batch_norm_train(x, None, None, scale, None, 0.1, EPS)
