"""Other people's models, in small: random weights, small images, nothing downloaded."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from torch import Tensor, nn

from wus_ext.nn import is_bias
from wus_ext.profiling.saved import saving

Inputs = tuple | dict


@dataclass(frozen=True)
class Case:
    """A model and what it is called with.

    Attributes:
        make: the model with random weights, or skips the test where its library is missing.
        inputs: arguments of one call; positional, or by name in a dict.
        saved: bytes that a skip step may save at most, as a part of what stock with frozen weights
            saves. Where it is one, the model has nothing but attention, normalisation and smooth
            activations, or layers of its own that stay stock.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    saved: float = 1.0

    def __str__(self) -> str:
        return self.name

    def build(self) -> nn.Module:
        """The model, with scales and biases that are neither one nor zero, as after training."""
        torch.manual_seed(0)
        model = self.make()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if is_bias(name):
                    parameter.uniform_(-0.1, 0.1)
                elif parameter.dim() <= 1:
                    parameter.uniform_(0.5, 1.5)
        return model


def call(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Every tensor of the output that a loss could be made of."""
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    return _differentiable(output)


def _differentiable(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.requires_grad else []
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, (list, tuple)):
        return []
    return [tensor for part in output for tensor in _differentiable(part)]


def freeze(model: nn.Module) -> nn.Module:
    """Stock PyTorch's way to train biases only."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_bias(name))
    return model


def saved_bytes(model: nn.Module, inputs: Inputs) -> int:
    """Bytes that autograd keeps for backward, without parameters, buffers and inputs."""
    given = inputs.values() if isinstance(inputs, dict) else inputs
    with saving([*model.parameters(), *model.buffers(), *given]) as saved:
        call(model, inputs)
    return saved()


def images(size: int) -> Callable[[], tuple]:
    return lambda: (torch.randn(2, 3, size, size),)


def tokens() -> dict:
    return {"input_ids": torch.randint(0, 40, (2, 12))}


def torchvision(path: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        found = pytest.importorskip("torchvision").models
        for part in path.split("."):
            found = getattr(found, part)
        return found(num_classes=5, **settings)

    return make


def timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=5, **settings)


def transformers(name: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        library = pytest.importorskip("transformers")
        return getattr(library, name)(getattr(library, config)(**settings))

    return make


def vgg() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    features = models.vgg.make_layers(models.vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5))


def convnext() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    block = models.convnext.CNBlockConfig
    setting = [block(16, 32, 2), block(32, 48, 1), block(48, None, 1)]
    return models.ConvNeXt(setting, stochastic_depth_prob=0.2, layer_scale=0.5, num_classes=5)


def bottlenecks(**settings: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision").models
        block = models.resnet.Bottleneck
        return models.ResNet(block, [1, 1, 1, 1], num_classes=5, **settings)

    return make


def efficientnet(version: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        models = pytest.importorskip("torchvision").models
        block = models.efficientnet.MBConvConfig
        first = block if version == 1 else models.efficientnet.FusedMBConvConfig
        setting = [first(1, 3, 1, 24, 16, 1), first(4, 3, 2, 16, 32, 2), block(4, 5, 2, 32, 48, 2)]
        return models.EfficientNet(setting, dropout=0.2, num_classes=5)

    return make


def swin_v2() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    v2 = models.swin_transformer
    return models.SwinTransformer(
        **SWIN, num_classes=5, block=v2.SwinTransformerBlockV2, downsample_layer=v2.PatchMergingV2
    )


def detr() -> nn.Module:
    library = pytest.importorskip("transformers")
    backbone = library.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    config = library.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=backbone,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=7,
        num_labels=4,
    )
    return library.DetrForObjectDetection(config)


ENCODER = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
SWIN = {
    "patch_size": [2, 2],
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [1, 2],
    "window_size": [4, 4],
}
VIT = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 32,
    "mlp_dim": 64,
}
MAXVIT = {
    "input_size": (56, 56),
    "stem_channels": 16,
    "partition_size": 7,
    "block_channels": [16, 32],
    "block_layers": [1, 1],
    "head_dim": 8,
    "stochastic_depth_prob": 0.2,
}
DENSENET = {"growth_rate": 8, "block_config": (2, 2, 2), "num_init_features": 16}
INCEPTION = {"init_weights": False, "aux_logits": False}
TIMM_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
SEGFORMER = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 16, 32, 32],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 32,
}
WAV2VEC2 = ENCODER | {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}

