"""The only package that knows architectures: it turns a timm model into a chain.

One module for each architecture. Stem, blocks and head are the model's own modules, or call its
own methods, in its own order, so that a chain computes bit for bit what the model computes.
docs/architectures.md says what a block is in each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientnet import EfficientNet
from timm.models.levit import Levit, LevitDistilled
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from klas_zoo.architectures import convnext, efficientnet, levit, resnet, swin, vit
from klas_zoo.chains import Chain, Shape
from klas_zoo.errors import FamilyError

_CUTS: Mapping[type, Callable[[Any, Shape], Chain]] = {
    VisionTransformer: vit.cut,
    VisionTransformerDistilled: vit.cut,
    SwinTransformer: swin.cut,
    SwinTransformerV2: swin.cut,
    Levit: levit.cut,
    LevitDistilled: levit.cut,
    ResNet: resnet.cut,
    ConvNeXt: convnext.cut,
    EfficientNet: efficientnet.cut,
    MobileNetV3: efficientnet.cut_mobilenet,
}


def to_chain(model: nn.Module, input_shape: Shape) -> Chain:
    """Cuts a timm model into stem, blocks and head. The chain shares the model's weights.

    Args:
        model: of timm: ViT, DeiT (distilled too), DeiT III, Swin, Swin v2, LeViT, ResNet, ConvNeXt,
            EfficientNet or MobileNetV3.
        input_shape: (C, H, W) of one image.

    Raises:
        FamilyError: klas-zoo does not know how to cut this architecture.
    """
    # exactly these forward passes were read; a subclass may do something else in between
    cut = _CUTS.get(type(model))
    if cut is None:
        raise FamilyError(
            f"{type(model).__name__} is not an architecture klas-zoo can cut into blocks (it knows timm's "
            "ViT, DeiT, DeiT III, Swin, Swin v2, LeViT, ResNet, ConvNeXt, EfficientNet and MobileNetV3): "
            "build klas_zoo.Chain(stem, blocks, head) from it in Python."
        )
    return cut(model, input_shape)
