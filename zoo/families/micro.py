"""The anchors of `deit-micro` and `resnet-micro`: small networks for 32×32 colour images.

Those of `deit-micro` are ordinary timm Vision Transformers with two changes that let a transformer of this
size learn CIFAR-10 in tens of epochs: a convolutional stem instead of the patch embedding
(Xiao et al. 2021, "Early Convolutions Help Transformers See Better", arXiv:2106.14881) and
a depthwise convolution inside each MLP (Li et al. 2021, "LocalViT", arXiv:2104.05707).
Those of `resnet-micro` are timm ResNets of twelve basic blocks with a stem that halves the
resolution once instead of four times.

Importing this module registers them with timm, so that a family file names them as it
names any other timm model.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

DEPTH = 8
GRID = 4  # the stem leaves 4×4 tokens of a 32×32 image
HEAD_DIM = 20


class ConvStem(nn.Module):
    """Convolutions 3×3 that turn (B, 3, 32, 32) into tokens (B, 16, embed_dim).

    The first convolution keeps the resolution, the other three halve it. Written to
    timm's contract for an `embed_layer`: an attribute `num_patches` and a forward
    pass that returns tokens.
    """

    def __init__(self, channels: tuple[int, ...], embed_dim: int) -> None:
        super().__init__()
        self.num_patches = GRID * GRID
        layers: list[nn.Module] = []
        previous = 3
        for index, width in enumerate(channels):
            stride = 1 if index == 0 else 2
            layers += [
                nn.Conv2d(previous, width, 3, stride, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.GELU(),
            ]
            previous = width
        layers += [nn.Conv2d(previous, embed_dim, 3, 2, 1, bias=False), nn.BatchNorm2d(embed_dim)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


class LocalMlp(nn.Module):
    """Linear, depthwise convolution 3×3 over the token grid with a skip, GELU, Linear.

    (B, 16, in_features) → (B, 16, in_features). Written to timm's contract for an `mlp_layer`.
    """

    def __init__(self, in_features: int, hidden_features: int, **_: object) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.local = nn.Conv2d(hidden_features, hidden_features, 3, 1, 1, groups=hidden_features)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.fc1(tokens)
        grid = hidden.transpose(1, 2).unflatten(2, (GRID, GRID))
        return self.fc2(self.act(hidden + self.local(grid).flatten(2).transpose(1, 2)))


def _settings(first_conv: str, classifier: str) -> dict[str, object]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "first_conv": first_conv,
        "classifier": classifier,
        "license": "apache-2.0",
    }


# timm looks this name up in the module of every registered model
default_cfgs = generate_default_cfgs(
    {
        f"{kind}_micro_{size}.cifar10": _settings(*ends)
        for kind, ends in {"deit": ("patch_embed.layers.0", "head"), "resnet": ("conv1.0", "fc")}.items()
        for size in ("tiny", "small", "base")
    }
)


def _build_deit(
    variant: str, channels: tuple[int, ...], width: int, pretrained: bool, **overrides: Any
) -> VisionTransformer:
    def embed_layer(embed_dim: int, **_: object) -> ConvStem:
        return ConvStem(channels, embed_dim)

    settings: dict[str, Any] = {
        "img_size": 32,
        "patch_size": 32 // GRID,
        "embed_dim": width,
        "depth": DEPTH,
        "num_heads": width // HEAD_DIM,
        "class_token": False,
        "global_pool": "avg",
        "embed_layer": embed_layer,
        "mlp_layer": LocalMlp,
    }
    return build_model_with_cfg(VisionTransformer, variant, pretrained, **{**settings, **overrides})


@register_model
def deit_micro_tiny(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """Width 20, the cheapest anchor."""
    return _build_deit("deit_micro_tiny", (8, 12, 18), 20, pretrained, **kwargs)


@register_model
def deit_micro_small(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """Width 40."""
    return _build_deit("deit_micro_small", (12, 24, 36), 40, pretrained, **kwargs)


@register_model
def deit_micro_base(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """Width 80, the dearest anchor."""
    return _build_deit("deit_micro_base", (20, 40, 64), 80, pretrained, **kwargs)


def _build_resnet(variant: str, width: int, pretrained: bool, **overrides: Any) -> ResNet:
    settings: dict[str, Any] = {
        "block": BasicBlock,
        "layers": (3, 3, 3, 3),
        "channels": (width, 2 * width, 4 * width, 4 * width),
        "stem_type": "deep",
        "stem_width": width // 2,
    }
    model = build_model_with_cfg(ResNet, variant, pretrained, **{**settings, **overrides})
    model.register_module("maxpool", nn.Identity())
    return model


@register_model
def resnet_micro_tiny(pretrained: bool = False, **kwargs: object) -> ResNet:
    """6 to 24 channels, the cheapest anchor."""
    return _build_resnet("resnet_micro_tiny", 6, pretrained, **kwargs)


@register_model
def resnet_micro_small(pretrained: bool = False, **kwargs: object) -> ResNet:
    """10 to 40 channels."""
    return _build_resnet("resnet_micro_small", 10, pretrained, **kwargs)


@register_model
def resnet_micro_base(pretrained: bool = False, **kwargs: object) -> ResNet:
    """18 to 72 channels, the dearest anchor."""
    return _build_resnet("resnet_micro_base", 18, pretrained, **kwargs)
