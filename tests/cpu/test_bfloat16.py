"""Kernels on bfloat16: what they make of floats of the same values, rounded."""

from __future__ import annotations

import pytest
import torch

import wus_ext  # noqa: F401  (registers torch.ops.wus)
from wus_ext.engine.activation import Kind

from .rows import POOL_SHAPES, SHAPES, dense, same, values

ops = torch.ops.wus

SLOPE = 0.2
KINDS = list(Kind)
SMOOTH = [kind for kind in KINDS if kind != Kind.NONE and not kind.bits]
kinds = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name.lower())
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def maps(*shape: int, special: bool = False) -> torch.Tensor:
    x = values(shape, special) if special else dense(torch.randn(shape) * 3)
    return dense(x.bfloat16())


def rows(channels: int, count: int) -> list[torch.Tensor]:
    """Coefficients of channels."""
    return [torch.randn(channels) for _ in range(count)]


def channels_of(x: torch.Tensor) -> int:
    return x.size(1) if x.dim() == 4 else x.size(-1)


def agree(op, *arguments, **options):
    """Calls `op` with bfloat16 and with the same numbers as floats; returns bfloat16's results."""

    def widened(value):
        low = isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16
        return value.float() if low else value

    low = op(*arguments, **options)
    single = op(*map(widened, arguments), **{k: widened(v) for k, v in options.items()})
    pairs = [(low, single)] if isinstance(low, torch.Tensor) else zip(low, single, strict=True)
    for actual, expected in pairs:
        if actual.dtype == torch.bfloat16:
            assert expected.dtype == torch.float32
            expected = expected.bfloat16()
        assert actual.dtype == expected.dtype
        assert actual.stride() == expected.stride()
        same(actual, expected)
    return low


@kinds
@shapes
@pytest.mark.parametrize("special", [False, True])
def test_activations(shape, kind, special):
    x, g = maps(*shape, special=special), maps(*shape)
    output, mask = agree(ops.activate, x, None, kind, SLOPE)
    assert output.dtype == torch.bfloat16
    for wanted in ((True, True), (True, False), (False, True)):
        bits = mask if kind.bits else None
        agree(ops.activate_grad, g, bits, x, kind, SLOPE, *wanted)
    if kind not in SMOOTH:
        agree(ops.activate, x, maps(*shape), kind, SLOPE)
    written = x.clone()
    _, again = ops.activate_(written, kind, SLOPE)
    same(written, output)
    same(again, mask)


