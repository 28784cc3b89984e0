"""The networks of benchmarks/networks.py: what people train, and what passes through frozen ones.

A workload builds its model, stock and in training mode, and the inputs of a step. Most train a
network; some only pass through one whose weights stand still, for the gradient of what it is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
import torchvision
from common import NETWORKS
from torch import Tensor, nn

import wus_ext

CLASSES = 10
#: (batch, pixels): images as in most fine-tuning, at a small and a moderate batch; CIFAR's.
IMAGENET = ((8, 224), (24, 160))
CIFAR = ((64, 32),)


@dataclass(frozen=True)
class Workload:
    """A model, and the loss of one step of it.

    Attributes:
        build: the stock model for images of so many pixels, or tokens.
        inputs: what it is called with, of a batch size and a number of pixels, or tokens.
        loss: of its output.
        settings: the default batch sizes and numbers of pixels.
        training: whether the model runs in training mode.
        passes_through: attribute of the part whose weights stand still while the rest trains; "" is
            the whole model, of which nothing trains; None where all of it does.
    """

    build: Callable[[int], nn.Module]
    inputs: Callable[[int, int], tuple[Tensor, ...]]
    loss: Callable[..., Tensor]
    settings: tuple[tuple[int, int], ...]
    training: bool = True
    passes_through: str | None = None


def images(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randn(batch, 3, size, size),)


def tokens(batch: int, size: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 1000, (batch, size)),)


def classes(output: Tensor) -> Tensor:
    """Cross-entropy against labels that the batch size alone decides."""
    return F.cross_entropy(output.float(), torch.arange(len(output)) % CLASSES)


def pixels(output: Tensor) -> Tensor:
    labels = torch.arange(output[:, 0].numel()).view_as(output[:, 0]) % output.size(1)
    return F.cross_entropy(output.float(), labels)


def scores(output: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(output.float(), torch.ones_like(output).float())


def squares(outputs: list[Tensor]) -> Tensor:
    """Style and content: means of squares of Gram matrices, and of the last features."""
    grams = []
    for features in outputs:
        flat = features.float().flatten(2)
        grams.append(flat @ flat.transpose(1, 2) / flat[0].numel())
    return sum(gram.square().mean() for gram in grams) + outputs[-1].float().square().mean()


def torchvision_model(name: str, **settings: object) -> Workload:
    def build(size: int) -> nn.Module:
        sized = {"image_size": size} if name.startswith("vit") else {}
        return getattr(torchvision.models, name)(num_classes=CLASSES, **sized, **settings)

    return Workload(build, images, classes, IMAGENET)


def paper_model(name: str) -> Workload:
    return Workload(lambda _: wus_ext.revert(NETWORKS[name]()), images, classes, CIFAR)


class UNet(nn.Module):
    """Ronneberger et al., arXiv 1505.04597, with batch norm and padding; three levels."""

    def __init__(self, width: int = 32, out_channels: int = 4) -> None:
        super().__init__()
        sizes = [width << level for level in range(4)]
        self.pool = nn.MaxPool2d(2)
        self.down = nn.ModuleList(
            self._double(i, o) for i, o in zip([3, *sizes], sizes, strict=False)
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * s, s, 2, 2) for s in sizes[-2::-1])
        self.merge = nn.ModuleList(self._double(2 * s, s) for s in sizes[-2::-1])
        self.head = nn.Conv2d(width, out_channels, 1)

    @staticmethod
    def _double(in_channels: int, out_channels: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for channels in (in_channels, out_channels):
            layers += [
                nn.Conv2d(channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            ]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x)
            skips.append(x)
        skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([skips.pop(), up(x)], dim=1))
        return self.head(x)


class Bert(nn.Module):
    """Transformers' BertForSequenceClassification, four layers of width 256."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=1000,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=1024,
            num_labels=CLASSES,
        )
        self.bert = BertForSequenceClassification(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bert(ids).logits


class Dcgan(nn.Module):
    """A generator's step through its discriminator (Radford et al., arXiv 1511.06434)."""

    def __init__(self, size: int, width: int = 64, latent: int = 100) -> None:
        super().__init__()
        levels = size.bit_length() - 4  # of stride two between 4x4 and half the size
        widths = [width << level for level in range(levels + 1)]
        make: list[nn.Module] = []
        channels = latent
        for i, out in enumerate(reversed(widths)):
            stride, padding = (2, 1) if i else (1, 0)
            make += [
                nn.ConvTranspose2d(channels, out, 4, stride, padding, bias=False),
                nn.BatchNorm2d(out),
                nn.ReLU(True),
            ]
            channels = out
        make += [nn.ConvTranspose2d(channels, 3, 4, 2, 1, bias=False), nn.Tanh()]
        judge: list[nn.Module] = [nn.Conv2d(3, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
        for channels, out in pairwise(widths):
            judge += [
                nn.Conv2d(channels, out, 4, 2, 1, bias=False),
                nn.BatchNorm2d(out),
                nn.LeakyReLU(0.2, True),
            ]
        self.generator = nn.Sequential(*make)
        self.discriminator = nn.Sequential(*judge, nn.Conv2d(widths[-1], 1, 4, bias=False))

    def forward(self, noise: Tensor) -> Tensor:
        return self.discriminator(self.generator(noise)).flatten()


class Features(nn.Module):
    """VGG-16's activations that style and perceptual losses compare."""

    STOPS = (3, 8, 15, 22)

    def __init__(self) -> None:
        super().__init__()
        vgg = torchvision.models.vgg16(weights=None, init_weights=False)
        self.layers = vgg.features[: self.STOPS[-1] + 1]

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i in self.STOPS:
                outputs.append(x)
        return outputs


class Perceptual(nn.Module):
    """A network that transforms images, trained by a perceptual loss (arXiv 1603.08155)."""

    def __init__(self) -> None:
        super().__init__()
        self.transform = nn.Sequential(
            *self._conv(3, 32, 1), *self._conv(32, 64, 2), *self._conv(64, 64, 1),
            nn.Upsample(scale_factor=2), *self._conv(64, 32, 1), nn.Conv2d(32, 3, 3, padding=1),
        )  # fmt: skip
        self.features = Features()

    @staticmethod
    def _conv(in_channels: int, out_channels: int, stride: int) -> list[nn.Module]:
        conv = nn.Conv2d(in_channels, out_channels, 3, stride, 1)
        return [conv, nn.InstanceNorm2d(out_channels, affine=True), nn.ReLU()]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.features(self.transform(x))


WORKLOADS = {
    **{
        name: torchvision_model(name)
        for name in (
            "resnet18",
            "resnet50",
            "vgg16_bn",
            "densenet121",
            "googlenet",
            "resnext50_32x4d",
            "regnet_y_400mf",
            "mobilenet_v2",
            "mnasnet1_0",
            "shufflenet_v2_x1_0",
            "efficientnet_b0",
            "squeezenet1_1",
            "alexnet",
            "vit_b_16",
        )
    },
    **{f"cifar_{name}": paper_model(name) for name in ("alexnet", "vgg11", "vgg16", "resnet18")},
    "unet": Workload(lambda _: UNet(), images, pixels, ((4, 128),)),
    "bert": Workload(lambda _: Bert(), tokens, classes, ((16, 128),)),
    "dcgan": Workload(
        Dcgan,
        lambda batch, size: (torch.randn(batch, 100, 1, 1),),
        scores,
        ((32, 64),),
        passes_through="discriminator",
    ),
    "style": Workload(lambda _: Features(), images, squares, ((1, 256),), False, ""),
    "perceptual": Workload(
        lambda _: Perceptual(), images, squares, ((4, 128),), passes_through="features"
    ),
    "pgd": Workload(
        lambda _: wus_ext.revert(NETWORKS["resnet18"]()), images, classes, CIFAR, False, ""
    ),
}
WORKLOADS["vgg16_bn"] = torchvision_model("vgg16_bn", init_weights=False)
WORKLOADS["googlenet"] = torchvision_model("googlenet", init_weights=False, aux_logits=False)

#: Networks with few 3x3 convolutions of stride 1.
FEW_3X3 = (
    "mobilenet_v2",
    "efficientnet_b0",
    "resnet50",
    "regnet_y_400mf",
    "densenet121",
    "shufflenet_v2_x1_0",
)
PAPER = tuple(name for name in WORKLOADS if name.startswith("cifar_"))
