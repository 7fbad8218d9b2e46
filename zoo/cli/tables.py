"""Tables of registered engines. Imports rich, nothing heavier."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.table import Table

from klas_zoo.hardware import describe_cpu
from klas_zoo.profiles.profile import LatencyModel, PredictionError, Profile
from klas_zoo.profiles.records import LatencyRecord, origin_of
from klas_zoo.progress.tables import Column, new_table
from klas_zoo.registry.overview import Overview
from klas_zoo.registry.records import VERIFIED, EngineRecord
from klas_zoo.routes import Route
from klas_zoo.units import format_latency, format_macs, format_size


def engines_table(engines: Sequence[EngineRecord], wide: bool = False) -> Table:
    """One row an engine, with the best known latency of its smallest batch."""
    several = len({one.device for one in engines}) > 1
    columns = [
        Column(heading="family", name=True), Column(heading="device", name=True, wide=not several),
        Column(heading="route", name=True), Column(heading="engine"), Column(heading="format", wide=True),
        Column(heading="top-1", number=True), Column(heading="images", number=True, wide=True),
        Column(heading="MACs", number=True, spare=True), Column(heading="batch", number=True, wide=True),
        Column(heading="p50", number=True), Column(heading="p99", number=True, wide=True),
        Column(heading="size", number=True), Column(heading="latency"),
    ]  # fmt: skip
    rows = []
    for one in engines:
        timed = one.latencies[0] if one.latencies else None
        loud = " (RANDOM WEIGHTS)" if one.weights == "random" else ""
        cells = [
            one.family + loud, one.device, str(one.route), engine_name(one.runtime, one.precision), one.format,
            f"{one.top1:.2f} %{' (claimed)' if one.claimed else ''}", f"{one.images:,}", format_macs(one.macs),
            str(timed.batch) if timed else "", format_latency(timed.p50_ms) if timed else "",
            format_latency(timed.p99_ms) if timed and not math.isnan(timed.p99_ms) else "",
            format_size(one.size_bytes),
            (conditions_of(timed) if wide else origin_of(timed))
            if timed else "unknown" if one.status == VERIFIED else one.status,
        ]  # fmt: skip
        rows.append((cells, ""))
    return new_table("Registered engines", columns, rows, wide=wide)


def engine_name(runtime: str, precision: str) -> str:
    """`int8`, and the runtime where it is not onnxruntime."""
    return precision if runtime == "onnxruntime" else f"{precision} {runtime}"


def conditions_of(latency: LatencyRecord) -> str:
    """`measured, 2 threads, this machine`; clock and options where they are not the usual ones."""
    threads = {0: [], 1: ["1 thread"]}.get(latency.threads, [f"{latency.threads} threads"])
    clock = [f"{latency.clock} clock"] if latency.clock != "host" else []
    options = [latency.options] if latency.options else []
    hardware = "this machine" if latency.hardware == describe_cpu() else latency.hardware
    return ", ".join([origin_of(latency), *threads, *clock, *options, hardware])


def frontier_table(found: Overview, every: bool, wide: bool = False) -> Table:
    """One row an engine, from fast to slow: those on the frontier and dominated stitches, or all."""
    title = f"Engines on {found.hardware}: {found.percentile} of batch {found.batch}"
    columns = [
        Column(heading=""), Column(heading="family", name=True), Column(heading="route", name=True),
        Column(heading="engine"), Column(heading="latency", number=True), Column(heading="top-1", number=True),
        Column(heading="size", number=True, spare=True), Column(heading="images", number=True, wide=True),
        Column(heading="origin", wide=True), Column(heading="dominated by"),
    ]  # fmt: skip
    rows = [
        (
            [
                "*" if one.on_frontier else "", one.family, one.route, engine_name(one.runtime, one.precision),
                format_latency(one.latency_ms), f"{one.top1:.2f} %", format_size(one.size_bytes), f"{one.images:,}",
                one.origin, one.dominated_by,
            ],
            "bold" if one.on_frontier else "",
        )
        for one in found.points
        if every or one.on_frontier or one.dominated_by
    ]  # fmt: skip
    caption = "*: on the frontier; dominated by: a plain network that is as fast and as accurate"
    return new_table(title, columns, rows, wide=wide, caption=caption)


def devices_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a device: public figures and which profiles there are of it."""
    caption = "TFLOPS dense, a multiply-add counted twice; sources: klas-zoo devices --json"
    numbers = ("memory", "bandwidth", "fp32", "fp16", "bf16", "int8")
    columns = [
        Column(heading="device", name=True),
        *(Column(heading=one, number=True, spare=one == "bf16") for one in numbers),
        Column(heading="capability", number=True, spare=True), Column(heading="profiles"),
    ]  # fmt: skip
    shown = []
    for row in rows:
        peaks = row.get("peak_tflops", {})
        memory, bandwidth = row.get("memory_gb"), row.get("bandwidth_gb_s")
        profiles = [
            f"{p['origin']} {p['family']} {p['runtime']} {p['precision']} batch {p['batch']}"
            + (" (noisy)" if p["noisy"] else "")
            for p in row["profiles"]
        ]
        cells = [
            row["name"], f"{memory:g} GB" if memory else "", f"{bandwidth:g} GB/s" if bandwidth else "",
            *(f"{peaks[name]:g}" if name in peaks else "" for name in ("fp32", "fp16", "bf16", "int8")),
            row.get("compute_capability") or "", "\n".join([*filter(None, (row.get("hardware"),)), *profiles]),
        ]  # fmt: skip
        shown.append((cells, ""))
    return new_table("Devices", columns, shown, caption=caption)


