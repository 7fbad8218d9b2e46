"""All engines of one machine as a picture: accuracy against latency."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from klas_zoo.page.pictures import (
    COLOURS,
    INK,
    add_legend,
    draw_intervals,
    literal,
    name_mark,
    new_picture,
    save_picture,
    scale_costs,
    top1_interval,
)
from klas_zoo.registry.overview import Overview, Point


def draw(found: Overview, path: Path) -> None:
    """Writes a PNG; see `picture_of`.

    Raises:
        OSError: the file cannot be written.
    """
    save_picture(picture_of(found), path)


def picture_of(found: Overview) -> Figure:
    """Plain networks, stitches, those of them that a plain network dominates, and the frontier."""
    families = sorted({one.family for one in found.points})
    named = families[0] if len(families) == 1 else f"{len(families)} families"
    figure, axes = new_picture(f"Engines of {named}", found.hardware, describe(found))
    scale_costs(axes, [one.latency_ms for one in found.points])
    best = [one for one in found.points if one.on_frontier]
    axes.step(*_places(best), where="post", color=INK, linewidth=1.3, zorder=2, label="frontier")
    for number, family in enumerate(families):
        own, colour = [one for one in found.points if one.family == family], COLOURS[number % len(COLOURS)]
        plain = [one for one in own if one.plain]
        stitches = [one for one in own if not one.plain and not one.dominated_by]
        dominated = [one for one in own if one.dominated_by]
        axes.scatter(*_places(plain), color=colour, marker="*", s=150, edgecolors="white", linewidths=0.6, zorder=5)
        axes.scatter(*_places(stitches), color=colour, s=26, zorder=4)
        axes.scatter(*_places(dominated), facecolors="white", edgecolors=colour, s=26, zorder=3)
        axes.scatter([], [], color=colour, s=60, label=literal(family))
        shown = [one for one in own if one.on_frontier and not one.claimed and one.images > 0]
        draw_intervals(axes, *_places(shown), [top1_interval(one.top1, one.images) for one in shown], colour)
    axes.margins(x=0.06)
    for one in best:
        if one.plain:
            name_mark(axes, one.route, one.latency_ms, one.top1)
    axes.set_xlabel(f"latency, ms per batch of {found.batch} ({found.percentile})")
    axes.set_ylabel("top-1, %")
    add_legend(figure)
    return figure


def describe(found: Overview) -> str:
    """What the picture shows, in plain language."""
    stitches = [one for one in found.points if not one.plain]
    dominated = sum(bool(one.dominated_by) for one in stitches)
    text = "Each mark is an engine: stars are networks as they are, dots are stitches"
    text += ", rings are stitches that a network as it is beats" if dominated else ""
    text += (
        f" ({dominated} of {len(stitches)} stitches). " if dominated else ". "
    ) + "The higher, the more accurate; the further left, the faster. The line is the best accuracy for each latency. "
    return text + "Bars are 95 % confidence intervals of the frontier's accuracies."


def _places(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [one.latency_ms for one in points], [one.top1 for one in points]
