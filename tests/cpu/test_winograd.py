"""The Winograd operators against torch in float64: every scheme, prologue and epilogue."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import wus_ext  # noqa: F401  (registers torch.ops.wus)

wus = torch.ops.wus

NONE, RELU, POOL, STATS = range(4)
PLAIN, SUM, BITS, CODES, BN, BN_BITS, BN_CODES = range(7)

#: Relative L2 error allowed, by scheme.
TOLERANCE = {0: 2e-6, 2: 2e-6, 4: 6e-6}


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    inputs: int
    outputs: int
    height: int
    width: int
    padding: int = 1

    def __str__(self) -> str:
        return self.name

    @property
    def out_size(self) -> tuple[int, int]:
        return self.height + 2 * self.padding - 2, self.width + 2 * self.padding - 2

    @property
    def schemes(self) -> list[int]:
        small = self.padding == 1 and self.height <= 2 and self.width <= 2
        return [0, 2, 4] if small else [2, 4]


CASES = [
    Case("typical", 3, 32, 64, 8, 8),
    Case("odd_everything", 2, 13, 21, 7, 9),
    Case("many_tiles", 5, 8, 9, 37, 31),
    Case("rgb", 2, 3, 20, 12, 10),
    Case("one_pixel", 3, 7, 5, 1, 1),
    Case("one_row", 2, 16, 8, 1, 6),
    Case("two_by_two", 3, 40, 33, 2, 2),
    Case("two_by_one", 2, 17, 8, 2, 1),
    Case("one_channel", 2, 1, 1, 5, 6),
    Case("unpadded", 2, 9, 12, 7, 10, padding=0),
    Case("unpadded_3x3", 2, 9, 12, 3, 3, padding=0),
    Case("wide_padding", 2, 9, 12, 5, 6, padding=2),
    Case("wide_padding_1x1", 1, 6, 4, 1, 1, padding=2),
    Case("large_weight", 9, 272, 260, 4, 4),
    Case("weight_past_the_caches", 1, 352, 360, 4, 4),
    Case("deep", 1, 530, 16, 4, 4),
    Case("empty_batch", 0, 8, 8, 6, 6),
]
CASE_SCHEMES = [
    pytest.param(case, scheme, id=f"{case}-{scheme}") for case in CASES for scheme in case.schemes
]


def channels_last(*shape: int) -> torch.Tensor:
    return torch.randn(*shape).contiguous(memory_format=torch.channels_last)


def make_layer(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(case.height * 100 + case.inputs)
    x = channels_last(case.batch, case.inputs, case.height, case.width)
    weight = torch.randn(case.outputs, case.inputs, 3, 3) / (3 * case.inputs**0.5)
    return x, weight, torch.randn(case.outputs)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == expected.shape
    error = (actual.double() - expected).norm()
    assert error <= tolerance * expected.norm() + 1e-30, f"relative error {error / expected.norm()}"


def unpack_bits(mask: torch.Tensor, channels: int) -> torch.Tensor:
    """[N, H, W, ceil(C / 8)] -> bool [N, C, H, W]."""
    bits = mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(3)[..., :channels].bool().permute(0, 3, 1, 2)


def unpool(g: torch.Tensor, codes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pooled [N, C, h, w] and codes [N, h, w, C] -> [N, C, *size], zero where not selected."""
    full = g.new_zeros(*g.shape[:2], *size)
    height, width = g.shape[2:]
    for code in range(4):
        place = full[:, :, code // 2 :: 2, code % 2 :: 2][:, :, :height, :width]
        place.copy_(torch.where(codes.permute(0, 3, 1, 2) == code, g, 0))
    return full


def forward(x, weight, bias, case, scheme, epilogue):
    packed = wus.winograd_pack(weight, False, scheme)
    return wus.winograd_forward(x, packed, bias, weight.size(0), case.padding, scheme, epilogue)


def dgrad(g, weight, mask, case, scheme, prologue, **options):
    packed = wus.winograd_pack(weight, True, scheme)
    size = (case.height, case.width)
    return wus.winograd_dgrad(
        g, packed, mask, weight.size(1), size, case.padding, scheme, prologue, **options
    )


@pytest.mark.parametrize(("case", "scheme"), CASE_SCHEMES)
def test_forward(case, scheme):
    x, weight, bias = make_layer(case)
    expected = F.conv2d(x.double(), weight.double(), bias.double(), padding=case.padding)
    z, nothing = forward(x, weight, bias, case, scheme, NONE)
    assert nothing.numel() == 0
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert_close(z, expected, TOLERANCE[scheme])

    plain, _ = forward(x, weight, None, case, scheme, NONE)
    assert_close(plain, expected - bias.double()[:, None, None], TOLERANCE[scheme])

    y, bits = forward(x, weight, bias, case, scheme, RELU)
    assert torch.equal(y, z.relu())
    assert bits.shape == (case.batch, *case.out_size, (case.outputs + 7) // 8)
    assert torch.equal(unpack_bits(bits, case.outputs), y > 0)
    padding_bits = unpack_bits(bits, bits.size(3) * 8)[:, case.outputs :]
    assert not padding_bits.any()

    z2, stats = forward(x, weight, bias, case, scheme, STATS)
    assert torch.equal(z2, z)
    if case.batch > 0:
        mean, var = stats.double()
        assert_close(mean, z.double().mean((0, 2, 3)), 1e-6)
        assert_close(var, z.double().var((0, 2, 3), unbiased=False), 1e-5)

    if min(case.out_size) >= 2:
        y, codes = forward(x, weight, bias, case, scheme, POOL)
        pooled, index = F.max_pool2d(z.relu(), 2, return_indices=True)
        assert torch.equal(y, pooled)
        width = case.out_size[1]
        code = torch.where(pooled > 0, index // width % 2 * 2 + index % width % 2, 4)
        assert torch.equal(codes, code.permute(0, 2, 3, 1).to(torch.uint8))


def output_gradients(case):
    """For each prologue: its arguments (grad_output, mask, options), and what it makes of them."""
    shape = (case.batch, case.outputs, *case.out_size)
    g, z = channels_last(*shape), channels_last(*shape)
    bits = torch.randint(
        256, (case.batch, *case.out_size, (case.outputs + 7) // 8), dtype=torch.uint8
    )
    vectors = torch.randn(3, case.outputs)
    a, b, c = vectors.double()[:, :, None, None]
    behind_bits = torch.where(unpack_bits(bits, case.outputs), g, 0).double()
    normalize = lambda masked: a * masked + b * z.double() + c  # noqa: E731
    norm = {"z": z, "batch_norm": vectors}

    gradients = {
        PLAIN: ((g, bits, {}), g.double()),
        SUM: ((g, bits, {}), g.double()),
        BITS: ((g, bits, {}), behind_bits),
        BN: ((g, bits, norm), normalize(g.double())),
        BN_BITS: ((g, bits, norm), normalize(behind_bits)),
    }
    pooled_size = [size // 2 for size in case.out_size]
    if min(pooled_size) > 0:
        pooled = channels_last(case.batch, case.outputs, *pooled_size)
        codes = torch.randint(5, (case.batch, *pooled_size, case.outputs), dtype=torch.uint8)
        unpooled = unpool(pooled, codes, case.out_size).double()
        gradients[CODES] = (pooled, codes, {}), unpooled
        gradients[BN_CODES] = (pooled, codes, norm), normalize(unpooled)
    return gradients


@pytest.mark.parametrize(("case", "scheme"), CASE_SCHEMES)
def test_dgrad(case, scheme):
    _, weight, _ = make_layer(case)
    for prologue, ((g, mask, options), dz) in output_gradients(case).items():
        wanted = F.conv_transpose2d(dz, weight.double(), padding=case.padding)
        grad_input, grad_bias = dgrad(g, weight, mask, case, scheme, prologue, **options)
        assert grad_input.is_contiguous(memory_format=torch.channels_last)
        assert_close(grad_input, wanted, TOLERANCE[scheme])
        if prologue in (SUM, BITS, CODES):
            assert_close(grad_bias, dz.sum((0, 2, 3)), 2e-6)
        else:
            assert grad_bias.numel() == 0


@pytest.mark.parametrize(("case", "scheme"), CASE_SCHEMES)
def test_wgrad(case, scheme):
    x, weight, _ = make_layer(case)
    for prologue, ((g, mask, options), dz) in output_gradients(case).items():
        wanted = torch.nn.grad.conv2d_weight(x.double(), weight.shape, dz, padding=case.padding)
        numbers = (case.padding, scheme, prologue)
        grad = wus.winograd_wgrad(g, x, mask, *numbers, **options)
        assert grad.is_contiguous(memory_format=torch.channels_last)
        assert_close(grad, wanted, 2 * TOLERANCE[scheme])
        other = wus.winograd_wgrad(g, x, mask, *numbers, **options, channels_last=False)
        assert other.is_contiguous()
        assert torch.equal(other, grad)


@pytest.mark.parametrize("scheme", [0, 2, 4])
@pytest.mark.parametrize("dgrad", [False, True])
def test_packing_in_place(dgrad, scheme):
    old, new = torch.randn(2, 20, 9, 3, 3)
    packed = wus.winograd_pack(old, dgrad, scheme)
    assert wus.winograd_pack_(packed, new, dgrad, scheme) is packed
    assert torch.equal(packed, wus.winograd_pack(new, dgrad, scheme))
    with pytest.raises(ValueError, match="packed"):
        wus.winograd_pack_(packed, torch.randn(80, 9, 3, 3), dgrad, scheme)


@pytest.mark.parametrize("scheme", [0, 2, 4])
@pytest.mark.parametrize("dgrad", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (6, 10), (64, 96), (70, 33), (352, 360)])
def test_pack_reads_any_strides(size, dgrad, scheme):
    weight = torch.randn(*size, 3, 3)
    packed = wus.winograd_pack(weight, dgrad, scheme)
    for other in (
        weight.contiguous(memory_format=torch.channels_last),
        weight.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
        torch.stack([weight, weight], -1)[..., 0],
    ):
        assert torch.equal(wus.winograd_pack(other, dgrad, scheme), packed)
    turned = weight.flip(2, 3).transpose(0, 1).contiguous()
    assert torch.equal(wus.winograd_pack(turned, not dgrad, scheme), packed)


def test_f2_is_as_accurate_as_direct_convolution():
    case = Case("", 4, 64, 64, 16, 16)
    x, weight, _ = make_layer(case)
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    error = (forward(x, weight, None, case, 2, NONE)[0] - expected).norm() / expected.norm()
    assert error < 4e-7


def test_input_of_any_layout():
    case = Case("", 2, 6, 8, 5, 7)
    x, weight, bias = make_layer(case)
    expected, _ = forward(x, weight, bias, case, 4, NONE)
    for other in (x.contiguous(), torch.stack([x, x], -1)[..., 0]):
        assert torch.equal(forward(other, weight, bias, case, 4, NONE)[0], expected)
    g = torch.ones(2, 1, 1, 1).expand(2, 8, 5, 7)
    assert torch.equal(dgrad(g, weight, None, case, 4, SUM)[1], torch.full((8,), 70.0))


@pytest.mark.parametrize("scheme", [2, 4])
def test_statistics_far_from_zero(scheme):
    case = Case("", 4, 16, 24, 19, 17)
    x, weight, bias = make_layer(case)
    z, stats = forward(x, weight, bias + 1000, case, scheme, STATS)
    exact = z.double()
    torch.testing.assert_close(stats[0].double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(
        stats[1].double(), exact.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("scheme", [0, 2, 4])
def test_relu_at_zero_and_ties(scheme):
    case = Case("", 2, 4, 11, 2, 2) if scheme == 0 else Case("", 2, 4, 11, 6, 6)
    x, _, _ = make_layer(case)
    weight = torch.zeros(11, 4, 3, 3)
    bias = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1, -1, float("inf"), -float("inf"), 2, 3, 0])
    positive = bias > 0
    y, bits = forward(x, weight, bias, case, scheme, RELU)
    assert torch.equal(unpack_bits(bits, 11), positive[:, None, None].expand_as(y))
    y, codes = forward(x, weight, bias, case, scheme, POOL)
    assert torch.equal(y, bias.relu()[:, None, None].expand_as(y))
    assert torch.equal(codes, torch.where(positive, 0, 4).to(torch.uint8).expand_as(codes))


@pytest.mark.parametrize("scheme", [0, 2, 4])
def test_nan_wins_and_passes_its_gradient(scheme):
    case = Case("", 1, 4, 9, 2, 2) if scheme == 0 else Case("", 2, 4, 9, 16, 16)
    x, weight, bias = make_layer(case)
    bias[3] = float("nan")
    y, bits = forward(x, weight, bias, case, scheme, RELU)
    assert y[:, 3].isnan().all()
    assert not y[:, [0, 1, 2, 4, 5, 6, 7, 8]].isnan().any()
    assert unpack_bits(bits, 9)[:, 3].all()
    z, _ = forward(x, weight, bias, case, scheme, NONE)
    y, codes = forward(x, weight, bias, case, scheme, POOL)
    _, index = F.max_pool2d(z.relu(), 2, return_indices=True)
    width = case.out_size[1]
    code = index // width % 2 * 2 + index % width % 2
    assert torch.equal(codes[..., 3], code[:, 3].to(torch.uint8))
    assert y[:, 3].isnan().all()

    x[0, 1, 0, 0] = float("nan")
    reference = F.conv2d(x, weight, padding=1).isnan()
    z, _ = forward(x, weight, None, case, scheme, NONE)
    assert z.isnan()[reference].all()
    assert not z[1:].isnan().any()
    assert not z[:, :, 4:, 4:].isnan().any()


@pytest.mark.parametrize("scheme", [0, 2, 4])
def test_masked_infinities_do_not_leak(scheme):
    case = Case("", 2, 4, 9, 2, 2) if scheme == 0 else Case("", 2, 4, 9, 6, 6)
    _, weight, _ = make_layer(case)
    g = torch.full((2, 9, *case.out_size), float("inf"))
    bits = torch.zeros(2, *case.out_size, 2, dtype=torch.uint8)
    pooled = [size // 2 for size in case.out_size]
    codes = torch.full((2, *pooled, 9), 4, dtype=torch.uint8)
    for mask, prologue, gradient in (
        (bits, BITS, g),
        (codes, CODES, torch.full((2, 9, *pooled), float("nan"))),
    ):
        grad_input, grad_bias = dgrad(gradient, weight, mask, case, scheme, prologue)
        assert not grad_input.any()
        assert not grad_bias.any()
        x = channels_last(2, 4, case.height, case.width)
        assert not wus.winograd_wgrad(gradient, x, mask, 1, scheme, prologue).any()


@pytest.mark.parametrize("scheme", [2, 4])
@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[13]], ids=str)
def test_results_do_not_depend_on_threads(case, scheme):
    x, weight, bias = make_layer(case)
    g = channels_last(case.batch, case.outputs, *case.out_size)

    def compute(_=None):
        return [
            *forward(x, weight, bias, case, scheme, RELU),
            *forward(x, weight, bias, case, scheme, STATS),
            *dgrad(g, weight, None, case, scheme, SUM),
            wus.winograd_wgrad(g, x, None, case.padding, scheme, PLAIN),
        ]

    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(compute())
    finally:
        torch.set_num_threads(before)
    with ThreadPoolExecutor(3) as pool:
        results += pool.map(compute, range(6))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


BAD_CALLS = {
    "scheme": (lambda x, w, p: wus.winograd_pack(w, False, 3), "scheme"),
    "kernel": (lambda x, w, p: wus.winograd_pack(w[..., :2], False, 4), "3, 3"),
    "dtype": (lambda x, w, p: wus.winograd_pack(w.double(), False, 4), "float32"),
    "packed": (lambda x, w, p: wus.winograd_forward(x, p, None, 80, 1, 4, 0), "packed"),
    "padding": (lambda x, w, p: wus.winograd_forward(x, p, None, 8, 3, 4, 0), "padding"),
    "epilogue": (lambda x, w, p: wus.winograd_forward(x, p, None, 8, 1, 4, 9), "epilogue"),
    "bias": (lambda x, w, p: wus.winograd_forward(x, p, x, 8, 1, 4, 0), "bias"),
    "rank": (lambda x, w, p: wus.winograd_forward(x[0], p, None, 8, 1, 4, 0), "4 dimensions"),
    "too_small": (
        lambda x, w, p: wus.winograd_forward(x[..., :2], p, None, 8, 0, 4, 0),
        "smaller than the 3x3 kernel",
    ),
    "pool": (lambda x, w, p: wus.winograd_forward(x[..., :1], p, None, 8, 1, 4, 2), "pool"),
    "z2": (
        lambda x, w, p: wus.winograd_forward(x, wus.winograd_pack(w, False, 0), None, 8, 1, 0, 0),
        "2x2",
    ),
    "mask": (
        lambda x, w, p: wus.winograd_dgrad(x, p, None, 8, [6, 6], 1, 4, 2),
        "mask",
    ),
    "wgrad_batch": (lambda x, w, p: wus.winograd_wgrad(x[:1], x, None, 1, 4, 0), "grad_output"),
    "wgrad_size": (lambda x, w, p: wus.winograd_wgrad(x, x, None, 0, 4, 0), "grad_output"),
    "wgrad_dtype": (lambda x, w, p: wus.winograd_wgrad(x, x.double(), None, 1, 4, 0), "input"),
    "size": (
        lambda x, w, p: wus.winograd_dgrad(x, p, None, 8, [7, 6], 1, 4, 0),
        "grad_output",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_arguments(name):
    call, message = BAD_CALLS[name]
    x, weight = torch.randn(2, 8, 6, 6), torch.randn(8, 8, 3, 3)
    with pytest.raises((ValueError, TypeError), match=message):
        call(x, weight, wus.winograd_pack(weight, False, 4))


@pytest.mark.parametrize("capability", ["avx2", "default"])
@pytest.mark.skipif(os.environ.get("ATEN_CPU_CAPABILITY") is not None, reason="already chosen")
def test_other_instruction_sets(capability):
    names = "odd_everything or two_by_two or wide_padding or rgb or nan or infinities or ties"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            f"({names}) and not instruction",
        ],
        env={**os.environ, "ATEN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
