"""The shared table: shapes, layouts, dtypes and devices that every operator is tested on."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

#: Rounding of one operation of a few hundred terms, relative to the largest value.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-5,
    torch.bfloat16: 3e-2,
    torch.float16: 4e-3,
}


@dataclass(frozen=True)
class ConvCase:
    name: str
    input: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool = True
    options: dict = field(default_factory=dict)
    transposed: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def dims(self) -> int:
        return len(self.weight) - 2

    @property
    def op(self) -> str:
        """The name of the function in torch.nn.functional and in wus_ext.functional."""
        return f"conv{'_transpose' * self.transposed}{self.dims}d"

    @property
    def out_channels(self) -> int:
        return self.weight[1] * self.options.get("groups", 1) if self.transposed else self.weight[0]


CONV_CASES = [
    ConvCase("3x3", (2, 8, 9, 7), (16, 8, 3, 3), options={"padding": 1}),
    ConvCase("no_bias", (2, 8, 9, 7), (16, 8, 3, 3), bias=False, options={"padding": 1}),
    ConvCase("stride_2_even", (2, 4, 8, 8), (6, 4, 3, 3), options={"stride": 2, "padding": 1}),
    ConvCase("stride_2_odd", (2, 4, 9, 7), (6, 4, 3, 3), options={"stride": 2, "padding": 1}),
    ConvCase("stride_3_leftover", (1, 3, 11, 10), (5, 3, 3, 3), options={"stride": 3}),
    ConvCase("stride_2x1", (2, 3, 8, 9), (5, 3, 3, 2), options={"stride": (2, 1)}),
    ConvCase("1x1", (2, 5, 6, 6), (7, 5, 1, 1)),
    ConvCase("1x1_stride_2", (2, 5, 7, 7), (7, 5, 1, 1), options={"stride": 2}),
    ConvCase("5x5", (1, 3, 9, 9), (4, 3, 5, 5), options={"padding": 2}),
    ConvCase("dilated", (2, 4, 11, 11), (6, 4, 3, 3), options={"padding": 2, "dilation": 2}),
    ConvCase("groups", (2, 8, 7, 7), (12, 2, 3, 3), options={"padding": 1, "groups": 4}),
    ConvCase("depthwise", (2, 8, 7, 7), (8, 1, 3, 3), options={"padding": 1, "groups": 8}),
    ConvCase("same", (2, 4, 8, 7), (6, 4, 3, 3), options={"padding": "same"}),
    ConvCase("same_even_kernel", (2, 4, 8, 7), (6, 4, 4, 2), options={"padding": "same"}),
    ConvCase(
        "same_dilated", (2, 4, 9, 9), (6, 4, 2, 3), options={"padding": "same", "dilation": 3}
    ),
    ConvCase("valid", (2, 4, 8, 7), (6, 4, 3, 3), options={"padding": "valid"}),
    ConvCase("unbatched", (4, 8, 7), (6, 4, 3, 3), options={"padding": 1}),
    ConvCase("one_pixel", (2, 4, 1, 1), (6, 4, 3, 3), options={"padding": 1}),
    ConvCase("one_channel", (2, 1, 6, 6), (1, 1, 3, 3), options={"padding": 1}),
    ConvCase("batch_of_1", (1, 16, 4, 4), (16, 16, 3, 3), options={"padding": 1}),
    ConvCase("empty_batch", (0, 4, 8, 8), (6, 4, 3, 3), options={"padding": 1}),
    ConvCase("1d", (2, 4, 9), (6, 4, 3), options={"padding": 1}),
    ConvCase("1d_strided", (2, 4, 10), (6, 2, 3), options={"stride": 3, "groups": 2}),
    ConvCase("1d_same", (2, 4, 9), (6, 4, 4), bias=False, options={"padding": "same"}),
    ConvCase("1d_unbatched", (4, 9), (6, 4, 3), options={"dilation": 2}),
    ConvCase("3d", (2, 4, 5, 6, 4), (6, 4, 3, 3, 3), options={"padding": 1}),
    ConvCase(
        "3d_strided", (1, 4, 6, 7, 5), (4, 2, 2, 3, 1), options={"stride": (1, 2, 3), "groups": 2}
    ),
    ConvCase("3d_same", (1, 2, 5, 4, 4), (3, 2, 2, 3, 4), bias=False, options={"padding": "same"}),
    ConvCase("3d_unbatched", (2, 5, 6, 7), (3, 2, 2, 2, 2), options={"dilation": (1, 2, 1)}),
]

#: Weights are (in, out / groups, ...).
CONV_TRANSPOSE_CASES = [
    ConvCase(f"transposed_{name}", input, weight, bias, options, transposed=True)
    for name, input, weight, bias, options in [
        ("1d", (2, 4, 7), (4, 6, 3), True, {"stride": 2, "output_padding": 1}),
        ("1d_unbatched", (4, 7), (4, 6, 3), True, {}),
        ("2d", (2, 4, 5, 6), (4, 6, 2, 2), True, {"stride": 2}),
        ("2d_no_bias", (2, 4, 5, 6), (4, 6, 3, 3), False, {"padding": 1}),
        ("2d_output_padding", (2, 4, 5, 6), (4, 6, 3, 3), True,
         {"stride": (2, 3), "padding": 1, "output_padding": (1, 2)}),
        ("2d_output_padding_over_stride", (2, 4, 5, 6), (4, 6, 3, 3), True,
         {"stride": 2, "dilation": 4, "output_padding": 3}),
        ("2d_groups", (2, 4, 5, 6), (4, 3, 3, 2), True, {"groups": 2, "stride": 2}),
        ("2d_depthwise", (2, 4, 5, 6), (4, 1, 3, 3), True, {"groups": 4}),
        ("2d_empty_batch", (0, 4, 5, 6), (4, 6, 3, 3), True, {}),
        ("3d", (2, 4, 3, 4, 3), (4, 6, 2, 3, 2), True, {"stride": (1, 2, 2)}),
        ("3d_groups", (1, 4, 3, 4, 3), (4, 2, 2, 2, 2), True,
         {"groups": 2, "stride": 2, "output_padding": 1}),
    ]
]  # fmt: skip

LINEAR_SHAPES = {
    "2d": (5, 12),
    "1d": (12,),
    "3d": (2, 5, 12),
    "4d": (2, 3, 1, 12),
    "empty": (0, 12),
    "one_row": (1, 12),
}


def layouts(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values in every memory layout that an input can arrive in."""
    made = {"contiguous": tensor.contiguous()}
    made["every_other"] = torch.stack((tensor, tensor), -1)[..., 0]
    made["transposed"] = tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if tensor.dim() == 4:
        made["channels_last"] = tensor.contiguous(memory_format=torch.channels_last)
    return made


def assert_near(actual: torch.Tensor | None, expected: torch.Tensor | None, what: str) -> None:
    """Equal shape and dtype, and equal values up to the rounding of the dtype."""
    if expected is None:
        assert actual is None, f"{what}: expected None"
        return
    assert actual is not None, f"{what}: is None"
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    if expected.numel() == 0:
        return
    scale = max(expected.abs().max().item(), 1.0)
    error = (actual.double() - expected.double()).abs().max().item() / scale
    assert error <= TOLERANCE[expected.dtype], f"{what}: relative error {error:.1e}"
