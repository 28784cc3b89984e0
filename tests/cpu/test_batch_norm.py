import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401
from wus_ext.engine.activation import Act, Kind, Pool

from .rows import POOL_SHAPES, SHAPES, at_one_and_two_threads, dense, pack, rows_of, same
from .test_activation import SLOPE, STOCK

ops = torch.ops.wus

NORM_SHAPES = [s for s in SHAPES if len(s) != 3 and s[0] and s != (1, 5, 1, 1)]
EPS = 1e-5
RECOMPUTED = [Act(kind, SLOPE) for kind in Kind]
MASKED = [Act(kind, SLOPE) for kind in Kind if kind.bits]
POOLED = [
    Act(kind, pool=pool)
    for kind in (Kind.NONE, Kind.RELU)
    for pool in (Pool(2, 2), Pool(3, 2, 1), Pool(3, 2, 0, True), Pool(5, 1, 2))
]


def name(act):
    return f"{act.kind.name.lower()}{tuple(act.pool or ())}"


def activated(y, act):
    if act.kind != Kind.NONE:
        y = STOCK[act.kind](y)
    if act.pool is None:
        return y
    kernel, stride, padding, ceil = act.pool
    return F.max_pool2d(y, kernel, stride, padding, ceil_mode=ceil)


def stock(x, weight, bias, act, residual=None):
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    return activated(y if residual is None else y + residual, act)


class Norm:
    """A training-mode forward and backward made of the operators."""

    def __init__(self, x, weight, bias, act, residual=None, masked=True):
        self.x, self.act, self.weight = x, act, weight
        self.mean, self.var = ops.batch_norm_stats(x)
        self.scale, self.shift, self.invstd = ops.batch_norm_scale_shift(
            self.mean, self.var, weight, bias, EPS
        )
        self.output, mask = ops.batch_norm_apply(
            x, self.scale, self.shift, residual, *act.arguments, masked
        )
        if act.pool is not None or (masked and act.kind.bits):
            self.saved = {"mask": mask}
        else:
            assert mask.numel() == 0
            self.saved = {"scale": self.scale, "shift": self.shift}
        self.saved |= dict(zip(("act", "slope", "pool"), act.arguments, strict=True))

    def backward(self, g, need_grad_residual=False):
        *abc, grad_bias, grad_weight = ops.batch_norm_grad_coefficients(
            g, self.x, self.mean, self.invstd, self.weight, **self.saved
        )
        grads = ops.batch_norm_grad_input(
            g,
            self.x,
            *abc,
            **self.saved,
            need_grad_residual=need_grad_residual,
        )
        return *grads, grad_bias, grad_weight


def close(actual, expected, tolerance=2e-5):
    """Within `tolerance` of the largest expected value."""
    limit = tolerance * max(1.0, float(expected.abs().max())) if expected.numel() else 0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=limit)


#: Where an activation's slope jumps: within rounding of these it may take the other side.
EDGES = {
    Kind.RELU: (0,),
    Kind.RELU6: (0, 6),
    Kind.LEAKY_RELU: (0,),
    Kind.HARDSIGMOID: (-3, 3),
    Kind.HARDSWISH: (-3, 3),
}


def check(shape, act, residual=False, masked=True):
    x = dense(torch.randn(shape) * 2 + 1)
    c = shape[1]
    weight, bias = torch.rand(c) * 2 + 0.5, torch.randn(c)
    z = dense(torch.randn(shape)) if residual else None
    norm = Norm(x, weight, bias, act, z, masked)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, *([z] if residual else []))]
    y = stock(*leaves[:3], Act.NONE, leaves[3] if residual else None)
    expected = activated(y, act)
    close(norm.output, expected.detach())
    g = dense(torch.randn(expected.shape))
    if act.pool is not None:
        g = torch.where(expected.detach() < 1e-4, 0, g)
    else:
        for edge in EDGES.get(act.kind, ()):
            g = torch.where((y.detach() - edge).abs() < 1e-4, 0, g)
    expected.backward(g.double())
    apart = residual and act != Act.NONE
    grad_input, grad_residual, grad_bias, grad_weight = norm.backward(dense(g), apart)
    close(grad_input, leaves[0].grad)
    close(grad_bias, leaves[2].grad)
    close(grad_weight, leaves[1].grad)
    if apart:
        close(grad_residual, leaves[3].grad)


