"""SN-Net's own choice of stitches: sliding windows, from depths and stages alone (SN-Net §3.3).

SN-Net numbers blocks from 0 and names a stitch (a, b): run source blocks 0..a, then target blocks
b..last. In our terms i = a + 1 and j = b, both counted over the whole chain.

* Equal depth, *paired*: windows of 2 blocks, step 1; every (a, b) inside a window. In networks of
  several stages only those with a < b.
* Unequal depth, *unpaired*: block b of the target is entered from block m(b) = ⌊b · d₁ / d₂⌋ of the
  source, where m(b) < b.

Networks of several stages are stitched stage by stage, without the last one, and without the first
where the source is convolutional; that is what SN-Net's published code does for Swin and LeViT, and
for ResNet. In SN-Net all pairs of one window share one stitching layer. Here each seam has its own:
a shared layer has no closed form that fits any one of its seams (SN-Net averages their solutions),
and every other selector has one per seam, so that a comparison is about the choice of stitches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import nn

from klas_zoo.chains import Chain, Shape, can_stitch
from klas_zoo.errors import SelectionError
from klas_zoo.routes import Direction, Seam
from klas_zoo.selection.candidates import Candidate, CostFunction, Pair, to_candidates


@dataclass(frozen=True, kw_only=True)
class NetworkStage:
    """Consecutive blocks whose features share a grid: `depth` of them, after `before` earlier ones."""

    grid: Shape
    before: int
    depth: int


def stages(chain: Chain) -> list[NetworkStage]:
    """The stages of a chain, in order; the stem belongs to none."""
    found: list[NetworkStage] = []
    for shape, blocks in groupby(layout.grid for layout in chain.layouts[1:]):
        before = found[-1].before + found[-1].depth if found else 0
        found.append(NetworkStage(grid=shape, before=before, depth=len(list(blocks))))
    return found


def paired(depth: int, *, diagonal: bool) -> list[tuple[int, int]]:
    """(a, b) of all windows of 2 blocks, step 1; only a < b without `diagonal`."""
    near = [(a, b) for a in range(depth) for b in range(depth) if abs(a - b) <= 1]
    return near if diagonal else [(a, b) for a, b in near if a < b]


def unpaired(source_depth: int, target_depth: int) -> list[tuple[int, int]]:
    """(m(b), b) with m(b) < b, in the order of b."""
    nearest = [(b * source_depth // target_depth, b) for b in range(target_depth)]
    return [(a, b) for a, b in nearest if a < b]


def window_seams(source: Chain, target: Chain) -> list[tuple[int, int]]:
    """(i, j) of every stitch SN-Net makes of two chains."""
    front, end = stages(source), stages(target)
    several = len(front) > 1 or len(end) > 1
    left_out = {end[-1].grid} if several else set()
    if several and _is_convolutional(source):
        left_out.add(end[0].grid)
    found: list[tuple[int, int]] = []
    for one in front:
        for other in end:
            if one.grid != other.grid or one.grid in left_out:
                continue
            inside = (
                paired(one.depth, diagonal=not several)
                if one.depth == other.depth
                else unpaired(one.depth, other.depth)
            )
            found += [(one.before + a + 1, other.before + b) for a, b in inside]
    return [(i, j) for i, j in found if can_stitch(source, i, target, j)]


def choose_by_windows(
    chains: dict[str, Chain], pairs: Sequence[Pair], cost: CostFunction, buckets: int, direction: Direction = "up"
) -> list[Candidate]:
    """SN-Net's stitches of these (smaller, larger) pairs, whatever they cost.

    SN-Net goes `up`; the same windows the other way, and both, are SN-Netv2's two-way stitching. Between
    unequal depths the rule finds stitches only into the deeper network.

    Raises:
        SelectionError: a pair has none.
    """
    chosen: list[Candidate] = []
    for pair in pairs:
        ways = {"up": (pair,), "down": (pair[::-1],), "both": (pair, pair[::-1])}[direction]
        seams = [Seam(f, i, g, j) for f, g in ways for i, j in window_seams(chains[f], chains[g])]
        if not seams:
            raise SelectionError(
                f"SN-Net's windows hold no stitch of {' and '.join(ways[0])}: "
                f"their stages have {' and '.join(_depths(chains[name]) for name in ways[0])} blocks."
            )
        chosen += [replace(one, reason="window") for one in to_candidates(chains, seams, cost, buckets)]
    return chosen


def _is_convolutional(chain: Chain) -> bool:
    """Whether blocks look around by convolutions: SN-Net leaves the first stage of such a source out."""
    return any(isinstance(part, nn.Conv2d) and max(part.kernel_size) > 1 for part in chain.blocks.modules())


def _depths(chain: Chain) -> str:
    return ", ".join(str(stage.depth) for stage in stages(chain))
