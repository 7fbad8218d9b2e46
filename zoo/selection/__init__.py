"""Selection: which of the O(k²n²) stitches are worth having (KLAS §3.3 and §3.4).

    candidates + measurements → a selector → marked candidates

The paper's own selector, `klas`, is the default:

    Γ(i, j) = Θ(P_i of source, P_j of target) / Θ(P_j of target, P_{j+1} of target)

The numerator is how far the stitching layer must move the representation, the
denominator how much the first target block after the seam changes it: its capacity to
absorb the mismatch. Lower is better. Candidates of a pair are sorted by cost into buckets
of equal width between the two anchors, and each bucket keeps its best and those within τ.

The public descriptions of KLAS leave two rules open; ours are `choose_pairs` (how many
pairs are stitched) and `scoring.cover_targets`.
"""

from __future__ import annotations

from dataclasses import dataclass

from klas_zoo.chains import Chain
from klas_zoo.errors import SelectionError
from klas_zoo.routes import Route
from klas_zoo.selection.candidates import Candidate, CostFunction, Pair, SelectionSettings
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.pairs import choose_pairs, neighbours, stitchable_pairs
from klas_zoo.selection.scoring import SelectionProblem, Selector
from klas_zoo.selection.selectors import find_selector


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was chosen, out of what, and between which anchors. `unit` is that of the candidates' costs."""

    settings: SelectionSettings
    pairs: tuple[Pair, ...]
    candidates: tuple[Candidate, ...]
    unit: str = "multiply-adds"

    @property
    def chosen(self) -> tuple[Candidate, ...]:
        return tuple(c for c in self.candidates if c.reason)

    @property
    def routes(self) -> tuple[Route, ...]:
        return tuple(c.route for c in self.chosen)

    @property
    def empty_buckets(self) -> dict[Pair, tuple[int, ...]]:
        """Buckets of each source and target that hold no candidate; pairs without any are left out."""
        ways = [pair for pair in self.pairs if self.settings.direction != "down"]
        ways += [pair[::-1] for pair in self.pairs if self.settings.direction != "up"]
        held = {way: {c.bucket for c in self.candidates if (c.source, c.target) == way} for way in ways}
        empty = {way: tuple(b for b in range(self.settings.buckets_each) if b not in held[way]) for way in ways}
        return {pair: buckets for pair, buckets in empty.items() if buckets}

    def remarks(self) -> list[str]:
        """A sentence for each pair and direction with cost buckets that hold no candidate."""
        return [
            f"{source} → {target}: {len(empty)} of {self.settings.buckets_each} cost buckets hold no candidate "
            f"({', '.join(map(str, empty))})."
            for (source, target), empty in self.empty_buckets.items()
        ]


def pairs_of(
    selector: Selector,
    chains: dict[str, Chain],
    measured: Measurements,
    cost: CostFunction,
    settings: SelectionSettings,
    *,
    unit: str = "multiply-adds",
) -> tuple[Pair, ...]:
    """The pairs a selector stitches: those the settings name, or its own.

    Raises:
        SelectionError: see `select`.
    """
    stitchable = stitchable_pairs(chains, cost, settings, unit=unit)
    if settings.pairs is not None or selector.pairs == "every":
        return stitchable
    if selector.pairs == "neighbours":
        return neighbours(list(chains), stitchable)
    distances = measured.output_distances()
    return choose_pairs(list(chains), {pair: distances[pair] for pair in stitchable})


def select(
    chains: dict[str, Chain], measured: Measurements, cost: CostFunction, settings: SelectionSettings,
    *, unit: str = "multiply-adds",
) -> Selection:  # fmt: skip
    """Chooses stitches for a family. Runs no network.

    Args:
        chains: anchors ordered from small to large.
        measured: at least what `find_selector(settings.selector).asks_for(settings)` names.
        cost: multiply-adds of a route, or anything else to spread the stitches over, in `unit`.

    Raises:
        SelectionError: no pair of anchors has a seam, a wanted pair is not ordered by cost, no
            stitch lies between its anchors in cost, or something needed was not measured.
        UnknownName: a wanted pair names no anchor of the family, or the selector is unknown.
    """
    selector = find_selector(settings.selector)
    pairs = pairs_of(selector, chains, measured, cost, settings, unit=unit)
    problem = SelectionProblem(chains=chains, pairs=pairs, cost=cost, settings=settings)
    candidates = selector.choose(problem, measured)
    if not candidates:
        raise SelectionError(
            f"No stitch of {' or '.join(map(' → '.join, pairs))} costs more than the one and less than the other: "
            "the anchors are too close in cost."
        )
    return Selection(settings=settings, pairs=pairs, candidates=tuple(candidates), unit=unit)
