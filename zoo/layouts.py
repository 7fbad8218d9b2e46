"""How the features of an image lie in a tensor: tokens or maps, their grid and their prefix tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import Tensor

Shape = tuple[int, ...]
Kind = Literal["tokens", "maps", "nhwc"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What lies where in the features at one position of a chain.

    Attributes:
        kind: `tokens` (B, P + N, D), prefix tokens first; `maps` (B, D, H, W); `nhwc` (B, H, W, D).
        width: D, the channels.
        grid: (H, W); or (N,) of tokens when their grid is unknown, N of them without the prefix.
        prefix: P, the number of class, distillation and register tokens.
    """

    kind: Literal["tokens", "maps", "nhwc"]
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
    def of_nhwc(cls, shape: Shape) -> Layout:
        """Of features (H, W, D)."""
        return cls(kind="nhwc", width=shape[2], grid=shape[:2])

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
    if (
        source.kind == target.kind == "tokens"
        and source.vectors == target.vectors
        and 1 in map(len, (source.grid, target.grid))
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
