"""A chain: any network seen as stem → block 1 … block n → head.

Everything behind `klas_zoo.architectures` sees networks only in this form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from klas_zoo.errors import FamilyError
from klas_zoo.modes import evaluating

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What lies where in the features at one position of a chain.

    Attributes:
        kind: `tokens` (B, P + N, D), prefix tokens first; `maps` (B, D, H, W); `maps_last` (B, H, W, D).
        width: D, the channels.
        grid: (H, W); or (N,) of tokens when nobody said how they lie, N of them without the prefix.
        prefix: P, the number of class, distillation and register tokens.
    """

    kind: Literal["tokens", "maps", "maps_last"]
    width: int
    grid: Shape
    prefix: int = 0

    @classmethod
    def of_tokens(cls, shape: Shape, *, grid: Shape | None = None, prefix: int = 0) -> Layout:
        """Of features (P + N, D), which lie row by row on a grid where there is one."""
        return cls(kind="tokens", width=shape[1], grid=grid or (shape[0] - prefix,), prefix=prefix)

    @classmethod
    def of_maps(cls, shape: Shape) -> Layout:
        """Of features (D, H, W)."""
        return cls(kind="maps", width=shape[0], grid=shape[1:])

    @classmethod
    def of_maps_last(cls, shape: Shape) -> Layout:
        """Of features (H, W, D)."""
        return cls(kind="maps_last", width=shape[2], grid=shape[:2])

    @classmethod
    def inferred(cls, shape: Shape) -> Layout:
        """What a shape alone tells: (N, D) are tokens without a prefix, (D, H, W) are maps."""
        return cls.of_tokens(shape) if len(shape) == 2 else cls.of_maps(shape)

    @property
    def vectors(self) -> int:
        """P + N: how many vectors of D channels an image has here."""
        return self.prefix + prod(self.grid)

    @property
    def shape(self) -> Shape:
        """Of the features, without the batch."""
        if self.kind == "tokens":
            return (self.vectors, self.width)
        return (self.width, *self.grid) if self.kind == "maps" else (*self.grid, self.width)

    def channels_last(self, features: Tensor) -> Tensor:
        """Features in this layout → (B, P + N, D) or (B, H, W, D)."""
        return features.permute(0, 2, 3, 1) if self.kind == "maps" else features

    def arrange(self, features: Tensor) -> Tensor:
        """Features (B, P + N, D) or (B, H, W, D) of another layout on the same grid → this layout."""
        if self.kind == "tokens":
            return features.flatten(1, -2)
        maps = features.unflatten(1, self.grid) if features.ndim == 3 else features
        # contiguous: convolutions go on in the memory format in which they run inside their own network
        return maps.permute(0, 3, 1, 2).contiguous() if self.kind == "maps" else maps

    def __str__(self) -> str:
        """`1 + 14×14 of width 192`."""
        prefix = f"{self.prefix} + " if self.prefix else ""
        return f"{prefix}{'×'.join(map(str, self.grid))} of width {self.width}"


def mismatch(source: Layout, target: Layout) -> str:
    """Why no stitching layer can join two positions, a clause; empty where one can."""
    if source.prefix != target.prefix:
        return f"prefix tokens (class, distillation, registers) cannot go from {source.prefix} to {target.prefix}"
    if source.grid == target.grid:
        return ""
    # how the tokens lie does not matter to other tokens, one by one they are the same
    if source.kind == target.kind == "tokens" and source.vectors == target.vectors and 1 in map(
        len, (source.grid, target.grid)
    ):
        return ""
    return f"features {source} and {target} do not lie on one grid"


def mean_pool(features: Tensor, layout: Layout) -> Tensor:
    """Features (B, …) in any layout → their mean over all positions but prefix tokens, (B, D)."""
    if layout.kind == "tokens":
        return features[:, layout.prefix :].mean(1)
    return features.mean((2, 3) if layout.kind == "maps" else (1, 2))


def first_token(features: Tensor, layout: Layout) -> Tensor:
    """Tokens (B, P + N, D) → the class token (B, D)."""
    return features[:, 0]


class Chain(nn.Module):
    """Stem, blocks and head of one network.

    Args:
        stem: images (B, C, H, W) → features, tokens (B, P + N, D) or maps (B, D, H, W) or (B, H, W, D).
        blocks: each features → features; n of them.
        head: features → logits (B, classes).
        input_shape: (C, H, W) of one image.
        layout: the shape of features without the batch → what lies where in them. Default: tokens
            without a prefix and on no known grid, or maps (D, H, W).
        pool: features and their layout → (B, D), what a linear probe reads. Default: the mean over
            tokens (none of the prefix) or positions.

    Raises:
        FamilyError: no blocks, features that are neither tokens nor maps or not laid out as
            `layout` says, or a head that does not give one row of logits an image.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Sequence[nn.Module],
        head: nn.Module,
        *,
        input_shape: Shape,
        layout: Callable[[Shape], Layout] = Layout.inferred,
        pool: Callable[[Tensor, Layout], Tensor] = mean_pool,
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
        self.layouts = tuple(map(layout, self.shapes))
        for found, said in zip(self.shapes, self.layouts, strict=True):
            if said.shape != found:
                raise FamilyError(f"Features of shape {found} are not laid out as {said.kind}, {said}.")

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
        return self.layouts[position].width

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


def can_stitch(source: Chain, i: int, target: Chain, j: int) -> bool:
    """Whether a stitching layer can turn features after block i of `source` into those after block j of `target`."""
    return not mismatch(source.layouts[i], target.layouts[j])
