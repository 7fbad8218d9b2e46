"""ConvNeXt and ConvNeXt v2: stages of residual blocks on maps (B, D, H, W)."""

from __future__ import annotations

from timm.models.convnext import ConvNeXt
from torch import nn

from klas_zoo.architectures.parts import blocks_of
from klas_zoo.chains import Chain, Shape


def cut(model: ConvNeXt, input_shape: Shape) -> Chain:
    """A block is one residual block; norm and strided convolution belong to the first block of a stage."""
    return Chain(
        model.stem,
        blocks_of(model.stages),
        nn.Sequential(model.norm_pre, model.head),
        input_shape=input_shape,
    )
