"""Whether tokens lie row by row on a grid: what a stem does with single patches says so.

A stem that cuts images into patches by reshaping them (`b c (h p) (w q) -> b (h w) (p q c)`) has no maps in its graph,
and may as well sort patches into windows.
"""

from __future__ import annotations

from math import isqrt

import torch
from torch import Tensor, nn

from klas_zoo.layouts import Layout, Shape

_CHANGED = 1e-3  # of the largest change: another row of a product rounds otherwise


def token_grid(stem: nn.Module, images: Tensor, layout: Layout) -> Shape | None:
    """The grid (H, W) on which a stem's tokens lie row by row; None where they do not, or see several patches each.

    In image k, the patches are changed whose number has bit k set: token n has to change where bit k of n is set,
    and nowhere else. One more image changes all patches; prefix tokens never change.

    Args:
        images: (B, C, H, W), of which only the size matters.
        layout: of the stem's tokens.
    """
    number = layout.vectors - layout.prefix
    grid = _grid(number, tuple(images.shape[-2:]))
    if grid is None or images.is_meta:
        return None
    bits = (number - 1).bit_length()
    numbers = torch.arange(number)
    changed = torch.stack(
        [*((numbers >> bit) & 1 for bit in range(bits)), torch.ones(number, dtype=torch.int64)]
    ).bool()
    generator = torch.Generator().manual_seed(0)
    first, second = torch.rand(2, 1, *images.shape[1:], generator=generator)
    sides = [size // cells for size, cells in zip(images.shape[-2:], grid, strict=True)]
    masks = changed.unflatten(1, grid).repeat_interleave(sides[0], 1).repeat_interleave(sides[1], 2)[:, None]
    batch = torch.cat([first, torch.where(masks, second, first)]).to(images)
    with torch.no_grad():
        tokens = stem(batch)
    difference = (tokens[1:] - tokens[:1]).abs().amax(-1).cpu()
    found = difference > _CHANGED * difference.amax()
    prefix, rest = found[:, : layout.prefix], found[:, layout.prefix :]
    return grid if torch.equal(rest, changed) and not prefix.any() else None


def _grid(number: int, size: Shape) -> Shape | None:
    """As many square-ish patches as tokens, in images of a size: the patches have the same shape as in any ViT."""
    height, width = size
    columns = isqrt(number * width // height)
    if columns == 0 or number % columns:
        return None
    rows = number // columns
    square = height % rows == 0 and width % columns == 0 and height * columns == width * rows
    return (rows, columns) if square else None
