"""From a few measured networks to all routes: the model, its fit, which networks to measure, and its error.

A route's latency is a sum: stem of its first anchor, the blocks it runs, head of its last anchor,
and for every seam a fixed overhead and its multiply-adds. What a part costs is first guessed
from its multiply-adds and the bytes it moves, scaled so that the guesses of a whole anchor give what
the anchor was measured at. Then factors on these guesses, one for each stem, head and run of
alike blocks, and the two costs of a seam are fitted to all measurements. Factors are expected to be
about one (a Gaussian prior), so that few measurements suffice, and what none of them tells stays a
guess. Which stitches are measured is chosen so that they tell most about the others: each next
one is the one that leaves the smallest mean variance of all routes' relative errors (I-optimal
design, greedily; Chaloner and Verdinelli 1995).

The error is cross-validated: every measured stitch is predicted without its own measurement.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from klas_zoo.errors import ProfileError
from klas_zoo.profiles.profile import AnchorModel, LatencyModel, PredictionError
from klas_zoo.routes import Route

# how far from one a factor is expected to be, as a standard deviation; of stems and heads, where a
# little arithmetic takes long, nothing is known but the order of magnitude
BLOCK_DEVIATION, END_DEVIATION, SEAM_DEVIATION = 0.2, 2.0, 1.0
# of a seam without its products, as a share of the smallest anchor's mean block
FIXED_SEAM_SHARE = 0.05
# of a measured median, relative: what is left after the model is mostly not noise
NOISE = 0.005
MOST_STITCHES = 5


@dataclass(frozen=True, kw_only=True)
class AnchorShape:
    """What is known of an anchor without measuring it.

    Attributes:
        guesses: of stem, every block and head, in any unit: only their shares count.
        groups: for each block a number that alike blocks share (a stage).
        macs: of stem, every block and head.
    """

    guesses: tuple[float, ...]
    groups: tuple[int, ...]
    macs: tuple[int, ...]
    vectors: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.groups)


class _Design:
    """Routes as rows of milliseconds that factors multiply, once the anchors are measured."""

    def __init__(self, shapes: Mapping[str, AnchorShape], anchors_ms: Mapping[str, float]) -> None:
        self.shapes = shapes
        self.guessed = {name: _guess(shape, anchors_ms[name]) for name, shape in shapes.items()}
        self.names: list[tuple[str, ...]] = [
            key
            for name, shape in shapes.items()
            for key in ((name, "stem"), *((name, "blocks", str(g)) for g in sorted(set(shape.groups))), (name, "head"))
        ]
        self.names += [("seam", "fixed"), ("seam", "products")]
        self.index = {name: number for number, name in enumerate(self.names)}
        kinds = {"stem": END_DEVIATION, "head": END_DEVIATION, "blocks": BLOCK_DEVIATION}
        self.deviations = np.array([kinds.get(name[1], SEAM_DEVIATION) for name in self.names])
        smallest = min(anchors_ms, key=lambda name: anchors_ms[name])
        self.fixed_ms = FIXED_SEAM_SHARE * float(np.mean(self.guessed[smallest].block_ms))
        self.rates = {name: _ms_per_gmac(model) for name, model in self.guessed.items()}
        self.prior = self.model(np.ones(len(self.names)), _NOTHING_CHECKED)

    def row(self, route: Route) -> np.ndarray:
        """(factors,) milliseconds; their sum is the prior's prediction."""
        row = np.zeros(len(self.names))
        first, last = route.segments[0].anchor, route.segments[-1].anchor
        row[self.index[first, "stem"]] += self.guessed[first].stem_ms
        row[self.index[last, "head"]] += self.guessed[last].head_ms
        for segment in route.segments:
            shape, model = self.shapes[segment.anchor], self.guessed[segment.anchor]
            for k in range(segment.first - 1, segment.last):
                row[self.index[segment.anchor, "blocks", str(shape.groups[k])]] += model.block_ms[k]
        for seam in route.seams:
            row[self.index["seam", "fixed"]] += self.fixed_ms
            row[self.index["seam", "products"]] += self.rates[seam.target] * self.prior.seam_macs(seam) / 1e9
        return row

    def model(self, factors: np.ndarray, error: PredictionError) -> LatencyModel:
        def of(*name: str) -> float:
            return float(factors[self.index[name]])

        anchors = {
            name: replace(
                self.guessed[name],
                stem_ms=self.guessed[name].stem_ms * of(name, "stem"),
                head_ms=self.guessed[name].head_ms * of(name, "head"),
                block_ms=tuple(
                    ms * of(name, "blocks", str(group))
                    for ms, group in zip(self.guessed[name].block_ms, shape.groups, strict=True)
                ),
            )
            for name, shape in self.shapes.items()
        }
        return LatencyModel(
            anchors=anchors,
            seam_ms=self.fixed_ms * of("seam", "fixed"),
            seam_ms_per_gmac={name: rate * of("seam", "products") for name, rate in self.rates.items()},
            error=error,
        )


_NOTHING_CHECKED = PredictionError(
    checked=0, median_percent=0.0, p90_percent=0.0, largest_percent=0.0, method="nothing was checked"
)


