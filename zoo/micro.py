"""The anchors of `deit-micro`: three DeiT-like networks for 32×32 colour images.

They are ordinary timm Vision Transformers whose patch embedding is a small
convolutional stem, which is what lets a transformer of this size learn CIFAR-10 in
tens of epochs (Xiao et al. 2021, "Early Convolutions Help Transformers See Better",
arXiv:2106.14881). Importing this module registers them with timm, so that a family
file names them as it names any other timm model.
"""

from __future__ import annotations

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import nn

DEPTH = 8
GRID = 4  # the stem leaves 4×4 tokens of a 32×32 image


class ConvStem(nn.Module):
    """Convolutions 3×3 that turn (B, 3, 32, 32) into tokens (B, 16, embed_dim).

    The first convolution keeps the resolution, the other three halve it. Written to
    timm's contract for an `embed_layer`: an attribute `num_patches` and a forward
    pass that returns tokens.
    """

    def __init__(self, channels: tuple[int, ...], embed_dim: int, bias: bool = True) -> None:
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
        layers.append(nn.Conv2d(previous, embed_dim, 3, 2, 1, bias=bias))
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images).flatten(2).transpose(1, 2)


def _settings() -> dict[str, object]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "mean": (0.4914, 0.4822, 0.4465),
        "std": (0.2470, 0.2435, 0.2616),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "first_conv": "patch_embed.layers.0",
        "classifier": "head",
        "license": "apache-2.0",
    }


# timm looks this name up in the module of every registered model
default_cfgs = generate_default_cfgs(
    {
        "deit_micro_tiny.cifar10": _settings(),
        "deit_micro_small.cifar10": _settings(),
        "deit_micro_base.cifar10": _settings(),
    }
)


def _build(
    variant: str, channels: tuple[int, ...], width: int, heads: int, pretrained: bool, **overrides: object
) -> VisionTransformer:
    def embed_layer(embed_dim: int, bias: bool = True, **_: object) -> ConvStem:
        return ConvStem(channels, embed_dim, bias)

    settings: dict[str, object] = {
        "img_size": 32,
        "patch_size": 32 // GRID,
        "embed_dim": width,
        "depth": DEPTH,
        "num_heads": heads,
        "class_token": False,
        "global_pool": "avg",
        "embed_layer": embed_layer,
    }
    return build_model_with_cfg(VisionTransformer, variant, pretrained, **{**settings, **overrides})


@register_model
def deit_micro_tiny(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """Width 48, the cheapest anchor."""
    return _build("deit_micro_tiny", (16, 32, 48), 48, 3, pretrained, **kwargs)


@register_model
def deit_micro_small(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """Width 96."""
    return _build("deit_micro_small", (24, 48, 72), 96, 3, pretrained, **kwargs)


@register_model
def deit_micro_base(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """Width 192, the dearest anchor."""
    return _build("deit_micro_base", (32, 64, 128), 192, 4, pretrained, **kwargs)
