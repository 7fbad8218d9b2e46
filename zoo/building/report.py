"""What a build has to show: a table of the frontier, a summary, a JSON record and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from klas_zoo.building.engines import EngineResult, RouteResult, is_verified
from klas_zoo.building.job import BuildResult
from klas_zoo.building.manifest import stage_json
from klas_zoo.building.registry_stages import preprocessing_json
from klas_zoo.files import replacing
from klas_zoo.frontier import above_the_line, area
from klas_zoo.progress.tables import Column, new_table
from klas_zoo.registry import Registry
from klas_zoo.selection.candidates import Candidate
from klas_zoo.selection.selectors import find_selector
from klas_zoo.units import format_latency, format_macs, format_size

SCHEMA_VERSION = 2
CostOf = Callable[[RouteResult], float]


def write_report(result: BuildResult, folder: Path, registry: Registry) -> list[Path]:
    """Writes `report.json`, `report.html`, `manifest.json` and `frontier.png`; gives their paths."""
    from klas_zoo.building.plot import draw
    from klas_zoo.page.contents import build_contents
    from klas_zoo.page.writing import write_page

    found = to_json(result)
    report, page, origin, picture = (
        folder / name for name in ("report.json", "report.html", "manifest.json", "frontier.png")
    )
    for target, content in ((report, found), (origin, manifest_json(result))):
        with replacing(target) as file:
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with replacing(picture) as file:
        draw(result, file)
    write_page(build_contents(registry, result.build_id, found), page)
    return [report, page, origin, picture]


def frontier_table(result: BuildResult, wide: bool = False) -> Table:
    """The routes on the frontier and the anchors, from small to large; one row for each engine."""
    title = f"Frontier of {result.family.name} on {result.record.device}"
    columns = [
        Column(heading=""), Column(heading="route", name=True), Column(heading="MACs", number=True, spare=True),
        Column(heading="untuned", number=True, spare=True), Column(heading="top-1", number=True),
        Column(heading="engine"), Column(heading="p50", number=True), Column(heading="p99", number=True, wide=True),
        Column(heading="size", number=True), Column(heading="max |Δ|", number=True, wide=True),
        Column(heading="agrees", number=True, spare=True),
    ]  # fmt: skip
    table = []
    for one in result.results:
        if one.wanted:
            mark = "*" if one.on_frontier else ""
            route = (mark, str(one.route), format_macs(one.cost.macs), f"{one.top1_before:.1f} %", f"{one.top1:.1f} %")
            rows = [_engine_cells(one, engine) for engine in one.engines] or [("", _latency_cell(one), *[""] * 4)]
            for number, cells in enumerate(rows):
                engine = one.engines[number] if one.engines else None
                style = "red" if engine and not engine.exists else "bold" if one.route.is_anchor else ""
                first = route if number == 0 else ("", "", "", "", _own_top1(engine))
                table.append(([*first, *cells], style))
    loud = " — RANDOM WEIGHTS" if result.family.weights == "random" else ""
    return new_table(
        title + loud, columns, table, wide=wide, caption="*: on the frontier of accuracy over multiply-adds"
    )


def _engine_cells(one: RouteResult, engine: EngineResult) -> tuple[str, ...]:
    """What it is, p50, p99, size, largest difference and agreement with torch."""
    checked = engine.verification
    latency = engine.latencies[0] if engine.latencies else None
    return (
        engine.precision if engine.runtime == "onnxruntime" else f"{engine.precision} {engine.runtime}",
        format_latency(latency.p50_ms) if latency else engine.status if not is_verified(engine) else _latency_cell(one),
        format_latency(latency.p99_ms) if latency else "",
        format_size(engine.size_bytes) if engine.exists else "",
        f"{checked.max_abs_difference:.1e}" if checked else "",
        f"{100 * checked.top1_agreement:.2f} %" if checked else "",
    )


def _own_top1(engine: EngineResult | None) -> str:
    known = engine.verification.top1 if engine and engine.verification else None
    return "" if known is None else f"{known:.1f} %"


def _latency_cell(one: RouteResult) -> str:
    """`4.10 ms`, and where that comes from if it was not measured."""
    if one.latencies:
        return format_latency(one.latencies[0].p50_ms)
    if one.rejected or one.predicted_ms is None:
        return "rejected" if one.rejected else "not known"
    return f"{format_latency(one.predicted_ms)} {one.predicted_by}"


def _kind(result: BuildResult) -> str:
    return "measured" if any(one.latencies for one in result.results) else "predicted"


def selection_table(result: BuildResult) -> Table:
    """The chosen stitches with every number that led to the choice."""
    selector = find_selector("all" if result.settings.shipped else result.selection.settings.selector)
    chosen = sorted(result.selection.chosen, key=lambda c: (c.source, c.target, c.bucket, c.score or 0.0))
    terms = list(chosen[0].terms)
    by_macs = result.selection.unit == "multiply-adds"
    caption = f"score: {selector.formula}; lower is better" if selector.formula else selector.description
    title = f"Stitches chosen by {selector.name}"
    if result.settings.shipped:
        title, caption = f"Stitches of the tuned supernet that comes with {result.family.name}", ""
    scored = ("score",) if selector.formula else ()
    numbers = ("bucket", "MACs" if by_macs else "predicted ms", *terms, *scored, "because", "unexplained")
    rows = []
    for one in chosen:
        price = format_macs(one.cost) if by_macs else f"{one.cost:.3g}"
        values = [f"{one.terms[term]:.4f}" for term in terms] + ([f"{one.score:.3f}"] if scored else [])
        left = f"{result.unexplained[one.seam]:.1%}" if one.seam in result.unexplained else ""
        rows.append(([str(one.route), str(one.bucket), price, *values, one.reason, left], ""))
    spare = {*terms, "unexplained"}
    columns = [Column(heading="stitch", name=True)]
    columns += [Column(heading=one, number=True, spare=one in spare) for one in numbers]
    return new_table(title, columns, rows, caption=caption)


def summary(result: BuildResult) -> Group:
    """Areas, the straight lines between anchors, and anchors before and after."""
    lines = [
        "Area under the frontier, accuracy over MACs (1 = the largest anchor's accuracy at the smallest's cost): "
        f"{_shown(areas(result)['macs_untuned'])} untuned, {_shown(areas(result)['macs'])} tuned; "
        f"over {_kind(result)} p50 latency: {_shown(areas(result)['latency'])}."
    ]
    if result.costs:
        over = "them" if result.costs.tell_routes_apart else "multiply-adds"
        lines.append(f"{result.costs.describe()} The frontier is drawn over {over}.")
    for source, target in result.selection.pairs:
        above, held = buckets_above_line(result, source, target)
        lines.append(
            f"{source} → {target}: stitches beat the straight line between their anchors in {above} of "
            f"{held} occupied buckets ({result.settings.selection.buckets} in all)."
        )
    anchors = ", ".join(f"{a.route} {a.top1_before:.1f} → {a.top1:.1f} %" for a in result.anchors)
    lines.append(f"Anchors before and after tuning: {anchors}.")
    rejected = [
        Text(f"Not registered: {one.route} in {engine.precision}: {engine.reason}", style="red")
        for one in result.results
        for engine in one.engines
        if not engine.exists
    ]
    loud = []
    if result.family.weights == "random":
        loud = [Text("RANDOM WEIGHTS: these networks are untrained; accuracies mean nothing.", style="bold red")]
    return Group(*(Text(line) for line in lines), *rejected, *loud)


def times(result: BuildResult) -> Table:
    """Where the time went, stage by stage; what was kept took its time in an earlier run."""
    total = sum(one.seconds for one in result.stages if one.status == "done")
    kept = sum(one.seconds for one in result.stages) - total
    rows = []
    for one in result.stages:
        share = f"{one.seconds / total:.0%}" if one.status == "done" and total else "cached"
        joules, wrote = one.facts.get("energy_joules"), one.facts.get("checkpoints")
        energy = f"{joules / 3600:.1f} Wh" if joules is not None else ""
        remark = f"{wrote['count']} checkpoints, {wrote['seconds']:.1f} s" if wrote else ""
        rows.append(([one.name, f"{one.seconds:.1f}", share, energy, remark], ""))
    numbers = [Column(heading=one, number=True) for one in ("seconds", "share", "energy")]
    columns = [Column(heading="stage", name=True), *numbers, Column(heading="")]
    title = f"{total:.0f} s, and {kept:.0f} s in earlier runs; peak memory {format_size(result.peak_memory_bytes)}"
    return new_table(title, columns, rows)


def areas(result: BuildResult) -> dict[str, float | None]:
    """Area under the frontier; None where the anchors span no range of cost or accuracy."""
    timed = [one for one in result.results if one.latency_ms is not None and not one.rejected]
    return {
        "macs_untuned": _area(result.results, lambda r: r.cost.macs, lambda r: r.top1_before),
        "macs": _area(result.results, lambda r: r.cost.macs, lambda r: r.top1),
        "latency": _area(timed, lambda r: r.latency_ms or 0.0, lambda r: r.top1),
    }


def buckets_above_line(result: BuildResult, source: str, target: str) -> tuple[int, int]:
    """In how many cost buckets a stitch of this pair beats the line, and how many hold one."""
    ends = {str(a.route): (float(a.cost.macs), a.top1) for a in result.anchors}
    points = [
        (float(r.cost.macs), r.top1)
        for r in result.results
        if len(r.route.segments) == 2 and {s.anchor for s in r.route.segments} == {source, target}
    ]
    return above_the_line(points, ends[source], ends[target], result.settings.selection.buckets)


def to_json(result: BuildResult) -> dict[str, Any]:
    """Everything the build found, as JSON."""
    return {
        "schema_version": SCHEMA_VERSION,
        "build": asdict(result.record),
        "build_id": result.build_id,
        "anchor_weights_sha256": result.family.fingerprint,
        "data_fingerprint": result.data.fingerprint,
        "areas": areas(result),
        "routes": [_route_json(one) for one in result.results],
        "selection": _selection_json(result),
        "buckets_above_line": {
            f"{f}:{g}": dict(zip(("above", "occupied"), buckets_above_line(result, f, g), strict=True))
            for f, g in result.selection.pairs
        },
        "preprocessing": preprocessing_json(result.family.data_config),
        "seconds": result.seconds,
        "stages": [stage_json(one) for one in result.stages],
        "peak_memory_bytes": result.peak_memory_bytes,
    }


def manifest_json(result: BuildResult) -> dict[str, Any]:
    """The manifest as it was registered, and the stages with what came after that."""
    record = {name: value for name, value in asdict(result.record).items() if name != "manifest"}
    stages = [stage_json(one) for one in result.stages]
    return {**result.record.manifest, "build_id": result.build_id, "build": record, "stages": stages}


def _selection_json(result: BuildResult) -> dict[str, Any]:
    selection, measured = result.selection, result.measurements
    selector, probes = find_selector(selection.settings.selector), measured.probes
    return {
        "selector": selector.name,
        "score": selector.formula,
        "cost_unit": selection.unit,
        "pairs": selection.pairs,
        "output_distance_nats": (
            {f"{f}:{g}": theta for (f, g), theta in measured.output_distances().items()}
            if measured.has("outputs")
            else {}
        ),
        "heldout_images": len(result.data.heldout),
        "probe_top1": {name: list(found) for name, found in probes.probe_accuracy.items()} if probes else {},
        "candidates": [_candidate_json(one) for one in selection.candidates],
        "empty_buckets": {f"{f}:{g}": list(numbers) for (f, g), numbers in selection.empty_buckets.items()},
        "measurements": measured.to_json(),
        "unexplained_variance": {str(seam): share for seam, share in result.unexplained.items()},
    }


def _candidate_json(one: Candidate) -> dict[str, Any]:
    fields = {k: v for k, v in asdict(one).items() if k != "terms"}
    return {**fields, **one.terms, "route": str(one.route), "segments": one.route.to_json()}


def _route_json(one: RouteResult) -> dict[str, Any]:
    """All fields; beside the list of engines also the numbers of the one that stands for the route."""
    engine = asdict(one.engine) if one.engine else {"verification": None, "latencies": [], "size_bytes": None}
    shown = {name: engine[name] for name in ("verification", "latencies", "size_bytes")}
    return {**asdict(one), **shown, "rejected": one.rejected, "route": str(one.route), "segments": one.route.to_json()}


def _area(results: Any, cost: CostOf, accuracy: CostOf) -> float | None:
    anchors = [one for one in results if one.route.is_anchor]
    if len(anchors) < 2:
        return None
    points = [(cost(one), accuracy(one)) for one in results]
    ends = sorted((cost(one), accuracy(one)) for one in anchors)
    try:
        return area(points, ends[0], ends[-1])
    except ValueError:
        return None


def _shown(value: float | None) -> str:
    return "none (the anchors span no range)" if value is None else f"{value:.4f}"