def blocks_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a part of an anchor."""
    numbers = ("MACs", "parameters", "moved", "peak activations")
    columns = [
        Column(heading="anchor", name=True), Column(heading="part", name=True),
        *(Column(heading=one, number=True) for one in numbers),
    ]  # fmt: skip
    shown = [
        (
            [
                row["anchor"], row["part"], format_macs(row["macs"]), format_macs(row["parameters"]),
                format_size(row["bytes_moved"]), format_size(row["peak_activation_bytes"]),
            ],
            "",
        )
        for row in rows
    ]  # fmt: skip
    return new_table(
        "What parts cost", columns, shown, caption="for one image, fp32; every operator reads and writes memory"
    )


def profile_table(profile: Profile) -> Table:
    """One row a measured network, and how far its prediction would be off; of a prediction, one row an anchor."""
    model = profile.model
    caption = f"{profile.hardware}{_error(model.error) if model else ''}"
    numbers = ("MACs", "runs", "p50", "p90", "p99", "variation", "model is off")
    columns = [
        Column(heading="network", name=True),
        *(Column(heading=one, number=True, spare=one in ("runs", "p90", "variation")) for one in numbers),
    ]
    shown = []
    for one in profile.networks:
        seen = one.latency
        off = f"{100 * (model.predict_ms(one.route) / seen.p50_ms - 1):+.1f} %" if model else ""
        cells = [
            str(one.route), format_macs(one.macs), str(seen.runs), format_latency(seen.p50_ms),
            format_latency(seen.p90_ms), format_latency(seen.p99_ms), f"{seen.coefficient_of_variation:.1%}", off,
        ]  # fmt: skip
        shown.append((cells, "bold" if one.route.is_anchor else ""))
    if model and not profile.networks:
        shown += [
            ([str(route), "", "", format_latency(ms), "", "", "", profile.origin], "")
            for route, ms in _predicted(model)
        ]
    return new_table(str(profile), columns, shown, caption=profile.failure or caption)


def _error(error: PredictionError) -> str:
    if not error.checked:
        return f"; {error.method}"
    return f"; {error.method}: median {error.median_percent:.2g} %, at most {error.largest_percent:.2g} %"


def _predicted(model: LatencyModel) -> list[tuple[Route, float]]:
    """Anchors, and between neighbours the stitch at the middle of both."""
    names = list(model.anchors)
    depths = {name: len(one.block_ms) for name, one in model.anchors.items()}
    routes = [Route.anchor(name, depth) for name, depth in depths.items()]
    for source, target in pairwise(names):
        stitch = Route.stitch(source, max(depths[source] // 2, 1), target, depths[target] // 2, depths[target])
        if model.covers(stitch):
            routes.append(stitch)
    return sorted(((one, model.predict_ms(one)) for one in routes), key=lambda found: found[1])
