"""The anchors of `deit-micro` and `convnet-micro`: small networks for 32×32 colour images.

Those of `deit-micro` are timm Vision Transformers with the linear patch embedding of DeiT: 4×4 pixels of three
colours, 48 values, become one of 64 tokens of width 48 or more, so that no information is lost before the first
block and a stitch can use what the larger network knows. One change lets transformers of this size learn from
50,000 images: a depthwise 3×3 convolution over the token grid, with a skip, in front of every block (Chu et al.
2021, "Conditional Positional Encodings for Vision Transformers", arXiv:2102.10882).
Those of `convnet-micro` are their convolutional counterparts, for comparisons: 2×2 pixels, 12 values, become 16
channels or more, and timm's basic blocks follow, all on the same 16×16 maps.

Importing this module registers them with timm, so that a family file names them as it
names any other timm model.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

DEPTH = 8
PATCH = 4
GRID = 32 // PATCH
CONVNET_DEPTH = 6


class LocalBlock(Block):
    """timm's block behind a conditional position encoding: tokens (B, 64, D) → (B, 64, D).

    The encoding adds to every token a depthwise 3×3 convolution of its neighbours on the 8×8 grid.
    """

    def __init__(self, dim: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(dim, *args, **kwargs)
        self.local = nn.Conv2d(dim, dim, 3, 1, 1, groups=dim)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        grid = x.transpose(1, 2).unflatten(2, (GRID, GRID))
        return super().forward(x + self.local(grid).flatten(2).transpose(1, 2), *args, **kwargs)


def _settings(first_conv: str, classifier: str) -> dict[str, Any]:
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
        f"{model}.cifar10": _settings("stem" if model.startswith("convnet") else "patch_embed.proj", "head")
        for model in (
            "deit_micro_tiny", "deit_micro_small", "deit_micro_base", "convnet_micro_small", "convnet_micro_base",
        )
    }
)  # fmt: skip


def _build_deit(
    variant: str, width: int, heads: int, mlp_ratio: float, pretrained: bool, **overrides: Any
) -> VisionTransformer:
    settings: dict[str, Any] = {
        "img_size": 32,
        "patch_size": PATCH,
        "embed_dim": width,
        "depth": DEPTH,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio,
        "class_token": False,
        "global_pool": "avg",
        "block_fn": LocalBlock,
    }
    return build_model_with_cfg(VisionTransformer, variant, pretrained, **{**settings, **overrides})


@register_model
def deit_micro_tiny(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """Width 48 with MLPs of twice that, the smallest anchor: 13 M MACs."""
    return _build_deit("deit_micro_tiny", 48, 3, 2.0, pretrained, **kwargs)


@register_model
def deit_micro_small(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """Width 96: 63 M MACs."""
    return _build_deit("deit_micro_small", 96, 3, 4.0, pretrained, **kwargs)


@register_model
def deit_micro_base(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """Width 192, the largest anchor: 240 M MACs."""
    return _build_deit("deit_micro_base", 192, 6, 4.0, pretrained, **kwargs)


class ConvNet(nn.Module):
    """A residual network of one stage: images (B, 3, 32, 32) → logits (B, classes), maps (B, W, 16, 16) in between."""

    def __init__(self, width: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, width, 2, 2)
        self.blocks = nn.Sequential(*(BasicBlock(width, width) for _ in range(CONVNET_DEPTH)))
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(self.blocks(self.stem(images)).mean((2, 3)))
        return logits


@register_model
def convnet_micro_small(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """16 channels, the smaller anchor: 7 M MACs."""
    return build_model_with_cfg(ConvNet, "convnet_micro_small", pretrained, **{"width": 16, **kwargs})


@register_model
def convnet_micro_base(pretrained: bool = False, **kwargs: Any) -> ConvNet:
    """32 channels, the larger anchor: 29 M MACs."""
    return build_model_with_cfg(ConvNet, "convnet_micro_base", pretrained, **{"width": 32, **kwargs})
