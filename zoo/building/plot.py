"""The frontier as a picture: accuracy against latency, measured, or predicted where nothing was."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from klas_zoo.building.engines import RouteResult
from klas_zoo.building.job import BuildResult
from klas_zoo.frontier import frontier


def draw(result: BuildResult, path: Path) -> None:
    """Writes a PNG with anchors, stitches, the frontier between them and the area under it."""
    figure = Figure(figsize=(8.5, 5.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    timed = [one for one in result.results if one.latencies]
    timed = timed or [one for one in result.results if one.predicted_ms is not None]
    anchors = [one for one in timed if one.route.is_anchor]
    _steps(axes, timed, anchors)
    stitches = [one for one in timed if not one.route.is_anchor]
    axes.scatter(*_points(stitches), color="tab:blue", zorder=3, label="stitches")
    axes.plot(*_points(anchors), color="tab:gray", linestyle=":", zorder=1, label="straight lines between anchors")
    axes.scatter(*_points(anchors), color="tab:orange", marker="*", s=220, zorder=4, label="anchors")
    for one in anchors:
        x, y = _latency(one), one.top1
        axes.annotate(str(one.route), (x, y), textcoords="offset points", xytext=(9, -13), weight="bold")
    axes.set_xlabel(f"latency, ms per batch of {_measured_on(timed, result)}")
    axes.set_ylabel(f"top-1, % of {len(result.data.test):,} test images")
    loud = "RANDOM WEIGHTS — " if result.family.weights == "random" else ""
    axes.set_title(f"{loud}{result.family.name} on {result.record.device}: {result.record.hardware}", fontsize=10)
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, format="png", metadata={"Software": "klas-zoo"})


def _steps(axes: Axes, timed: list[RouteResult], anchors: list[RouteResult]) -> None:
    best = frontier(timed, _latency, lambda one: one.top1)
    end = max(_latency(one) for one in anchors) if anchors else _latency(best[-1])
    x = [*(_latency(one) for one in best), max(end, _latency(best[-1]))]
    y = [*(one.top1 for one in best), best[-1].top1]
    floor = min(one.top1 for one in timed)
    axes.step(x, y, where="post", color="tab:blue", linewidth=1.5, zorder=2, label="frontier")
    axes.fill_between(x, y, floor, step="post", color="tab:blue", alpha=0.12, zorder=0, label="area")


def _measured_on(timed: list[RouteResult], result: BuildResult) -> str:
    """`1 (p50, onnxruntime 1.31, 2 threads)`, or what it was predicted by."""
    if timed[0].latencies:
        first = timed[0].latencies[0]
        return f"{first.batch} (p50, {first.runtime} {first.runtime_version}, {first.threads} threads)"
    assert result.costs is not None
    return f"{result.costs.profile.batch} (p50, PREDICTED: {timed[0].predicted_by})"


def _latency(one: RouteResult) -> float:
    assert one.latency_ms is not None
    return one.latency_ms


def _points(results: list[RouteResult]) -> tuple[list[float], list[float]]:
    return [_latency(one) for one in results], [one.top1 for one in results]
