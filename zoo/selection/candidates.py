"""Candidates: every stitch that selection can choose from, with its cost and its bucket.

Selectors only differ in how they choose; what they choose from is enumerated here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import floor, nan

from klas_zoo.chains import Chain, can_stitch
from klas_zoo.routes import Direction, Route, Seam

CostFunction = Callable[[Route], float]
Pair = tuple[str, str]
_BOTH: tuple[Direction, Direction] = ("up", "down")


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """What is chosen. The defaults are KLAS's own: 20 buckets, τ = 5 % (KLAS §3.4).

    Attributes:
        buckets: of equal width in cost, between the two anchors of a pair; with `both` half of them for each direction.
        tolerance: τ; a bucket keeps its best candidate and all within this share of its score.
        pairs: (smaller, larger) anchors to stitch, instead of those the selector would choose.
        selector: a name of `klas_zoo.selection.selectors.SELECTORS`.
        direction: `up` stitches from the smaller anchor to the larger one, as KLAS does; `down` the other way,
            `both` gives each direction buckets of its own (SN-Netv2, ECCV 2024, calls this two-way stitching): scores
            of stitches that end in different anchors do not compare.
        most: keep the best so many of each bucket, whatever τ says, and cover no target blocks, so
            that two selectors keep equally many. None: the rule of τ. Rules (`snnet`, `all`) keep theirs.
        seed: of the selectors that draw.
    """

    buckets: int = 20
    tolerance: float = 0.05
    pairs: tuple[Pair, ...] | None = None
    selector: str = "klas"
    direction: Direction = "up"
    most: int | None = None
    seed: int = 0

    @property
    def buckets_each(self) -> int:
        """Buckets of one direction."""
        return (self.buckets + 1) // 2 if self.direction == "both" else self.buckets


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One possible stitch and every number that decided about it.

    Attributes:
        cost: of the whole route, in multiply-adds, or ms where selection goes by latency.
        bucket: of its direction, 0-based, from the smaller anchor's cost to the larger one's.
        score: lower is better, its unit is the selector's; None where a rule chose without one.
        terms: what the score was computed from, by name.
        reason: `best` of its bucket, `tied` within τ, `kept` among the best so many, `covers` a target
            block that no other selected stitch enters, or a rule's own word; empty when not selected.
    """

    route: Route
    source: str
    i: int
    target: str
    j: int
    cost: float
    bucket: int
    score: float | None = None
    terms: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""

    @property
    def seam(self) -> Seam:
        return Seam(self.source, self.i, self.target, self.j)

    @property
    def mismatch(self) -> float:
        """Θ(P_i, P_j), the numerator of Γ, in nats; NaN where no probe was asked."""
        return self.terms.get("mismatch", nan)

    @property
    def capacity(self) -> float:
        """Θ(P_j, P_{j+1}) inside the target, the denominator of Γ, in nats; NaN where no probe was asked."""
        return self.terms.get("capacity", nan)


def candidates_of(
    chains: dict[str, Chain], pair: Pair, cost: CostFunction, buckets: int, direction: Direction = "up"
) -> list[Candidate]:
    """All stitches of a (smaller, larger) pair, 1 ≤ j, that cost more than the one and less than the other.

    j = 0, which replaces only the target's stem, is left out: Γ has no probe there.
    """
    if direction == "both":
        return [one for way in _BOTH for one in candidates_of(chains, pair, cost, buckets, way)]
    source, target = pair if direction == "up" else pair[::-1]
    low, high = anchor_costs(chains, pair, cost)
    places = (
        Seam(source, i, target, j)
        for i in range(1, chains[source].depth + 1)
        for j in range(1, chains[target].depth)
        if can_stitch(chains[source], i, chains[target], j)
    )
    return [one for one in to_candidates(chains, places, cost, buckets) if low < one.cost < high]


def to_candidates(chains: dict[str, Chain], seams: Iterable[Seam], cost: CostFunction, buckets: int) -> list[Candidate]:
    """A candidate for every seam; one that costs no more than the smaller anchor, or no less than the larger
    one, belongs to the first or last bucket."""
    ends: dict[Pair, tuple[float, float]] = {}
    found = []
    for seam in seams:
        pair = (seam.source, seam.target)
        if pair not in ends:
            ends[pair] = anchor_costs(chains, pair, cost)
        low, high = sorted(ends[pair])
        route = Route.stitch(seam.source, seam.i, seam.target, seam.j, chains[seam.target].depth)
        price = cost(route)
        share = floor(buckets * (price - low) / (high - low))
        found.append(
            Candidate(
                route=route, source=seam.source, i=seam.i, target=seam.target, j=seam.j, cost=price,
                bucket=min(max(share, 0), buckets - 1),
            )
        )  # fmt: skip
    return found


def anchor_costs(chains: dict[str, Chain], pair: Pair, cost: CostFunction) -> tuple[float, float]:
    """Of the two anchors, whole."""
    low, high = (cost(Route.anchor(name, chains[name].depth)) for name in pair)
    return low, high
