"""Outputs and gradients leave in the layouts that stock PyTorch gives them."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

import wus_ext

from .chains import relative_error, strides

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
#: How a model is converted, and whether weights stand still.
WAYS = {
    "fused": ({"full": "fused"}, False),
    "skip": ({"full": "fused"}, True),
    "skip, layer by layer": ({"fuse": False}, True),
}
every_way = pytest.mark.parametrize("way", WAYS)


def converted(stock: nn.Module, way: str) -> nn.Module:
    options, skip = WAYS[way]
    model = wus_ext.convert(copy.deepcopy(stock), **options)
    wus_ext.set_skip(model, skip)
    return model


def layouts(model: nn.Module, image: Tensor, upstream: torch.memory_format):
    """Strides of the output, and of the gradient that the model hands back."""
    handed_back: list[Tensor] = []
    given = image.detach().requires_grad_().view_as(image)
    given.register_hook(handed_back.append)
    torch.manual_seed(0)
    output = model(given)
    output.backward(torch.randn(output.shape).contiguous(memory_format=upstream))
    return strides(output), strides(handed_back[0])


@every_way
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (2, 16, 2, 2), (1, 16, 14, 13), (2, 16, 1, 1)])
def test_of_a_convolution(way, kernel, stride, shape):
    torch.manual_seed(0)
    for weights, image, upstream in itertools.product(FORMATS.values(), repeat=3):
        stock = nn.Sequential(nn.Conv2d(16, 16, kernel, stride, kernel // 2))
        stock = stock.to(memory_format=weights)
        x = torch.randn(shape).contiguous(memory_format=image)
        mine, theirs = (layouts(model, x, upstream) for model in (converted(stock, way), stock))
        assert mine == theirs, (weights, image, upstream)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


@every_way
@pytest.mark.parametrize("after", [nn.Identity(), nn.ReLU(), nn.Dropout(0.3)], ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 16, 8, 8), (2, 16, 1, 1)])
def test_of_an_output_behind_a_residual_sum(way, after, shape):
    torch.manual_seed(0)
    for weights, image in itertools.product(FORMATS.values(), repeat=2):
        stock = nn.Sequential(Residual(), after).to(memory_format=weights)
        x = torch.randn(shape).contiguous(memory_format=image)
        mine, theirs = (
            layouts(model, x, torch.contiguous_format)[0]
            for model in (converted(stock, way), stock)
        )
        assert mine == theirs, (weights, image)


class Reversed(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


PERMUTED = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "rows first": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "images last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "sliced": lambda x: torch.stack([x, x], -1).flatten(3)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded channels": lambda x: x[:, :1].expand_as(x),
}


@every_way
@pytest.mark.parametrize("layout", PERMUTED)
@pytest.mark.parametrize("model", [Residual, Reversed])
@pytest.mark.parametrize("shape", [(2, 16, 8, 8), (1, 16, 8, 1)])
def test_of_a_sum_with_an_image_in_another_order(way, layout, model, shape):
    torch.manual_seed(0)
    x = PERMUTED[layout](torch.randn(shape))
    for weights in FORMATS.values():
        stock = nn.Sequential(model(), nn.ReLU()).to(memory_format=weights)
        mine, theirs = (
            layouts(model, x, torch.contiguous_format)[0]
            for model in (converted(stock, way), stock)
        )
        assert mine == theirs, weights


@every_way
def test_of_a_map_of_one_pixel_behind_which_layouts_part(way):
    """Dropout makes of it a contiguous one, which decides the layout of all that follows."""
    torch.manual_seed(0)
    stock = nn.Sequential(
        *(nn.Conv2d(16, 16, 3, 2, 1), nn.Dropout(0.3)),
        *(nn.Conv2d(16, 16, 3, 1, 1), nn.MaxPool2d(2, 1, 1), nn.Dropout(0.3)),
    )
    x = torch.randn(2, 16, 2, 2).contiguous(memory_format=torch.channels_last)
    outputs = []
    for model in (converted(stock, way), stock):
        torch.manual_seed(0)
        outputs.append(model(x))
    assert strides(outputs[0]) == strides(outputs[1])
    assert relative_error(*outputs) < 1e-5


@every_way
@pytest.mark.parametrize("between", [nn.SiLU(), nn.Dropout(0.3), nn.Identity()], ids=str)
@pytest.mark.parametrize(
    "options", [{"kernel_size": 3}, {"kernel_size": 1}, {"kernel_size": 3, "groups": 8}], ids=str
)
def test_gradients_behind_a_norm_whose_backward_takes_one_layout_only(way, between, options):
    """Stock's instance_norm of one image is wrong with a gradient of another layout."""
    for weights, image in itertools.product(FORMATS.values(), repeat=2):
        torch.manual_seed(0)
        stock = nn.Sequential(
            nn.InstanceNorm2d(8, affine=True), between, nn.Conv2d(8, 8, **options)
        ).to(memory_format=weights)
        x = torch.randn(1, 8, 9, 7).contiguous(memory_format=image)
        gradients = []
        for model in (converted(stock, way), stock):
            inner = x.clone().requires_grad_()
            torch.manual_seed(0)
            output = model(inner)
            output.backward(torch.linspace(-1, 1, output.numel()).view(output.shape))
            gradients.append(inner.grad)
        assert relative_error(*gradients) < 1e-4, (weights, image)
