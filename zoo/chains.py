"""A chain: any network seen as stem → block 1 … block n → head.

Everything behind `klas_zoo.architectures` sees networks only in this form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from klas_zoo.errors import FamilyError
from klas_zoo.modes import evaluating

Shape = tuple[int, ...]


def mean_pool(features: Tensor) -> Tensor:
    """Tokens (B, N, D) or feature maps (B, D, H, W) → (B, D)."""
    return features.mean(1) if features.ndim == 3 else features.mean((2, 3))


def first_token(features: Tensor) -> Tensor:
    """Tokens (B, N, D) → the class token (B, D)."""
    return features[:, 0]


class Chain(nn.Module):
    """Stem, blocks and head of one network.

    Args:
        stem: images (B, C, H, W) → features, tokens (B, N, D) or maps (B, D, H, W).
        blocks: each features → features; n of them.
        head: features → logits (B, classes).
        pool: features → (B, D), what a linear probe reads. Default: the mean over tokens or
            positions.
        input_shape: (C, H, W) of one image.

    Raises:
        FamilyError: no blocks, features that are neither tokens nor maps, or a head that does
            not give one row of logits an image.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        *,
        input_shape: Shape,
        pool: Callable[[Tensor], Tensor] = mean_pool,
    ) -> None:
        super().__init__()
        if not blocks:
            raise FamilyError("A chain needs at least one block between its stem and its head.")
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        self.head = head
        self.pool = pool
        self.input_shape = tuple(input_shape)
        self.shapes, self.classes = self._trace()

    @torch.no_grad()
    def _trace(self) -> tuple[tuple[Shape, ...], int]:
        """Shapes without the batch after the stem and after each block, and the number of classes."""
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        shapes: list[Shape] = []
        with evaluating(self):
            for features in self.walk(torch.zeros(1, *self.input_shape, device=device)):
                shapes.append(tuple(features.shape[1:]))
                if features.ndim not in (3, 4):
                    raise FamilyError(f"Blocks must give tokens (N, D) or maps (D, H, W), not {shapes}.")
            logits = self.head(features)
        if logits.ndim != 2:
            raise FamilyError(f"A head must give logits (classes,) for an image, not {tuple(logits.shape[1:])}.")
        return tuple(shapes), logits.shape[1]

    @property
    def depth(self) -> int:
        """n, the number of blocks."""
        return len(self.blocks)

    def width(self, position: int) -> int:
        """Channels after block `position`; 0 is the stem's output."""
        shape = self.shapes[position]
        return shape[1] if len(shape) == 2 else shape[0]

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) → logits (B, classes)."""
        features = self.stem(images)
        for block in self.blocks:
            features = block(features)
        return self.head(features)

    def walk(self, images: Tensor) -> Iterator[Tensor]:
        """Features after the stem and after each block, n + 1 of them, one at a time."""
        features = self.stem(images)
        yield features
        for block in self.blocks:
            features = block(features)
            yield features


def grid(shape: Shape) -> Shape:
    """What both sides of a seam must share: (N,) of tokens, (H, W) of maps."""
    return shape[:1] if len(shape) == 2 else shape[1:]


def can_stitch(source: Chain, i: int, target: Chain, j: int) -> bool:
    """Whether features after block i of `source` have the grid the target has after block j."""
    return grid(source.shapes[i]) == grid(target.shapes[j])
