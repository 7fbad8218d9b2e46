"""Routes: what is executed for one input, as a list of segments of chains.

A segment is a run of blocks of one anchor; a route is segments one after another. The
first segment brings its anchor's stem, the last one its anchor's head, and between two
segments stands a stitching layer. MACs, latency, weights, execution and export are all
sums or concatenations over segments, so a route of more than one seam needs no new code.

Blocks are counted from 1, as in the papers: the stitch (i, j) of KLAS runs blocks 1..i of
the source, then blocks j+1..n of the target. Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

Direction = Literal["up", "down", "both"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
"""Of stitches: from the smaller anchor to the larger one, the other way, or both."""


@dataclass(frozen=True, order=True)
class Segment:
    """Blocks `first`..`last` of `anchor`, both included, counted from 1."""

    anchor: str
    first: int
    last: int

    def __post_init__(self) -> None:
        if not self.anchor or not 1 <= self.first <= self.last:
            raise ValueError(f"a segment names its anchor and runs forward from block 1 or later, not {self}")

    def __str__(self) -> str:
        return f"{self.anchor}.{self.first}-{self.last}"


@dataclass(frozen=True, order=True)
class Seam:
    """Where a stitching layer sits: after block `i` of `source`, before block `j` + 1 of `target`."""

    source: str
    i: int
    target: str
    j: int

    def __str__(self) -> str:
        return f"{self.source}.{self.i}+{self.target}.{self.j}"


@dataclass(frozen=True, order=True)
class Route:
    """Segments in the order of their execution.

    `str(route)` is its name everywhere a person or a file name meets it: an anchor's own
    name, or `tiny.1-3+base.6-8` for a stitch of tiny's blocks 1..3 and base's 6..8.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError("a route has at least one segment")
        if self.segments[0].first != 1:
            raise ValueError(f"a route starts with the first block of an anchor, not {self.segments[0]}")

    @classmethod
    def anchor(cls, name: str, depth: int) -> Route:
        """The whole anchor."""
        return cls((Segment(name, 1, depth),))

    @classmethod
    def stitch(cls, source: str, i: int, target: str, j: int, depth: int) -> Route:
        """KLAS's stitch (i, j): `depth` is the target's number of blocks; 0 ≤ j < depth."""
        return cls((Segment(source, 1, i), Segment(target, j + 1, depth)))

    @property
    def is_anchor(self) -> bool:
        return len(self.segments) == 1

    @property
    def seams(self) -> tuple[Seam, ...]:
        """The stitching layers, in order; empty for an anchor."""
        return tuple(
            Seam(before.anchor, before.last, after.anchor, after.first - 1)
            for before, after in pairwise(self.segments)
        )

    def __str__(self) -> str:
        return self.segments[0].anchor if self.is_anchor else "+".join(map(str, self.segments))

    def to_json(self) -> list[list[str | int]]:
        """`[["tiny", 1, 3], ["base", 6, 8]]`."""
        return [[s.anchor, s.first, s.last] for s in self.segments]

    @classmethod
    def from_json(cls, segments: list[list[str | int]]) -> Route:
        return cls(tuple(Segment(str(a), int(first), int(last)) for a, first, last in segments))
