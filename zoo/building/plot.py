"""The frontier of a build as a picture: accuracy against latency, measured, or predicted where nothing was."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from klas_zoo.building.engines import RouteResult
from klas_zoo.building.job import BuildResult
from klas_zoo.frontier import frontier
from klas_zoo.page.pictures import (
    COLOURS,
    MUTED,
    add_legend,
    draw_intervals,
    name_mark,
    new_picture,
    save_picture,
    scale_costs,
    top1_interval,
)

_PARTS = 24  # of a straight line


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One network on the picture; top-1 in per cent, latency in ms."""

    name: str
    latency_ms: float
    top1: float
    is_anchor: bool


def draw(result: BuildResult, path: Path) -> None:
    """Writes a PNG of the routes with a latency; see `picture_of`."""
    timed = [one for one in result.results if one.latencies]
    timed = timed or [one for one in result.results if one.predicted_ms is not None]
    marks = [_mark(one) for one in timed]
    loud = "RANDOM WEIGHTS — " if result.family.weights == "random" else ""
    figure = picture_of(
        marks, title=f"{loud}{result.family.name} on {result.record.device}", subtitle=result.record.hardware,
        axis=f"latency, ms per batch of {_measured_on(timed, result)}", images=len(result.data.test),
    )  # fmt: skip
    save_picture(figure, path)


def picture_of(marks: Sequence[Mark], *, title: str, subtitle: str, axis: str, images: int) -> Figure:
    """Anchors, stitches, those of them below the straight lines between anchors, and the frontier.

    Args:
        axis: what latencies are.
        images: on how many images accuracies were counted.
    """
    figure, axes = new_picture(title, subtitle, describe(marks))
    scale_costs(axes, [one.latency_ms for one in marks])
    anchors = sorted((one for one in marks if one.is_anchor), key=lambda one: one.latency_ms)
    above, below = _sides(marks, anchors)
    _steps(axes, marks)
    axes.plot(*_between(anchors), color=MUTED, linestyle=":", zorder=2, label="straight lines between anchors")
    axes.scatter(*_places(above), color=COLOURS[0], s=42, zorder=4, label="stitches")
    axes.scatter(
        *_places(below), facecolors="white", edgecolors=COLOURS[0], linewidths=1.4, s=42, zorder=3,
        label="stitches below a line",
    )
    axes.scatter(
        *_places(anchors), color=COLOURS[1], marker="*", s=230, edgecolors="white", linewidths=0.8, zorder=5,
        label="anchors",
    )
    for some, colour in ((anchors, COLOURS[1]), ([*above, *below], COLOURS[0])):
        draw_intervals(axes, *_places(some), [top1_interval(one.top1, images) for one in some], colour)
    axes.margins(x=0.06)
    for one in anchors:
        beaten = any(other.latency_ms <= one.latency_ms and other.top1 > one.top1 for other in marks)
        name_mark(axes, one.name, one.latency_ms, one.top1, beaten=beaten)
    axes.set_xlabel(axis)
    axes.set_ylabel(f"top-1, % of {images:,} test images")
    add_legend(figure)
    return figure


def describe(marks: Sequence[Mark]) -> str:
    """What the picture shows, in plain language."""
    anchors = sorted((one for one in marks if one.is_anchor), key=lambda one: one.latency_ms)
    above, below = _sides(marks, anchors)
    best = frontier(marks, lambda one: one.latency_ms, lambda one: one.top1)
    stitches, on = len(above) + len(below), sum(not one.is_anchor for one in best)
    text = (
        "Each mark is a network: the higher, the more accurate; the further left, the faster. The stepped line is the "
        "best accuracy for each latency. "
    )
    if stitches:
        text += (
            f"{on} of {stitches} stitches {'is' if on == 1 else 'are'} on it"
            f"; {len(below)} {'lies' if len(below) == 1 else 'lie'} below the "
            "straight line between two anchors, where using each of the two for a part of the inputs is as good. "
        )
    return text + "Bars are 95 % confidence intervals over the test images."


def _sides(marks: Sequence[Mark], anchors: Sequence[Mark]) -> tuple[list[Mark], list[Mark]]:
    """Stitches at or above the straight lines between anchors of neighbouring latency, and those below."""
    stitches = [one for one in marks if not one.is_anchor]
    above = [one for one in stitches if one.top1 >= _line(anchors, one.latency_ms)]
    return above, [one for one in stitches if one not in above]


def _line(anchors: Sequence[Mark], latency_ms: float) -> float:
    """The best accuracy that anchors alone give at a latency, by using two of them in turns; 0 before the first."""
    best = 0.0
    reached = [one for one in anchors if one.latency_ms <= latency_ms]
    for one in reached:
        best = max(best, one.top1)
        for other in anchors:
            if other.latency_ms > latency_ms:
                share = (latency_ms - one.latency_ms) / (other.latency_ms - one.latency_ms)
                best = max(best, one.top1 + share * (other.top1 - one.top1))
    return best


def _between(anchors: Sequence[Mark]) -> tuple[list[float], list[float]]:
    """Points on the straight lines from anchor to anchor: enough of them for a logarithmic axis, where they bend."""
    places = [
        (one.latency_ms + share * (other.latency_ms - one.latency_ms), one.top1 + share * (other.top1 - one.top1))
        for one, other in pairwise(anchors)
        for share in (part / _PARTS for part in range(_PARTS + 1))
    ]
    return [x for x, _ in places], [y for _, y in places]


def _steps(axes: Axes, marks: Sequence[Mark]) -> None:
    best = frontier(marks, lambda one: one.latency_ms, lambda one: one.top1)
    end = max(one.latency_ms for one in marks)
    x = [*(one.latency_ms for one in best), end]
    y = [*(one.top1 for one in best), best[-1].top1]
    axes.step(x, y, where="post", color=COLOURS[0], linewidth=1.6, zorder=2, label="frontier")
    axes.fill_between(x, y, min(one.top1 for one in marks), step="post", color=COLOURS[0], alpha=0.09, zorder=0)


def _mark(one: RouteResult) -> Mark:
    assert one.latency_ms is not None
    return Mark(name=str(one.route), latency_ms=one.latency_ms, top1=one.top1, is_anchor=one.route.is_anchor)


def _measured_on(timed: list[RouteResult], result: BuildResult) -> str:
    """`1 (p50, onnxruntime 1.31, 2 threads)`, or what it was predicted by."""
    if timed[0].latencies:
        first = timed[0].latencies[0]
        threads = {0: "", 1: ", 1 thread"}.get(first.threads, f", {first.threads} threads")
        return f"{first.batch} (p50, {first.runtime} {first.runtime_version}{threads})"
    assert result.costs is not None
    return f"{result.costs.profile.batch} (p50, PREDICTED: {timed[0].predicted_by})"


def _places(marks: Sequence[Mark]) -> tuple[list[float], list[float]]:
    return [one.latency_ms for one in marks], [one.top1 for one in marks]