@pytest.mark.parametrize("shape", POOL_SHAPES, ids=str)
@pytest.mark.parametrize("pool", [(2, 2, 0, 0), (3, 2, 1, 0), (3, 1, 1, 1), (4, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("relu", [True, False])
def test_pools(shape, pool, relu):
    x = maps(*shape, special=True)
    if min(shape[2:]) + 2 * pool[2] < pool[0]:
        pytest.skip("no window fits")
    output, code = agree(ops.relu_max_pool, x, relu, pool)
    g = maps(*output.shape)
    agree(ops.max_pool_bias_grad, g, code, shape[2:], True, pool)
    agree(ops.max_pool_bias_grad, g, code, shape[2:], False, pool)
    act = Kind.RELU if relu else Kind.NONE
    scale, shift = rows(shape[1], 2)
    _, code = agree(ops.batch_norm_apply, x, scale, shift, None, act, 0.0, pool)
    mean, a, b, c = rows(shape[1], 4)
    finite = maps(*shape)
    saved = None, code, None, None, act, 0.0, pool
    agree(ops.batch_norm_grad_coefficients, g, finite, mean, scale, *saved)
    agree(ops.batch_norm_grad_input, g, finite, a, b, c, code, None, None, act, 0.0, pool)


@kinds
@shapes
def test_batch_norm(shape, kind):
    x, g, residual = maps(*shape), maps(*shape), maps(*shape)
    scale, shift, mean, a, b, c = rows(channels_of(x), 6)
    agree(ops.batch_norm_stats, x)
    agree(ops.batch_norm_train, x, scale, shift, None, None, 0.1, 1e-5)
    added = None if kind in SMOOTH else residual
    for scaled in (scale, None):
        _, mask = agree(ops.batch_norm_apply, x, scaled, shift, added, kind, SLOPE)
    mask = mask if kind.bits else None
    behind = (mask, scale, shift, kind, SLOPE)
    agree(ops.batch_norm_grad_coefficients, g, x, mean, scale, None, *behind)
    agree(ops.batch_norm_grad_input, g, x, a, b, c, *behind)
    if mask is not None:
        agree(ops.batch_norm_grad_input, g, x, a, b, c, *behind, need_grad_residual=True)


@shapes
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout(shape, p):
    x, g = maps(*shape, special=True), maps(*shape)
    noise = dense((torch.rand(shape) < 1 - p).bfloat16())
    _, mask = agree(ops.relu_dropout_mask, x, p, noise=noise)
    agree(ops.apply_mask, g, mask, 1.25)
    torch.manual_seed(0)
    output, mask = ops.dropout_mask(x, p)
    torch.manual_seed(0)
    kept = torch.empty_like(x)
    kept = kept.bernoulli_(1 - p) if 0 < p < 1 else kept.fill_(1 - p)
    scale = torch.tensor(0.0 if p == 1 else 1 / (1 - p))
    same(output, (x.float() * (kept.float() * scale)).bfloat16())


@kinds
@pytest.mark.parametrize("channels", [1, 8, 13, 40, 256])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_depthwise(channels, kernel, stride, kind):
    x, weight = maps(2, channels, 9, 12), torch.randn(channels, 1, kernel, kernel)
    (bias,) = rows(channels, 1)
    window = ([stride, stride], [kernel // 2, kernel // 2])
    output, saved = agree(ops.depthwise_forward, x, weight, bias, *window, kind, SLOPE)
    agree(ops.depthwise_forward_stats, x, weight, bias, *window)
    g, z = maps(*output.shape), maps(*output.shape)
    bits = saved if kind.bits else None
    for input in (x, None):
        for need_input in (True, False):
            for norm in (None, torch.stack(rows(channels, 5))):
                agree(
                    ops.depthwise_backward, g, weight, input, [9, 12], *window,
                    bits, z, norm, kind, SLOPE, need_grad_input=need_input, need_grad_bias=True,
                )  # fmt: skip


@pytest.mark.parametrize("lanes", [1, 7, 16, 19])
def test_rounding_is_torchs(lanes):
    """Ties, overflow, denormal numbers and NaN, in whole vectors and behind them."""
    ties = [1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 1 + 2**-8 + 2**-20, 1 - 2**-9, 65535.0]
    ends = [3.4e38, -3.4e38, 1e-40, -1e-45, 0.0, -0.0, *map(float, ("nan", "inf", "-inf"))]
    single = torch.tensor(ties + ends)
    for shift in single:
        x = torch.zeros(3, lanes, dtype=torch.bfloat16)
        output, _ = ops.batch_norm_apply(x, None, shift.expand(lanes).contiguous())
        same(output, shift.bfloat16().expand(3, lanes))


@pytest.mark.parametrize(
    ("op", "arguments", "name"),
    [
        (ops.activate, (torch.ones(2, 3, dtype=torch.double),), "input"),
        (ops.activate_grad, (torch.ones(2, 3, dtype=torch.half), None, None, 0), "grad_output"),
        (ops.relu_max_pool, (torch.ones(1, 1, 2, 2, dtype=torch.half),), "input"),
        (ops.batch_norm_stats, (torch.ones(2, 3, dtype=torch.int),), "input"),
    ],
)
def test_other_types_are_refused(op, arguments, name):
    with pytest.raises(ValueError, match=f"{name} must be a float32 or bfloat16 tensor"):
        op(*arguments)


def test_mixed_types_are_refused():
    x = torch.randn(4, 8)
    with pytest.raises(ValueError, match="other must be a bfloat16 tensor"):
        ops.activate(x.bfloat16(), x)
    with pytest.raises(ValueError, match="residual must be a float32 tensor"):
        ops.batch_norm_apply(x, None, x[0], x.bfloat16())