@pytest.mark.parametrize("act", RECOMPUTED, ids=name)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm_and_activation(shape, act):
    check(shape, act, masked=False)


@pytest.mark.parametrize("act", MASKED, ids=name)
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm_and_activation_with_bits(shape, act):
    check(shape, act)


@pytest.mark.parametrize("act", [Act.NONE, *MASKED], ids=name)
@pytest.mark.parametrize("shape", [(2, 13, 3, 5), (4, 64, 8, 8), (17, 100)], ids=str)
def test_norm_residual_and_activation(shape, act):
    check(shape, act, residual=True)


@pytest.mark.parametrize("act", POOLED, ids=name)
@pytest.mark.parametrize("shape", [s for s in POOL_SHAPES if s[0]], ids=str)
def test_norm_activation_and_pool(shape, act):
    if min(shape[2:]) + 2 * act.pool.padding < act.pool.kernel:
        pytest.skip("no window fits")
    check(shape, act)


@pytest.mark.parametrize("act", MASKED, ids=name)
def test_backward_decides_as_forward_did(act):
    x = dense(torch.randint(-9, 10, (4, 24, 8, 8)).float())
    scale, shift = torch.rand(24), torch.zeros(24)
    output, mask = ops.batch_norm_apply(x, scale, shift, None, *act.arguments)
    same(output, ops.batch_norm_apply(x, scale, shift, None, *act.arguments, False)[0])
    if act.kind == Kind.RELU:
        same(mask, pack(output > 0))
    g, mean = dense(torch.randn(x.shape)), torch.zeros(24)
    own = g, x, mean, torch.ones(24), None
    stored = ops.batch_norm_grad_coefficients(*own, mask, None, None, *act.arguments)
    again = ops.batch_norm_grad_coefficients(*own, None, scale, shift, *act.arguments)
    for one, other in zip(stored, again, strict=True):
        same(one, other)


@pytest.mark.parametrize("shape", [(2, 64, 16, 16), (1000, 13), (3, 3, 7, 7)], ids=str)
@pytest.mark.parametrize("ratio", [0.0, 1e3, -1e3])
def test_variance_survives_a_large_mean(shape, ratio):
    x = dense(torch.randn(shape) + ratio)
    mean, var = ops.batch_norm_stats(x)
    rows = rows_of(x).double()
    torch.testing.assert_close(mean.double(), rows.mean(0), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.double(), rows.var(0, unbiased=False), rtol=1e-6, atol=0)