TORCHVISION = [
    Case("alexnet", torchvision("alexnet"), images(64), 0.6),
    Case("convnext", convnext, images(64), 0.85),
    Case("densenet", torchvision("DenseNet", **DENSENET), images(64), 0.9),
    Case("efficientnet", efficientnet(1), images(48), 0.75),
    Case("efficientnet_v2", efficientnet(2), images(48), 0.75),
    Case("googlenet", torchvision("googlenet", **INCEPTION), images(64), 0.8),
    Case("inception_v3", torchvision("inception_v3", **INCEPTION), images(107), 0.7),
    Case("maxvit", torchvision("MaxVit", **MAXVIT), images(56), 0.8),
    Case("mnasnet0_5", torchvision("mnasnet0_5"), images(64), 0.6),
    Case("mobilenet_v2", torchvision("mobilenet_v2", width_mult=0.5), images(64), 0.7),
    Case("mobilenet_v3_small", torchvision("mobilenet_v3_small"), images(64), 0.7),
    Case("regnet_y_400mf", torchvision("regnet_y_400mf"), images(64), 0.65),
    Case("resnet18", torchvision("resnet18"), images(64), 0.75),
    Case("resnext", bottlenecks(groups=8, width_per_group=4), images(64), 0.75),
    Case("shufflenet_v2_x0_5", torchvision("shufflenet_v2_x0_5"), images(64), 0.6),
    Case("squeezenet1_1", torchvision("squeezenet1_1"), images(64), 0.5),
    Case("swin", torchvision("SwinTransformer", **SWIN), images(32)),
    Case("swin_v2", swin_v2, images(32)),
    Case("vgg11_bn", vgg, images(32), 0.45),
    Case("vit", torchvision("VisionTransformer", **VIT), images(32)),
    Case("wide_resnet", bottlenecks(width_per_group=128), images(64), 0.7),
    Case(
        "lraspp (segmentation)",
        torchvision("segmentation.lraspp_mobilenet_v3_large", weights_backbone=None),
        images(64),
        0.7,
    ),
]
TIMM = [
    Case("beit", timm("beit_base_patch16_224", **TIMM_VIT), images(32)),
    Case("cait", timm("cait_xxs24_224", **TIMM_VIT), images(32)),
    Case("convnext_atto", timm("convnext_atto", depths=(1, 1, 1, 1)), images(64), 0.55),
    Case("edgenext", timm("edgenext_xx_small"), images(64), 0.9),
    Case("fastvit", timm("fastvit_t8"), images(64), 0.7),
    Case("ghostnet", timm("ghostnet_050"), images(64), 0.5),
    Case("hrnet", timm("hrnet_w18_small"), images(64), 0.7),
    Case("mixer", timm("mixer_s32_224", img_size=64), images(64)),
    Case("mobilevit", timm("mobilevit_xxs"), images(64), 0.75),
    Case("nfnet", timm("test_nfnet"), images(64)),
    Case("poolformer", timm("poolformer_s12"), images(64), 0.6),
    Case("repvgg", timm("repvgg_a0"), images(64)),
    Case("resnet14t", timm("resnet14t"), images(64), 0.85),
    Case("vovnet", timm("ese_vovnet19b_slim"), images(64), 0.85),
    Case("xcit", timm("xcit_nano_12_p16_224", depth=2), images(64), 0.85),
]
TRANSFORMERS = [
    Case("bert", transformers("BertForSequenceClassification", "BertConfig", **ENCODER), tokens),
    Case(
        "distilbert",
        transformers(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            **{"vocab_size": 40, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
        ),
        tokens,
    ),
    Case("gpt2", transformers("GPT2LMHeadModel", "GPT2Config", vocab_size=40, **GPT2), tokens),
    Case(
        "segformer",
        transformers("SegformerForSemanticSegmentation", "SegformerConfig", **SEGFORMER),
        lambda: {"pixel_values": torch.randn(2, 3, 64, 64)},
    ),
    Case(
        "wav2vec2",
        transformers("Wav2Vec2Model", "Wav2Vec2Config", **WAV2VEC2),
        lambda: {"input_values": torch.randn(2, 400)},
    ),
    Case("detr", detr, lambda: {"pixel_values": torch.randn(2, 3, 64, 64)}),
]
CASES = TORCHVISION + TIMM + TRANSFORMERS
