"""Swin and Swin v2: stages of transformer blocks in windows, on maps (B, H, W, D)."""

from __future__ import annotations

from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import nn

from klas_zoo.architectures.parts import blocks_of
from klas_zoo.chains import Chain, Layout, Shape


def cut(model: SwinTransformer | SwinTransformerV2, input_shape: Shape) -> Chain:
    """A block is one transformer block; patch merging belongs to the first block of a stage."""
    return Chain(
        model.patch_embed,
        blocks_of(model.layers),
        nn.Sequential(model.norm, model.head),
        input_shape=input_shape,
        layout=Layout.of_maps_last,
    )
