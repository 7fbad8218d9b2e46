"""Plain Vision Transformers: ViT, DeiT and DeiT III, with prefix tokens or none."""

from __future__ import annotations

from functools import partial

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from klas_zoo.architectures.parts import part
from klas_zoo.chains import Chain, Layout, Shape, first_token, mean_pool

_TAIL = frozenset({"norm", "fc_norm", "head_drop", "head", "head_dist", "attn_pool"})


def cut(model: VisionTransformer, input_shape: Shape) -> Chain:
    """A block is one transformer block; the stem ends with the positions, the head begins with the norm."""
    children = set(dict(model.named_children()))
    layout = partial(Layout.of_tokens, grid=_grid(model, input_shape), prefix=model.num_prefix_tokens)
    return Chain(
        _Stem(part(model, children - _TAIL - {"blocks"}, parameters=True)),
        list(model.blocks),
        _Head(part(model, children & _TAIL)),
        input_shape=input_shape,
        layout=layout,
        pool=first_token if model.global_pool == "token" else mean_pool,
    )


def _grid(model: VisionTransformer, input_shape: Shape) -> Shape | None:
    """How the patches lie; None where an embedding of somebody's own does not tell."""
    if model.dynamic_img_size:
        return tuple(model.patch_embed.dynamic_feat_size(input_shape[1:]))
    return getattr(model.patch_embed, "grid_size", None)


class _Stem(nn.Module):
    """Patch embedding, prefix tokens and positions: images (B, C, H, W) → tokens (B, P + N, D)."""

    def __init__(self, part: VisionTransformer) -> None:
        super().__init__()
        self.part = part

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.part._pos_embed(self.part.patch_embed(images))
        return self.part.norm_pre(self.part.patch_drop(tokens))


class _Head(nn.Module):
    """Final norm, pooling and classifier: tokens (B, P + N, D) → logits (B, classes)."""

    def __init__(self, part: VisionTransformer) -> None:
        super().__init__()
        self.part = part

    def forward(self, tokens: Tensor) -> Tensor:
        return self.part.forward_head(self.part.norm(tokens))
