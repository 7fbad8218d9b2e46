"""Thresholds of cascades, fitted on held-out images, and what cascades are worth on test images.

Everything is computed from the logits of static routes. A threshold is fitted to a share of images that shall go on:
it is that quantile of the confidences of held-out images which reach the stage. Test images never decide anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from klas_zoo.cascades.calibration import calibration_error, confidence, fit_temperature
from klas_zoo.cascades.definition import Cascade, CascadeCost, Measure, Stage
from klas_zoo.cascades.outputs import RouteOutputs
from klas_zoo.cascades.records import Interval, Outcome
from klas_zoo.confidence import lower_share, upper_share
from klas_zoo.errors import DataError
from klas_zoo.routes import Route

LEVEL = 0.95
"""Of the confidence intervals."""
MOST_OFF = 0.05
"""By how much the true share of images that go on may differ from the one a threshold was fitted to, 0..1."""
_DIGITS = 4
SharedBlocks = Callable[[Route, Route], int]
"""How many blocks a stage may share with the one before."""


def images_needed(level: float = LEVEL, most_off: float = MOST_OFF) -> int:
    """How many held-out images have to reach a stage so that its threshold can be fitted.

    With so many the true share of images below a fitted quantile is within `most_off` of the wanted one, at that
    level, whatever the share is (normal approximation, at a share of one half).
    """
    from statistics import NormalDist

    return math.ceil((NormalDist().inv_cdf((1 + level) / 2) / most_off) ** 2 / 4)


def refuse_too_few(images: int) -> None:
    """
    Raises:
        DataError: so many held-out images are too few for any threshold; the message says how many are needed.
    """
    needed = images_needed()
    if images < needed:
        raise DataError(
            f"{images} held-out images are too few to fit a threshold: {needed} are needed so that the share of images "
            f"that go on is within {100 * MOST_OFF:g} points of the one asked for."
        )


@dataclass(frozen=True, kw_only=True)
class FittedCascade:
    """A cascade whose thresholds were fitted, and what became of the held-out images.

    `heldout.escalated_intervals` are the shares to expect in use; an observed share that is not compatible with them
    says that images are others than those held out.
    """

    cascade: Cascade
    cost: CascadeCost
    heldout: Outcome

    @property
    def mean_cost(self) -> float:
        """Over the held-out images."""
        return self.cost.mean(self.heldout.shares)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Temperature of a route, and its expected calibration error, 0..1, before and after scaling."""

    temperature: float
    error_before: float
    error_after: float


def temperatures_of(heldout: RouteOutputs) -> dict[Route, float]:
    """The fitted temperature of every route.

    Raises:
        DataError: there are too few held-out images.
    """
    refuse_too_few(len(heldout))
    return {route: fit_temperature(logits, heldout.labels) for route, logits in heldout.logits.items()}


def calibrations(temperatures: Mapping[Route, float], test: RouteOutputs) -> dict[Route, Calibration]:
    """How well routes are calibrated on test images."""
    return {
        route: Calibration(
            temperature=temperature,
            error_before=calibration_error(test.logits[route], test.labels),
            error_after=calibration_error(test.logits[route], test.labels, temperature),
        )
        for route, temperature in temperatures.items()
    }


def exits_of(cascade: Cascade, logits: Mapping[Route, np.ndarray]) -> np.ndarray:
    """The stage, from 0, that answers each image, (N,)."""
    count = len(logits[cascade.stages[0].route])
    exits = np.zeros(count, dtype=np.int64)
    left = np.arange(count)
    for stage in cascade.stages[:-1]:
        sure = confidence(logits[stage.route][left], cascade.measure, stage.temperature) >= (stage.threshold or 0.0)
        left = left[~sure]
        exits[left] += 1
    return exits


def outcome(cascade: Cascade, outputs: RouteOutputs) -> Outcome:
    """What becomes of images in a cascade, from the logits of its routes."""
    exits = exits_of(cascade, outputs.logits)
    answers = np.stack([outputs.logits[route].argmax(1) for route in cascade.routes])
    right = int((answers[exits, np.arange(len(exits))] == outputs.labels).sum())
    return outcome_of(exits, right, len(cascade.stages))


def outcome_of(exits: np.ndarray, right: int, stages: int) -> Outcome:
    """
    Args:
        exits: (N,) the stage that answered each image.
        right: how many answers are.
    """
    count = len(exits)
    passed = [int((exits > stage).sum()) for stage in range(stages - 1)]
    answered = np.bincount(exits, minlength=stages)
    low, high = interval(right, count)
    return Outcome(
        images=count,
        shares=tuple(float(one) / count for one in answered),
        escalated=tuple(one / count for one in passed),
        escalated_intervals=tuple(interval(one, count) for one in passed),
        top1=100 * right / count,
        top1_interval=(100 * low, 100 * high),
    )


def interval(successes: int, trials: int) -> Interval:
    """Two-sided, of a share 0..1, at `LEVEL`."""
    level = (1 + LEVEL) / 2
    return lower_share(successes, trials, level), upper_share(successes, trials, level)


def fit_thresholds(
    stages: Sequence[Stage], shares: Sequence[float], heldout: RouteOutputs, measure: Measure = "probability"
) -> Cascade:
    """A cascade whose stages pass on given shares of the images that reach them.

    Args:
        stages: with their temperatures; thresholds are replaced.
        shares: 0..1, for every stage but the last.

    Raises:
        DataError: fewer held-out images reach a stage than are needed; says how many.
        ValueError: the stages are no cascade, or another number of shares.
    """
    found: list[Stage] = []
    left = np.arange(len(heldout))
    for stage, share in zip(stages[:-1], shares, strict=True):
        refuse_too_few(len(left))
        sure = confidence(heldout.logits[stage.route][left], measure, stage.temperature)
        found.append(replace(stage, threshold=threshold_at(sure, share)))
        left = left[sure < (found[-1].threshold or 0.0)]
    return Cascade(stages=(*found, replace(stages[-1], threshold=None)), measure=measure)


def threshold_at(confidences: np.ndarray, share: float) -> float:
    """The threshold, to four decimals, below which about that share of confidences lies."""
    return float(np.clip(round(float(np.quantile(confidences, share)), _DIGITS), 0.0, 1.0))
