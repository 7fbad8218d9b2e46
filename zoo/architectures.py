"""The one module that knows architectures: it turns a timm model into a chain.

Stem and head are parts of the model itself and call its own methods in its own order, so
that a chain computes bit for bit what the model computes.
"""

from __future__ import annotations

import copy
from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from klas_zoo.chains import Chain, Shape, first_token
from klas_zoo.errors import FamilyError


def to_chain(model: nn.Module, input_shape: Shape) -> Chain:
    """Cuts a timm model into stem, blocks and head. The chain shares the model's weights.

    Args:
        model: a timm Vision Transformer: ViT, DeiT (distilled too), DeiT III, with class,
            distillation or register tokens or none, any pooling over tokens.
        input_shape: (C, H, W) of one image.

    Raises:
        FamilyError: klas-zoo does not know how to cut this architecture.
    """
    # exactly these forward passes were read; a subclass may do something else in between
    if isinstance(model, VisionTransformer) and model.__module__ in _VIT_MODULES:
        return _cut_vit(model, input_shape)
    raise FamilyError(
        f"{type(model).__name__} is not an architecture klas-zoo can cut into blocks (it knows timm's "
        "ViT, DeiT and DeiT III): build klas_zoo.Chain(stem, blocks, head) from it in Python."
    )


_VIT_MODULES = frozenset({"timm.models.vision_transformer", "timm.models.deit"})
_VIT_TAIL = frozenset({"norm", "fc_norm", "head_drop", "head", "head_dist", "attn_pool"})


def _cut_vit(model: VisionTransformer, input_shape: Shape) -> Chain:
    children = set(dict(model.named_children()))
    stem = _ViTStem(_part(model, children - _VIT_TAIL - {"blocks"}, parameters=True))
    head = _ViTHead(_part(model, children & _VIT_TAIL, parameters=False))
    patches = partial(_mean_of_patches, prefix=model.num_prefix_tokens)
    pool = first_token if model.global_pool == "token" else patches
    return Chain(stem, list(model.blocks), head, input_shape=input_shape, pool=pool)


def _part(model: VisionTransformer, children: set[str], *, parameters: bool) -> VisionTransformer:
    """The same model with only some of its children, and its own parameters or none of them."""
    part = copy.copy(model)
    part._modules = {name: child for name, child in model._modules.items() if name in children}
    part._parameters = dict(model._parameters) if parameters else {}
    return part


class _ViTStem(nn.Module):
    """Patch embedding, prefix tokens and positions: images (B, C, H, W) → tokens (B, N, D)."""

    def __init__(self, part: VisionTransformer) -> None:
        super().__init__()
        self.part = part

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.part._pos_embed(self.part.patch_embed(images))
        return self.part.norm_pre(self.part.patch_drop(tokens))


class _ViTHead(nn.Module):
    """Final norm, pooling and classifier: tokens (B, N, D) → logits (B, classes)."""

    def __init__(self, part: VisionTransformer) -> None:
        super().__init__()
        self.part = part

    def forward(self, tokens: Tensor) -> Tensor:
        return self.part.forward_head(self.part.norm(tokens))


def _mean_of_patches(tokens: Tensor, prefix: int) -> Tensor:
    return tokens[:, prefix:].mean(1)
