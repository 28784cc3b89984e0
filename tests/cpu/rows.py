"""Shapes, values and the mask format that the element-wise CPU kernels are tested with."""

from __future__ import annotations

import torch

#: Channel counts around the vector widths 8 and 16, and their tails.
CHANNELS = [1, 3, 8, 13, 16, 24, 40, 64, 100]

SHAPES = [
    *[(2, c, 3, 5) for c in CHANNELS],
    (1, 5, 1, 1),
    (1, 64, 9, 9),
    (70, 13, 2, 2),
    (0, 8, 4, 4),
    (4, 512, 2, 2),
    (17, 100),
    (300, 33),
    (0, 7),
    (3, 4, 20),
]

POOL_SHAPES = [
    *[(2, c, 4, 6) for c in CHANNELS],
    *[(2, 13, h, w) for h in (2, 3, 7) for w in (2, 5, 9)],
    (0, 8, 4, 4),
    (70, 16, 2, 2),
    (1, 100, 8, 8),
]

SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1e-45, -1e-45, 1.0, -1.0]


def dense(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x.contiguous()


def values(shape: tuple[int, ...], special: bool = False) -> torch.Tensor:
    """Few distinct values, so that zeros and ties are common; with `special` NaN and infinity."""
    x = torch.randint(-3, 4, shape) / 2
    if special:
        chosen = torch.tensor(SPECIAL)[torch.randint(len(SPECIAL), shape)]
        x = torch.where(torch.rand(shape) < 0.3, chosen, x)
    return dense(x)


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-6) -> None:
    """Within `tolerance` of the largest expected value."""
    assert actual.shape == expected.shape
    if expected.dim() == 4 and expected.size(1) > 1:
        assert actual.is_contiguous(memory_format=torch.channels_last)
    expected = expected.detach()
    limit = tolerance * max(1.0, float(expected.abs().max())) if expected.numel() else 0
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=limit)


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """Rows x channels, as the kernels see a tensor."""
    x = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    return x.reshape(x.numel() // x.shape[-1], x.shape[-1])


def pack(keep: torch.Tensor) -> torch.Tensor:
    """The bit mask of a boolean tensor: bit c % 8 of byte c / 8 in each row."""
    bits = rows_of(keep)
    bits = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8))
    weights = 2 ** torch.arange(8)
    return (bits.view(bits.shape[0], bits.shape[1] // 8, 8) * weights).sum(-1).to(torch.uint8)


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    """Equal bit for bit, except that NaN equals NaN and -0.0 equals 0.0."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def check_sums(sums: torch.Tensor, terms: torch.Tensor) -> None:
    """Per-channel sums of `terms`: chains of 64 float additions, whose roundings add up as a
    random walk does, to 8 of half an ulp of the terms' total size."""
    terms = rows_of(terms).double()
    limit = 8 * 2.0**-24 * terms.abs().sum(0)
    assert ((sums.double() - terms.sum(0)).abs() <= limit).all()


def at_one_and_two_threads(op):
    """Runs `op` at both thread counts, checks that the results are identical, returns one."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(op())
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        same(one, two)
    return results[0]
