"""LeViT: stages of transformer blocks on tokens whose grid shrinks, or on maps (`levit_conv_…`)."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.levit import Attention, AttentionDownsample, Levit
from torch import Tensor, nn

from klas_zoo.architectures.parts import blocks_of, part
from klas_zoo.chains import Chain, Layout, Shape


def cut(model: Levit, input_shape: Shape) -> Chain:
    """A block is attention and MLP; shrinking attention and its MLP belong to the first block of a stage."""
    blocks = [_Block(block) for block in blocks_of(model.stages)]
    head = _Head(part(model, {"head", "head_dist"}))
    if model.use_conv:
        return Chain(model.stem, blocks, head, input_shape=input_shape)
    grids: list[Any] = [one.resolution for one in model.stages.modules() if isinstance(one, Attention)]
    return Chain(
        nn.Sequential(model.stem, _Tokens()),
        blocks,
        head,
        input_shape=input_shape,
        layout=partial(_layout, grids={height * width: (height, width) for height, width in grids}),
    )


def _layout(shape: Shape, grids: dict[int, Shape]) -> Layout:
    return Layout.of_tokens(shape, grid=grids[shape[0]])


class _Tokens(nn.Module):
    """Maps (B, D, H, W) → tokens (B, N, D)."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps.flatten(2).transpose(1, 2)


class _Block(nn.Module):
    """A block that forgets the attention biases it looked up.

    In evaluation timm keeps them, gathered into a matrix, for the next pass. They would outlive
    weights that are loaded or tuned in between, and an export would leave its placeholders there.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self._attentions = [one for one in block.modules() if isinstance(one, Attention | AttentionDownsample)]

    def forward(self, features: Tensor) -> Tensor:
        features = self.block(features)
        for attention in self._attentions:
            attention.attention_bias_cache.clear()
        return features


class _Head(nn.Module):
    """The mean over tokens and the classifiers: features → logits (B, classes)."""

    def __init__(self, part: Levit) -> None:
        super().__init__()
        self.part = part

    def forward(self, features: Tensor) -> Tensor:
        return self.part.forward_head(features)
