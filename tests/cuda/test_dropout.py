"""The GPU's dropout: stock's arithmetic with random numbers of its own."""

import pytest
import torch

from ..cpu.rows import SHAPES, dense, pack, rows_of, same, values

each_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str
)


def unpack(mask, like):
    bits = (mask.cpu()[:, :, None] >> torch.arange(8)) & 1
    return bits.flatten(1)[:, : rows_of(like).shape[1]].bool()


def drop(gpu, x, p, relu, seed=3):
    torch.manual_seed(seed)
    return (gpu.ops.relu_dropout_mask if relu else gpu.ops.dropout_mask)(gpu(x), p)


@each_dtype
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", SHAPES[::2], ids=str)
def test_what_is_kept_is_scaled(gpu, shape, p, relu, dtype):
    x = values(shape).to(dtype)
    kept = unpack(drop(gpu, torch.ones_like(x), p, False)[1], x)
    output, mask = drop(gpu, x, p, relu)
    wanted = rows_of(x.relu() if relu else x).float()
    scale = torch.tensor(1 / (1 - p) if p < 1 else 0.0)
    same(rows_of(output.cpu()), torch.where(kept, wanted * scale, 0.0).to(dtype))
    if x.numel():
        keep = kept & ~(rows_of(x) <= 0) if relu else kept
        same(mask.cpu(), pack(keep))
    g = dense(torch.randn(shape)).to(dtype)
    back = gpu.ops.apply_mask(gpu(g), mask, float(scale))
    same(rows_of(back.cpu()) != 0, unpack(mask, x) & (rows_of(g) != 0) & (scale > 0))


@each_dtype
@pytest.mark.parametrize("relu", [False, True])
def test_a_dropped_nan_or_infinity_is_nan(gpu, relu, dtype):
    x = values((40, 16), special=True).to(dtype)
    output = drop(gpu, x, 0.5, relu)[0].cpu()
    dropped = ~unpack(drop(gpu, torch.ones_like(x), 0.5, False)[1], x)
    assert output[dropped & x.isnan()].isnan().all()
    infinite = x.isinf() & (x > 0) if relu else x.isinf()
    assert output[dropped & infinite].isnan().all()


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_as_many_are_kept_as_should_be(gpu, p):
    x = torch.ones(1000, 104)
    kept = unpack(drop(gpu, x, p, False)[1], x).double()
    deviation = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(kept.mean() - (1 - p)) < 5 * deviation
    assert (kept.mean(0) - (1 - p)).abs().max() < 5 * deviation * 1000**0.5
    neighbours = (kept[:, 1:] - 1 + p) * (kept[:, :-1] - 1 + p)
    assert neighbours.mean().abs() < 5 * p * (1 - p) / x.numel() ** 0.5


def test_calls_differ_and_seeds_repeat(gpu):
    x = torch.ones(100, 64)
    first = drop(gpu, x, 0.5, False)[1].cpu()
    second = gpu.ops.dropout_mask(gpu(x), 0.5)[1].cpu()
    assert not torch.equal(first, second)
    same(drop(gpu, x, 0.5, False)[1].cpu(), first)
    assert not torch.equal(drop(gpu, x, 0.5, False, seed=4)[1].cpu(), first)


def test_a_generator_of_the_gpu_is_used(real_gpu):
    x = torch.ones(1, 8, device="cuda")
    generator = torch.Generator("cuda").manual_seed(7)
    first = torch.ops.wus.dropout_mask(x, 0.5, generator)[1]
    again = torch.ops.wus.dropout_mask(x, 0.5, torch.Generator("cuda").manual_seed(7))[1]
    same(first, again)


def test_bad_arguments_are_named(gpu):
    with pytest.raises(ValueError, match=r"p must be .* got 1.5"):
        gpu.ops.dropout_mask(gpu(torch.ones(3, 3)), 1.5)
