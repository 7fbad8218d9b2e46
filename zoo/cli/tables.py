"""Tables of registered engines. Imports rich, nothing heavier."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from klas_zoo.costs.estimates import origin_of
from klas_zoo.profiles.profile import Profile
from klas_zoo.registry.records import EngineRecord
from klas_zoo.units import format_latency, format_macs, format_size


def engines_table(engines: Sequence[EngineRecord]) -> Table:
    """One row an engine, one latency column pair for its smallest batch."""
    table = Table(title="Registered engines")
    for heading in ("family", "device", "route"):
        table.add_column(heading)
    for heading in ("top-1", "MACs", "batch", "p50", "p99", "size"):
        table.add_column(heading, justify="right")
    table.add_column("latency")
    for one in engines:
        timed = one.latencies[0] if one.latencies else None
        loud = " (RANDOM WEIGHTS)" if one.weights == "random" else ""
        table.add_row(
            one.family + loud,
            one.device,
            str(one.route),
            f"{one.top1:.2f} %",
            format_macs(one.macs),
            str(timed.batch) if timed else "",
            format_latency(timed.p50_ms) if timed else "",
            format_latency(timed.p99_ms) if timed and not math.isnan(timed.p99_ms) else "",
            format_size(one.size_bytes),
            origin_of(timed) if timed else "not known",
        )
    return table


def devices_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a device: public figures and which profiles there are of it."""
    caption = "TFLOPS dense, a multiply-add counted twice; sources: klas-zoo devices --json"
    table = Table(title="Devices", caption=caption)
    table.add_column("device")
    for heading in ("memory", "bandwidth", "fp32", "fp16", "bf16", "int8", "capability"):
        table.add_column(heading, justify="right")
    table.add_column("profiles")
    for row in rows:
        peaks = row.get("peak_tflops", {})
        memory, bandwidth = row.get("memory_gb"), row.get("bandwidth_gb_s")
        profiles = [
            f"{p['origin']} {p['family']} {p['runtime']} {p['precision']} batch {p['batch']}"
            + (" (noisy)" if p["noisy"] else "")
            for p in row["profiles"]
        ]
        table.add_row(
            row["name"],
            f"{memory:g} GB" if memory else "",
            f"{bandwidth:g} GB/s" if bandwidth else "",
            *(f"{peaks[name]:g}" if name in peaks else "" for name in ("fp32", "fp16", "bf16", "int8")),
            row.get("compute_capability") or "",
            "\n".join([*filter(None, (row.get("hardware"),)), *profiles]),
        )
    return table


def blocks_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """One row a part of an anchor."""
    table = Table(title="What parts cost", caption="for one image, fp32; every operator reads and writes memory")
    for heading in ("anchor", "part"):
        table.add_column(heading)
    for heading in ("MACs", "parameters", "moved", "peak activations"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(
            row["anchor"],
            row["part"],
            format_macs(row["macs"]),
            format_macs(row["parameters"]),
            format_size(row["bytes_moved"]),
            format_size(row["peak_activation_bytes"]),
        )
    return table


def profile_table(profile: Profile) -> Table:
    """One row a measured network, and how far its prediction would be off."""
    model = profile.model
    error = f"; {model.error.method}: median {model.error.median_percent:.2g} %" if model else ""
    spread = f", at most {model.error.largest_percent:.2g} %" if model else ""
    table = Table(title=str(profile), caption=profile.failure or f"{profile.hardware}{error}{spread}")
    table.add_column("network")
    for heading in ("MACs", "runs", "p50", "p90", "p99", "variation", "model is off"):
        table.add_column(heading, justify="right")
    for one in profile.networks:
        seen = one.latency
        off = f"{100 * (model.predict_ms(one.route) / seen.p50_ms - 1):+.1f} %" if model else ""
        table.add_row(
            str(one.route),
            format_macs(one.macs),
            str(seen.runs),
            format_latency(seen.p50_ms),
            format_latency(seen.p90_ms),
            format_latency(seen.p99_ms),
            f"{seen.coefficient_of_variation:.1%}",
            off,
            style="bold" if one.route.is_anchor else "",
        )
    return table


def show(*things: object) -> None:
    """Prints to stdout, as wide as needed where stdout is no terminal."""
    Console(width=None if sys.stdout.isatty() else 160).print(*things)
