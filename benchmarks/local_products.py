"""The position encoding of `deit-micro`'s blocks as products of matrices, for training on GPUs.

The kernels for the gradient of a depthwise convolution sum over all images and positions with one thread block a
channel, and take most of a step of networks this small. On a grid of 8×8 the same map is one 64×64 matrix a channel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from klas_zoo.families.micro import GRID, LocalBlock


@cache
def _taps(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(9, 64·64): 1 where a tap of the 3×3 kernel takes token `row` to token `column`, else 0."""
    taps = torch.zeros(9, GRID**2, GRID**2)
    for tap in range(9):
        down, right = tap // 3 - 1, tap % 3 - 1
        for row in range(GRID):
            for column in range(GRID):
                if 0 <= row + down < GRID and 0 <= column + right < GRID:
                    taps[tap, (row + down) * GRID + column + right, row * GRID + column] = 1
    return taps.flatten(1).to(device, dtype)


def encoded(local: nn.Conv2d, tokens: Tensor) -> Tensor:
    """Tokens (B, 64, D) → `local` of them on the grid, (B, 64, D)."""
    assert local.bias is not None
    kernels = local.weight.flatten(1)
    matrices = (kernels @ _taps(kernels.device, kernels.dtype)).view(-1, GRID**2, GRID**2)
    return torch.bmm(tokens.permute(2, 0, 1), matrices).permute(1, 2, 0) + local.bias


@contextmanager
def local_products() -> Iterator[None]:
    """All blocks of `deit-micro` compute their position encoding by `encoded` in here."""
    plain = LocalBlock.forward

    def forward(self: LocalBlock, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super(LocalBlock, self).forward(x + encoded(self.local, x), *args, **kwargs)

    LocalBlock.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        LocalBlock.forward = plain  # type: ignore[method-assign]
