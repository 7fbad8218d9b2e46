"""What the pictures of frontiers share: layout, colours, confidence intervals, and a sentence on what is shown."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from klas_zoo.confidence import share_interval
from klas_zoo.files import replacing

LEVEL = 0.95
"""Of the confidence intervals."""
# Okabe and Ito's colours, which people with any colour vision tell apart; the yellow is darkened for white paper
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#8a6d00", "#4d4d4d")
INK, MUTED = "#1b2733", "#5b6875"
_WIDTH = 118  # characters of a line above the axes
_WIDE = 8  # largest over smallest cost from which on an axis is logarithmic


def new_picture(title: str, subtitle: str, sentence: str) -> tuple[Figure, Axes]:
    """A figure on white; above it a title, on what it was measured, and what it shows, however long these are."""
    figure = Figure(figsize=(9.5, 6.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    above = f"{textwrap.fill(literal(subtitle), _WIDTH)}\n{textwrap.fill(sentence, _WIDTH)}"
    axes.set_title(above, fontsize=9, color=INK, loc="left", linespacing=1.35)
    figure.suptitle(textwrap.fill(literal(title), 70), fontsize=13, color=INK, weight="bold", x=0.01, ha="left")
    axes.grid(color="#e8ecf0")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def add_legend(figure: Figure) -> None:
    """Below the axes."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    wrapped = [textwrap.fill(label, 36) for label in labels]
    figure.legend(handles, wrapped, loc="outside lower center", ncols=3, fontsize=9, frameon=False)


def save_picture(figure: Figure, path: Path) -> None:
    """Writes a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path.absolute()) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": "klas-zoo"})


def literal(name: str) -> str:
    """A name as matplotlib shows it as it is: it reads what is between dollars as mathematics, and hides labels that
    begin with an underscore."""
    escaped = name.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def top1_interval(top1: float, images: int) -> tuple[float, float]:
    """The two-sided confidence interval of a top-1, all in per cent, by Clopper and Pearson (1934)."""
    low, high = share_interval(round(top1 * images / 100), images, LEVEL)
    return 100 * low, 100 * high


def draw_intervals(axes: Axes, x: Sequence[float], y: Sequence[float], intervals: Sequence[Any], colour: str) -> None:
    """Pale bars from the lower to the upper bound; None where there is no interval."""
    for cost, value, interval in zip(x, y, intervals, strict=True):
        if interval is not None:
            reach = [[max(0.0, value - interval[0])], [max(0.0, interval[1] - value)]]
            axes.errorbar(
                [cost], [value], yerr=reach, fmt="none", ecolor=colour, elinewidth=1, capsize=2.5, alpha=0.45, zorder=2
            )


def scale_costs(axes: Axes, costs: Sequence[float]) -> None:
    """A logarithmic axis where costs span much, with numbers written out."""
    if costs and max(costs) > _WIDE * min(costs):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())  # 0.6, not 6×10⁻¹
        axes.xaxis.set_minor_formatter(NullFormatter())


def name_mark(axes: Axes, name: str, x: float, y: float, *, beaten: bool = False) -> None:
    """A name beside a mark, on the side of it where there is room.

    Args:
        beaten: whether something faster is more accurate: then its line passes above the mark.
    """
    low, high = axes.get_xlim()
    place = axes.transLimits.transform(axes.transScale.transform((x, y)))[0]
    left = place > 0.75 and high > low
    above = left and not beaten
    axes.annotate(
        textwrap.fill(literal(name), 24), (x, y), textcoords="offset points",
        xytext=(-8 if left else 9, 5 if above else -4),
        ha="right" if left else "left", va="bottom" if above else "top", fontsize=9, weight="bold", color=INK, zorder=6,
    )  # fmt: skip
