"""KLAS selection: which of the O(k²n²) stitches are worth having (KLAS §3.3 and §3.4).

    Γ(i, j) = Θ(P_i of source, P_j of target) / Θ(P_j of target, P_{j+1} of target)

The numerator is how far the stitching layer must move the representation, the
denominator how much the first target block after the seam changes it: its capacity to
absorb the mismatch. Lower is better. Candidates of a pair are sorted by cost into buckets
of equal width between the two anchors, and each bucket keeps its best and those within τ.

The public descriptions of KLAS leave two rules open; ours are `choose_pairs` (how many
pairs are stitched) and the coverage step in `select`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from math import inf

from klas_zoo.chains import Chain, can_stitch, mismatch
from klas_zoo.errors import SelectionError, UnknownName
from klas_zoo.routes import Route
from klas_zoo.similarity import Similarities

Cost = Callable[[Route], float]
# Θ between neighbouring blocks below this, in nats, is noise of the estimate, not capacity
LEAST_CAPACITY = 1e-4


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """KLAS's own values: 20 buckets, τ = 5 %. `pairs` overrides the choice of anchor pairs."""

    buckets: int = 20
    tolerance: float = 0.05
    pairs: tuple[tuple[str, str], ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One possible stitch and every number that decided about it.

    Attributes:
        mismatch: Θ(P_i, P_j), the numerator of Γ, in nats.
        capacity: Θ(P_j, P_{j+1}) inside the target, its denominator, in nats.
        score: Γ, without a unit.
        cost: multiply-adds of the whole route.
        bucket: 0-based, from the source's cost to the target's.
        reason: `best` of its bucket, `tied` within τ, `covers` a target block that no other
            selected stitch enters; empty when not selected.
    """

    route: Route
    source: str
    i: int
    target: str
    j: int
    mismatch: float
    capacity: float
    score: float
    cost: float
    bucket: int
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was chosen, out of what, and between which anchors."""

    settings: SelectionSettings
    pairs: tuple[tuple[str, str], ...]
    candidates: tuple[Candidate, ...]

    @property
    def chosen(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if c.reason)

    @property
    def routes(self) -> tuple[Route, ...]:
        return tuple(c.route for c in self.chosen)


def choose_pairs(
    names: Sequence[str], output_distance: Mapping[tuple[str, str], float]
) -> tuple[tuple[str, str], ...]:
    """The anchor pairs to stitch: from each anchor on the way to the dearer one whose output is nearest.

    The way starts at the cheapest anchor and ends at the dearest. The paper stitches the pairs whose
    outputs have the lowest Θ and does not say how many; this rule covers the whole range of cost once,
    and it is the plainest one that can give both published choices: Ti→B for Swin, which skips S, and
    Ti→S, S→B for DeiT.

    Args:
        names: anchors ordered from cheap to dear.
        output_distance: Θ between the final outputs of (cheaper, dearer), in nats, of the pairs that
            can be stitched; an anchor that can be stitched to no dearer one is followed by the next.
    """
    path = [names[0]]
    while path[-1] != names[-1]:
        dearer = names[names.index(path[-1]) + 1 :]
        path.append(min(dearer, key=lambda name: output_distance.get((path[-1], name), inf)))
    return tuple(pair for pair in pairwise(path) if pair in output_distance)


def stitchable_pairs(
    chains: dict[str, Chain], cost: Cost, settings: SelectionSettings
) -> tuple[tuple[str, str], ...]:
    """The pairs (cheaper, dearer) that share a resolution to stitch at; or those wanted, if they do.

    Costs no forward pass: a build asks before it spends time on probes.

    Raises:
        SelectionError: anchors are not ordered by cost, a wanted pair has no seam, or none has.
    """
    names = list(chains)
    whole = {name: cost(Route.anchor(name, chain.depth)) for name, chain in chains.items()}
    for cheap, dear in pairwise(names):
        if whole[cheap] >= whole[dear]:
            raise SelectionError(
                f"Anchors must be ordered from cheap to dear, but {cheap} costs {whole[cheap]:.4g} and "
                f"{dear} after it {whole[dear]:.4g} multiply-adds."
            )
    stitchable = tuple(pair for pair in combinations(names, 2) if _has_seam(chains, *pair))
    wanted = tuple(dict.fromkeys(settings.pairs)) if settings.pairs is not None else stitchable
    for pair in wanted:
        if pair not in stitchable:
            raise SelectionError(_why_not(chains, *pair))
    if not wanted:
        raise SelectionError(_why_not(chains, names[0], names[-1]))
    return wanted


def select(
    chains: dict[str, Chain], similarities: Similarities, cost: Cost, settings: SelectionSettings
) -> Selection:
    """Chooses stitches for a family.

    Args:
        chains: anchors ordered from cheap to dear.
        cost: multiply-adds of a route, or anything else to spread the stitches over.

    Raises:
        SelectionError: no pair of anchors has a seam, a wanted pair is not ordered by cost, or no
            stitch lies between its anchors in cost.
        UnknownName: a wanted pair names no anchor of the family.
    """
    stitchable = stitchable_pairs(chains, cost, settings)
    if settings.pairs is not None:
        pairs = stitchable
    else:
        pairs = choose_pairs(list(chains), {pair: similarities.of_outputs(*pair) for pair in stitchable})
    candidates = [c for pair in pairs for c in _select_pair(chains, similarities, cost, settings, pair)]
    if not candidates:
        raise SelectionError(
            f"No stitch of {' or '.join(map(' → '.join, pairs))} costs more than its source and less than its "
            "target: the anchors are too close in cost."
        )
    return Selection(settings=settings, pairs=pairs, candidates=tuple(candidates))


def _select_pair(
    chains: dict[str, Chain],
    similarities: Similarities,
    cost: Cost,
    settings: SelectionSettings,
    pair: tuple[str, str],
) -> list[Candidate]:
    """All candidates of one pair that cost more than the source and less than the target."""
    source, target = pair
    low, high = (cost(Route.anchor(name, chains[name].depth)) for name in pair)
    found = []
    for i in range(1, chains[source].depth + 1):
        for j in range(1, chains[target].depth):
            if not can_stitch(chains[source], i, chains[target], j):
                continue
            route = Route.stitch(source, i, target, j, chains[target].depth)
            price = cost(route)
            if low < price < high:
                bucket = min(int(settings.buckets * (price - low) / (high - low)), settings.buckets - 1)
                found.append(_score(similarities, route, source, i, target, j, price, bucket))
    best_in = {b: min(c.score for c in found if c.bucket == b) for b in {c.bucket for c in found}}
    marked = [_mark(c, best_in[c.bucket], settings.tolerance) for c in found]
    return _cover_targets(marked)


def _score(
    similarities: Similarities, route: Route, source: str, i: int, target: str, j: int, cost: float, bucket: int
) -> Candidate:
    """Γ of one stitch (KLAS Eq. 2), with a guard against a target block that changes nothing."""
    mismatch = similarities.theta(source, i, target, j)
    capacity = similarities.theta(target, j, target, j + 1)
    score = max(mismatch, 0.0) / max(capacity, LEAST_CAPACITY)
    return Candidate(
        route=route, source=source, i=i, target=target, j=j, mismatch=mismatch, capacity=capacity,
        score=score, cost=cost, bucket=bucket,
    )  # fmt: skip


def _mark(candidate: Candidate, best: float, tolerance: float) -> Candidate:
    if candidate.score == best:
        return replace(candidate, reason="best")
    return replace(candidate, reason="tied") if candidate.score <= (1 + tolerance) * best else candidate


def _cover_targets(candidates: list[Candidate]) -> list[Candidate]:
    """Every target block that can be entered gets at least one stitch: its candidate of lowest Γ."""
    entered = {c.j for c in candidates if c.reason}
    result = list(candidates)
    for j in {c.j for c in candidates} - entered:
        best = min((c for c in candidates if c.j == j), key=lambda c: c.score)
        result[candidates.index(best)] = replace(best, reason="covers")
    return result


def _has_seam(chains: dict[str, Chain], source: str, target: str) -> bool:
    return any(
        can_stitch(chains[source], i, chains[target], j)
        for i in range(1, chains[source].depth + 1)
        for j in range(1, chains[target].depth)
    )


def _why_not(chains: dict[str, Chain], source: str, target: str) -> str:
    order = list(chains)
    for name in (source, target):
        if name not in order:
            raise UnknownName("anchor", name, order)
    if source == target:
        return f"A stitch joins two anchors, not {source} and itself."
    if order.index(source) > order.index(target):
        return f"Stitches run from the cheaper anchor to the dearer one: ask for {target}:{source}."
    last = [chains[name].layouts[-1] for name in (source, target)]
    if last[0].prefix != last[1].prefix:
        return f"Anchors {source} and {target} cannot be stitched: {mismatch(*last)}."
    found = [sorted({str(shape) for shape in chains[name].shapes[1:]}) for name in (source, target)]
    return (
        f"Anchors {source} and {target} have no common resolution to stitch at: "
        f"{source} has features {', '.join(found[0])}, {target} has {', '.join(found[1])}."
    )