def fit(shapes: Mapping[str, AnchorShape], measured_ms: Mapping[Route, float]) -> LatencyModel:
    """A model of every route of a family from measured medians, with its cross-validated error.

    Args:
        measured_ms: of every whole anchor, and of some stitches.

    Raises:
        ProfileError: an anchor was not measured.
    """
    design = _Design(shapes, _anchors_ms(shapes, measured_ms))
    whole = _solve(design, measured_ms)
    return design.model(whole, _cross_validated(design, measured_ms))


def choose_stitches(
    shapes: Mapping[str, AnchorShape], candidates: Sequence[Route], count: int = MOST_STITCHES
) -> list[Route]:
    """The stitches whose measurement tells most about all candidates, the most telling one first.

    Nothing has to be measured before: how much a measurement tells depends on the guesses alone.
    """
    design = _Design(shapes, {name: sum(shape.guesses) for name, shape in shapes.items()})
    anchors = [_relative(design, Route.anchor(name, shape.depth)) for name, shape in shapes.items()]
    rows = {route: _relative(design, route) for route in candidates}
    if not rows:
        return []
    targets = np.stack([*rows.values()])
    precision = np.diag(1 / design.deviations**2) + sum(np.outer(row, row) for row in anchors) / NOISE**2
    chosen: list[Route] = []
    for _ in range(min(count, len(rows))):
        covariance = np.linalg.inv(precision)

        def left(route: Route, covariance: np.ndarray = covariance) -> float:
            # Sherman and Morrison: how much one more measurement takes off the mean variance
            toward = covariance @ rows[route]
            return -float(np.mean((targets @ toward) ** 2)) / (NOISE**2 + float(rows[route] @ toward))

        best = min((route for route in rows if route not in chosen), key=lambda route: (left(route), str(route)))
        chosen.append(best)
        precision = precision + np.outer(rows[best], rows[best]) / NOISE**2
    return chosen


def errors_percent(model: LatencyModel, measured_ms: Mapping[Route, float]) -> dict[Route, float]:
    """How far a model is off each measurement, per cent; above zero where it predicts too much."""
    return {route: 100 * (model.predict_ms(route) / found - 1) for route, found in measured_ms.items()}


def summarise(errors: Sequence[float], method: str) -> PredictionError:
    """Of errors in per cent, their sizes."""
    sizes = np.abs(np.array(errors)) if len(errors) else np.zeros(1)
    return PredictionError(
        checked=len(errors),
        median_percent=float(np.median(sizes)),
        p90_percent=float(np.percentile(sizes, 90)),
        largest_percent=float(sizes.max()),
        method=method,
    )


def _solve(design: _Design, measured_ms: Mapping[Route, float]) -> np.ndarray:
    """Factors, (factors,): the most probable ones, none below zero."""
    rows = np.stack([design.row(route) / found for route, found in measured_ms.items()]) / NOISE
    wanted = np.full(len(measured_ms), 1 / NOISE)
    free = np.ones(len(design.names), bool)
    while True:
        matrix = np.concatenate([rows[:, free], np.diag(1 / design.deviations[free])])
        right = np.concatenate([wanted, 1 / design.deviations[free]])
        factors = np.zeros(len(design.names))
        factors[free] = np.linalg.lstsq(matrix, right, rcond=None)[0]
        if (factors >= 0).all():
            return factors
        # nothing takes less than no time: what would goes to zero, and the rest is fitted again
        free &= factors > 0


def _cross_validated(design: _Design, measured_ms: Mapping[Route, float]) -> PredictionError:
    errors = []
    for route, found in measured_ms.items():
        if route.is_anchor:
            continue
        others = {other: ms for other, ms in measured_ms.items() if other != route}
        model = design.model(_solve(design, others), _NOTHING_CHECKED)
        errors.append(100 * (model.predict_ms(route) / found - 1))
    return summarise(errors, "each measured stitch predicted from the other measurements")


def _relative(design: _Design, route: Route) -> np.ndarray:
    row = design.row(route)
    return np.asarray(row / row.sum())


def _guess(shape: AnchorShape, whole_ms: float) -> AnchorModel:
    scale = whole_ms / sum(shape.guesses)
    return AnchorModel(
        stem_ms=shape.guesses[0] * scale,
        block_ms=tuple(guess * scale for guess in shape.guesses[1:-1]),
        head_ms=shape.guesses[-1] * scale,
        stem_macs=shape.macs[0],
        block_macs=shape.macs[1:-1],
        head_macs=shape.macs[-1],
        vectors=shape.vectors,
        widths=shape.widths,
    )


def _ms_per_gmac(model: AnchorModel) -> float:
    return 1e9 * sum(model.block_ms) / max(sum(model.block_macs), 1)


def _anchors_ms(shapes: Mapping[str, AnchorShape], measured_ms: Mapping[Route, float]) -> dict[str, float]:
    found = {name: measured_ms.get(Route.anchor(name, shape.depth)) for name, shape in shapes.items()}
    for name, milliseconds in found.items():
        if milliseconds is None:
            raise ProfileError(f"The anchor {name} was not measured, and nothing can be predicted without it.")
    return {name: ms for name, ms in found.items() if ms is not None}
