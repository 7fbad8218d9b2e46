"""EfficientNet, MobileNetV3 and what timm builds from their classes: maps (B, D, H, W)."""

from __future__ import annotations

from timm.models.efficientnet import EfficientNet
from timm.models.mobilenetv3 import MobileNetV3
from torch import nn

from klas_zoo.architectures.parts import dropout
from klas_zoo.chains import Chain, Shape


def cut(model: EfficientNet, input_shape: Shape) -> Chain:
    """A block is one inverted residual or depthwise separable block, with its stride."""
    return _chain(model, [model.conv_head, model.bn2, model.global_pool], input_shape)


def cut_mobilenet(model: MobileNetV3, input_shape: Shape) -> Chain:
    """As EfficientNet; its head pools before the last convolution."""
    tail = [model.global_pool, model.conv_head, model.norm_head, model.act2, model.flatten]
    return _chain(model, tail, input_shape)


def _chain(model: EfficientNet | MobileNetV3, tail: list[nn.Module], input_shape: Shape) -> Chain:
    return Chain(
        nn.Sequential(model.conv_stem, model.bn1),
        [block for stage in model.blocks.children() for block in stage.children()],
        nn.Sequential(*tail, dropout(model.drop_rate, like=model), model.classifier),
        input_shape=input_shape,
    )
