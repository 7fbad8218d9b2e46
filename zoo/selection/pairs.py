"""Which anchors are stitched with which (KLAS §3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations, pairwise
from math import inf, log, prod

from klas_zoo.chains import Chain, can_stitch, mismatch
from klas_zoo.errors import SelectionError, UnknownName
from klas_zoo.routes import Route
from klas_zoo.selection.candidates import CostFunction, Pair, SelectionSettings


def choose_pairs(names: Sequence[str], output_distance: Mapping[Pair, float]) -> tuple[Pair, ...]:
    """The anchor pairs to stitch: from each anchor on the way to the larger one whose output is nearest.

    The way starts at the smallest anchor and ends at the largest. The paper stitches the pairs whose
    outputs have the lowest Θ and does not say how many; this rule covers the whole range of cost once,
    and it is the plainest one that can give both published choices: Ti→B for Swin, which skips S, and
    Ti→S, S→B for DeiT.

    Args:
        names: anchors ordered from small to large.
        output_distance: Θ between the final outputs of (smaller, larger), in nats, of the pairs that
            can be stitched; an anchor that can be stitched to no larger one is followed by the next.
    """
    path = [names[0]]
    while path[-1] != names[-1]:
        larger = names[names.index(path[-1]) + 1 :]
        path.append(min(larger, key=lambda name: output_distance.get((path[-1], name), inf)))
    return tuple(pair for pair in pairwise(path) if pair in output_distance)


def neighbours(names: Sequence[str], stitchable: Sequence[Pair]) -> tuple[Pair, ...]:
    """SN-Net's nearest stitching: only anchors next to each other in cost (SN-Net §3.3).

    Raises:
        SelectionError: no two neighbours can be stitched.
    """
    found = tuple(pair for pair in pairwise(names) if pair in stitchable)
    if not found:
        raise SelectionError(
            f"No two anchors next to each other in cost ({' < '.join(names)}) share a resolution to stitch at: "
            "name a pair that does."
        )
    return found


def stitchable_pairs(
    chains: dict[str, Chain], cost: CostFunction, settings: SelectionSettings, *, unit: str = "multiply-adds"
) -> tuple[Pair, ...]:
    """The pairs (smaller, larger) that share a resolution to stitch at; or those wanted, if they do.

    Costs no forward pass: a build asks before it spends time on probes.

    Raises:
        SelectionError: anchors are not ordered by cost, a wanted pair has no seam, or none has.
    """
    names = list(chains)
    whole = {name: cost(Route.anchor(name, chain.depth)) for name, chain in chains.items()}
    for small, large in pairwise(names):
        if whole[small] >= whole[large]:
            raise SelectionError(
                f"Anchors must be ordered from small to large, but {small} costs {whole[small]:.4g} and "
                f"{large} after it {whole[large]:.4g} {unit}."
            )
    stitchable = tuple(pair for pair in combinations(names, 2) if _has_seam(chains, *pair))
    wanted = tuple(dict.fromkeys(settings.pairs)) if settings.pairs is not None else stitchable
    for pair in wanted:
        if pair not in stitchable:
            raise SelectionError(_why_not(chains, *pair))
    if not wanted:
        raise SelectionError(_why_not(chains, names[0], names[-1]))
    return wanted


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
        return f"Stitches run from the smaller anchor to the larger one: ask for {target}:{source}."
    i, j = _nearest_miss(chains[source], chains[target])
    reason = mismatch(chains[source].layouts[i], chains[target].layouts[j])
    return (
        f"Anchors {source} and {target} cannot be stitched: nearest to a seam are {source} after block {i} and "
        f"{target} after block {j}, but {reason}. Choose anchors with a common grid and "
        "equal prefix tokens, or an image size at which they have one."
    )


def _nearest_miss(source: Chain, target: Chain) -> tuple[int, int]:
    """The positions (i, j) that come closest to a seam: equal prefix tokens first, then the nearest sizes of grids."""

    def distance(place: tuple[int, int]) -> tuple[int, float]:
        one, other = source.layouts[place[0]], target.layouts[place[1]]
        return abs(one.prefix - other.prefix), abs(log(prod(one.grid) / prod(other.grid)))

    places = [(i, j) for i in range(1, source.depth + 1) for j in range(1, max(target.depth, 2))]
    return min(places, key=distance)
