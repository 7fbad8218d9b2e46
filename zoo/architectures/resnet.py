"""ResNet and what timm builds from its class: residual blocks on maps (B, D, H, W)."""

from __future__ import annotations

from timm.models.resnet import ResNet
from torch import nn

from klas_zoo.architectures.parts import dropout
from klas_zoo.chains import Chain, Shape


def cut(model: ResNet, input_shape: Shape) -> Chain:
    """A block is one residual block, BasicBlock or Bottleneck; max pooling belongs to the stem."""
    stages = [model.get_submodule(f"layer{number}") for number in range(1, 5)]
    return Chain(
        nn.Sequential(model.conv1, model.bn1, model.act1, model.maxpool),
        [block for stage in stages for block in stage.children()],
        nn.Sequential(model.global_pool, dropout(model.drop_rate, like=model), model.fc),
        input_shape=input_shape,
    )
