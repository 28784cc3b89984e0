import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401

from .rows import POOL_SHAPES, SHAPES, at_one_and_two_threads, dense, pack, rows_of, same

ops = torch.ops.wus

NORM_SHAPES = [s for s in SHAPES if len(s) != 3 and s[0] and s != (1, 5, 1, 1)]
NONE, MASK, POOL, RECOMPUTE = range(4)
EPS = 1e-5


def stock(x, weight, bias, act, residual=None):
    y = F.batch_norm(x, None, None, weight, bias, training=True, eps=EPS)
    if residual is not None:
        y = y + residual
    if act == POOL:
        return F.max_pool2d(y.relu(), 2)
    return y if act == NONE else y.relu()


class Norm:
    """A training-mode forward and backward made of the operators."""

    def __init__(self, x, weight, bias, act, residual=None):
        self.x, self.act, self.weight = x, act, weight
        self.mean, self.var = ops.batch_norm_stats(x)
        self.scale, self.shift, self.invstd = ops.batch_norm_scale_shift(
            self.mean, self.var, weight, bias, EPS
        )
        self.output, mask = ops.batch_norm_apply(x, self.scale, self.shift, residual, act)
        self.saved = {
            NONE: {},
            MASK: {"mask": mask},
            POOL: {"mask": mask},
            RECOMPUTE: {"scale": self.scale, "shift": self.shift},
        }[act]

    def backward(self, g, need_grad_residual=False):
        sums = ops.batch_norm_grad_sums(g, self.x, self.mean, **self.saved, act=self.act)
        *abc, grad_bias, grad_weight = ops.batch_norm_grad_coefficients(
            *sums, self.mean, self.invstd, self.weight, rows_of(self.x).shape[0]
        )
        grads = ops.batch_norm_grad_input(
            g,
            self.x,
            *abc,
            **self.saved,
            act=self.act,
            need_grad_residual=need_grad_residual,
        )
        return *grads, grad_bias, grad_weight


def close(actual, expected, tolerance=2e-5):
    """Within `tolerance` of the largest expected value."""
    limit = tolerance * max(1.0, float(expected.abs().max())) if expected.numel() else 0
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=limit)


def check(shape, act, residual):
    x = dense(torch.randn(shape) * 2 + 1)
    c = shape[1]
    weight, bias = torch.rand(c) + 0.5, torch.randn(c)
    z = dense(torch.randn(shape)) if residual else None
    norm = Norm(x, weight, bias, act, z)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias, *([z] if residual else []))]
    expected = stock(*leaves[:3], act, leaves[3] if residual else None)
    close(norm.output, expected.detach())
    g = dense(torch.randn(expected.shape))
    if act != NONE:  # within rounding of zero the ReLU may pass on one side only
        g = torch.where(expected.detach() < 1e-4, 0, g)
    expected.backward(g.double())
    grad_input, grad_residual, grad_bias, grad_weight = norm.backward(dense(g), residual and act)
    close(grad_input, leaves[0].grad)
    close(grad_bias, leaves[2].grad)
    close(grad_weight, leaves[1].grad)
    if residual and act:
        close(grad_residual, leaves[3].grad)


@pytest.mark.parametrize("act", [NONE, MASK, RECOMPUTE])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_norm_and_relu(shape, act):
    check(shape, act, residual=False)


@pytest.mark.parametrize("act", [NONE, MASK])
@pytest.mark.parametrize("shape", [(2, 13, 3, 5), (4, 64, 8, 8), (17, 100)], ids=str)
def test_norm_residual_and_relu(shape, act):
    check(shape, act, residual=True)


@pytest.mark.parametrize("shape", [s for s in POOL_SHAPES if s[0]], ids=str)
def test_norm_relu_and_pool(shape):
    check(shape, POOL, residual=False)


def test_backward_recomputes_the_mask_that_forward_used():
    x = dense(torch.randint(-2, 3, (4, 24, 8, 8)).float())
    scale, shift = torch.rand(24), torch.zeros(24)
    output, mask = ops.batch_norm_apply(x, scale, shift, None, MASK)
    same(output, ops.batch_norm_apply(x, scale, shift, None, RECOMPUTE)[0])
    same(mask, pack(output > 0))
    g, mean = dense(torch.randn(x.shape)), torch.zeros(24)
    stored = ops.batch_norm_grad_sums(g, x, mean, mask, act=MASK)
    again = ops.batch_norm_grad_sums(g, x, mean, scale=scale, shift=shift, act=RECOMPUTE)
    same(stored[0], again[0])
    same(stored[1], again[1])


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
    output = Norm(x, None, None, MASK).output
    expected = stock(x, None, None, MASK)
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


def test_empty_batch_gives_empty_tensors():
    x = torch.randn(0, 8, 4, 4)
    scale = torch.ones(8)
    output, mask = ops.batch_norm_apply(x, scale, scale, None, POOL)
    assert output.shape == (0, 8, 2, 2)
    sums = ops.batch_norm_grad_sums(output, x, scale, mask, act=POOL)
    assert all(torch.equal(s, torch.zeros(8, dtype=torch.float64)) for s in sums)
    grad_input, _ = ops.batch_norm_grad_input(output, x, scale, scale, scale, mask, act=POOL)
    assert grad_input.shape == x.shape


@pytest.mark.parametrize("act", [NONE, MASK, POOL, RECOMPUTE])
def test_threads_agree(act):
    x = dense(torch.randn(8, 40, 17, 15))

    def run():
        norm = Norm(x, None, None, act)
        g = torch.cos(torch.arange(norm.output.numel())).view(norm.output.shape)
        return [norm.mean, norm.var, norm.output, *norm.backward(g)]

    at_one_and_two_threads(run)


def test_bad_arguments_are_named():
    x, scale = torch.randn(2, 8, 4, 4), torch.ones(8)
    with pytest.raises(ValueError, match=r"act must be .* got 7"):
        ops.batch_norm_apply(x, scale, scale, None, 7)
    with pytest.raises(ValueError, match=r"scale must be .* \[8\].* size \[4\]"):
        ops.batch_norm_apply(x, scale[:4], scale)
    with pytest.raises(ValueError, match="residual needs act 0"):
        ops.batch_norm_apply(x, scale, scale, x, POOL)
    with pytest.raises(ValueError, match="mask must be given"):
        ops.batch_norm_grad_sums(x, x, scale, act=MASK)
    with pytest.raises(ValueError, match="scale and shift must be given"):
        ops.batch_norm_grad_sums(x, x, scale, act=RECOMPUTE)