def test_a_constant_channel_has_no_variance():
    mean, var = ops.batch_norm_stats(torch.full((1000, 20), 0.1))
    assert var.min() >= 0
    assert var.max() < 1e-15
    torch.testing.assert_close(mean, torch.full((20,), 0.1), rtol=1e-7, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_value_spoils_its_channel_as_in_stock(bad):
    x = dense(torch.randn(2, 20, 4, 4))
    x[1, 17, 2, 2] = bad
    output = Norm(x, None, None, Act.RELU).output
    expected = stock(x, None, None, Act.RELU)
    assert torch.equal(output.isnan(), expected.isnan())
    assert not output[:, :17].isnan().any()


@pytest.mark.parametrize("momentum", [0.1, 1.0, 0.0, 1 / 3])
def test_running_statistics_are_stock(momentum):
    x = dense(torch.randn(4, 13, 5, 5) * 3 + 2)
    running = [torch.randn(13), torch.rand(13)]
    expected = [t.clone() for t in running]
    F.batch_norm(x, *expected, training=True, momentum=momentum)
    mean, var = ops.batch_norm_stats(x)
    ops.batch_norm_update_running(*running, mean, var, momentum, 100)
    torch.testing.assert_close(running, expected, rtol=5e-7, atol=1e-7)


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("offset", [None, torch.arange(13.0)], ids=["whole", "short"])
def test_all_of_a_training_step_in_one(offset, tracked):
    x = dense(torch.randn(4, 13, 5, 5) * 3 + 2)
    weight, bias = torch.rand(13), torch.randn(13)
    running = [torch.randn(13), torch.rand(13)]
    expected_running = [t.clone() for t in running]
    mean, var = ops.batch_norm_stats(x)
    seen = mean if offset is None else mean + offset
    ops.batch_norm_update_running(*expected_running, seen, var, 0.1, 100)
    expected = mean, *ops.batch_norm_scale_shift(mean, var, weight, bias, EPS)
    given = running if tracked else [None, None]
    actual = ops.batch_norm_train(x, weight, bias, *given, 0.1, EPS, offset)
    for one, other in zip(actual, expected, strict=True):
        same(one, other)
    for one, other in zip(running, expected_running, strict=True):
        assert torch.equal(one, other) == tracked


def test_an_offset_that_is_not_finite_spoils_its_channel():
    offset = torch.tensor([0.0, float("inf"), float("nan"), 1.0])
    _, scale, shift, _ = ops.batch_norm_train(
        torch.randn(8, 4), None, None, None, None, 0.1, EPS, offset
    )
    assert shift.isnan().tolist() == [False, True, True, False]
    assert not scale.isnan().any()


def test_empty_batch_gives_empty_tensors():
    x = torch.randn(0, 8, 4, 4)
    scale = torch.ones(8)
    pool = Act.RELU_POOL.arguments
    output, mask = ops.batch_norm_apply(x, scale, scale, None, *pool)
    assert output.shape == (0, 8, 2, 2)
    *_, grad_bias, grad_weight = ops.batch_norm_grad_coefficients(
        output, x, scale, scale, None, mask, None, None, *pool
    )
    assert not grad_bias.any()
    assert not grad_weight.any()
    grad_input, _ = ops.batch_norm_grad_input(
        output, x, scale, scale, scale, mask, None, None, *pool
    )
    assert grad_input.shape == x.shape
    running = torch.zeros(8), torch.ones(8)
    assert ops.batch_norm_train(x, None, None, *running, 0.1, EPS)[1].isnan().all()
    assert running[0].tolist() == [0.0] * 8


@pytest.mark.parametrize("act", [*RECOMPUTED, *POOLED], ids=name)
def test_threads_agree(act):
    x = dense(torch.randn(8, 40, 17, 15))

    def run():
        norm = Norm(x, None, None, act, masked=False)
        g = torch.cos(torch.arange(norm.output.numel())).view(norm.output.shape)
        return [norm.mean, norm.var, norm.output, *norm.backward(g)]

    at_one_and_two_threads(run)


def test_bad_arguments_are_named():
    x, scale = torch.randn(2, 8, 4, 4), torch.ones(8)
    with pytest.raises(ValueError, match=r"act must be .* got 77"):
        ops.batch_norm_apply(x, scale, scale, None, 77)
    with pytest.raises(ValueError, match=r"scale must be .* \[8\].* size \[4\]"):
        ops.batch_norm_apply(x, scale[:4], scale)
    with pytest.raises(ValueError, match=r"residual needs an act .* got act 6"):
        ops.batch_norm_apply(x, scale, scale, x, Kind.SILU)
    with pytest.raises(ValueError, match=r"residual needs .* no pool"):
        ops.batch_norm_apply(x, scale, scale, x, *Act.RELU_POOL.arguments)
    with pytest.raises(ValueError, match=r"pool needs act 0 .* got act 2"):
        ops.batch_norm_apply(x, scale, scale, None, 2, 0.0, [2, 2, 0, 0])
    with pytest.raises(ValueError, match=r"pool must be \[kernel, stride, padding, ceil\]"):
        ops.batch_norm_apply(x, scale, scale, None, 1, 0.0, [2, 2])
    with pytest.raises(ValueError, match="mask, or scale and shift, must be given for act 1"):
        ops.batch_norm_grad_coefficients(x, x, scale, scale, act=1)
    pooled = x[:, :, :2, :2]
    with pytest.raises(ValueError, match="mask must be given for pool"):
        ops.batch_norm_grad_coefficients(
            pooled, x, scale, scale, None, None, None, None, *Act.RELU_POOL.arguments
        )
    with pytest.raises(ValueError, match="running_mean and running_var must be given together"):
        ops.batch_norm_train(x, None, None, scale, None, 0.1, EPS)
    with pytest.raises(ValueError, match="need_grad_residual needs a mask"):
        ops.batch_norm_grad_input(
            x, x, scale, scale, scale, None, scale, scale, 1, need_grad_residual=True
        )
