"""What the report page shows, as JSON: engines, under which conditions they compare, and how builds came about."""

from __future__ import annotations

import json
import math
import shlex
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from klas_zoo.confidence import share_interval
from klas_zoo.errors import RegistryError, UnknownName
from klas_zoo.page.comparisons import comparisons
from klas_zoo.page.selection import chosen_because, evaluated_only, selection_of
from klas_zoo.registry import Registry
from klas_zoo.registry.records import PERCENTILES, BuildRecord, EngineRecord, percentile_ms
from klas_zoo.registry.store import default_root
from klas_zoo.registry.tags import builds_of

LEVEL = 0.95
"""Of the confidence intervals."""
SCHEMA_VERSION = 1
Report = Mapping[str, Any]
"""The content of a build's report.json."""


def registry_contents(
    registry: Registry, *, family: str | None = None, device: str | None = None
) -> dict[str, Any]:
    """All current builds of a registry, or those of one family or device.

    Args:
        family: its name, or a tag such as `deit@prod`.

    Raises:
        UnknownName: no engine of that family or device is registered.
        RegistryError: the registry holds no engines, or cannot be read.
    """
    with registry.reading() as connection:
        chosen, names = builds_of(connection, family, device)
        numbers, engines = _engines(registry, connection, chosen, names)
        if not engines:
            raise _nothing(connection, registry, family, device)
        found = comparisons(connection, numbers, family=family, device=device, root=str(registry.root))
    reports = {number: report for number in {one.build_id for one in engines} if (report := _report(registry, number))}
    return _contents(registry, engines, found, reports)


def build_contents(registry: Registry, build_id: int, report: Report) -> dict[str, Any]:
    """A current build of which `report` is the report.json; of one machine where several share the registry."""
    build = registry.build(build_id)
    with registry.reading() as connection:
        numbers, engines = _engines(registry, connection, "builds.id = :build", {"build": build_id})
        found = comparisons(connection, numbers, family=build.family, device=build.device, root=str(registry.root))
    return _contents(registry, engines, found, {build_id: report})


def _contents(
    registry: Registry, engines: Sequence[EngineRecord], found: list[dict[str, Any]], reports: Mapping[int, Report]
) -> dict[str, Any]:
    builds = {number: registry.build(number) for number in sorted({one.build_id for one in engines})}
    because = {
        number: chosen_because(build.kind, build.settings, reports.get(number)) for number, build in builds.items()
    }
    prepared = {one.build_id: dict(one.preprocessing) for one in engines}
    shown = [_engine_json(one, because[one.build_id](str(one.route), one.route.is_anchor)) for one in engines]
    return {
        "schema_version": SCHEMA_VERSION,
        "level": LEVEL,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "made_by": f"klas-zoo {version('klas-zoo')}",
        "registry": str(registry.root),
        "registry_argument": _registry_argument(registry.root),
        "percentiles": list(PERCENTILES),
        "engines": shown,
        "comparisons": found,
        "builds": [
            _build_json(number, build, reports.get(number)) | {"preprocessing": prepared[number]}
            for number, build in builds.items()
        ],
    } | _titled(shown)


def _titled(engines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    families = sorted({one["family"] for one in engines})
    devices = sorted({one["device"] for one in engines})
    named = ", ".join(families) if len(families) <= 3 else f"{len(families)} families"
    return {
        "title": f"{named} on {', '.join(devices)}",
        "random_weights": sorted({one["family"] for one in engines if one["weights"] == "random"}),
    }


def _engines(
    registry: Registry, connection: sqlite3.Connection, chosen: str, names: Mapping[str, object]
) -> tuple[dict[int, int], list[EngineRecord]]:
    """The engines for which a condition holds, and where in that list each number of an engine is."""
    engines = registry.read_engines(connection, chosen, names)
    numbers = connection.execute(
        "SELECT engines.id FROM builds CROSS JOIN engines ON engines.build_id = builds.id"
        f" WHERE {chosen} ORDER BY engines.macs, engines.id",
        names,
    )
    return {row["id"]: place for place, row in enumerate(numbers)}, engines


def _nothing(
    connection: sqlite3.Connection, registry: Registry, family: str | None, device: str | None
) -> RegistryError | UnknownName:
    """Why no engine was found."""
    rows = connection.execute("SELECT DISTINCT family, device FROM builds WHERE current").fetchall()
    families, devices = {row["family"] for row in rows}, {row["device"] for row in rows}
    if rows and family is not None and "@" not in family and family not in families:
        return UnknownName("family", family, families)
    if rows and device is not None:
        return UnknownName("device", device, devices)
    return RegistryError(f"The registry {registry.root} holds no engines: run klas-zoo build first.")


def _engine_json(one: EngineRecord, chosen: str) -> dict[str, Any]:
    interval = None
    if not one.claimed and one.images > 0:
        low, high = share_interval(round(one.top1 * one.images / 100), one.images, LEVEL)
        interval = [100 * low, 100 * high]
    return {
        "family": one.family, "device": one.device, "route": str(one.route), "plain": one.route.is_anchor,
        "format": one.format, "runtime": one.runtime, "precision": one.precision, "status": one.status,
        "reason": one.reason, "top1": one.top1, "top1_interval": interval, "top5": one.top5, "images": one.images,
        "claimed_by": one.accuracy_source, "macs": one.macs, "parameters": one.parameters,
        "size_bytes": one.size_bytes, "dataset": one.dataset, "data_fingerprint": one.data_fingerprint,
        "weights": one.weights, "build_id": one.build_id, "path": str(one.path), "chosen": chosen,
        "latencies": [
            {
                "batch": timed.batch, "hardware": timed.hardware, "threads": timed.threads, "origin": timed.origin,
                **{name: _known(percentile_ms(timed, name)) for name in PERCENTILES},
            }
            for timed in one.latencies
        ],
    }  # fmt: skip


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _build_json(number: int, build: BuildRecord, report: Report | None) -> dict[str, Any]:
    manifest = build.manifest
    return {
        "id": number, "family": build.family, "device": build.device, "kind": build.kind,
        "shipped": build.settings.get("shipped") is True, "weights": build.weights,
        "dataset": build.dataset, "data_fingerprint": build.data_fingerprint, "command": build.command,
        "hardware": build.hardware, "versions": dict(build.versions), "started_at": build.started_at,
        "finished_at": build.finished_at, "seeds": manifest.get("seeds"), "anchors": manifest.get("anchors"),
        "machine": manifest.get("machine"), "source": manifest.get("source"), "key": manifest.get("key"),
        "stages": (report or {}).get("stages") or manifest.get("stages") or [],
        "selection": selection_of(report) if report else None,
        "evaluated": evaluated_only(report) if report else [],
    }  # fmt: skip


def _report(registry: Registry, number: int) -> Report | None:
    """The report.json of a build where it was written into the registry; None where it is not there or is damaged."""
    for file in sorted((registry.root / "reports").glob(f"{number:04d}-*/report.json")):
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and found.get("build_id") == number:
            return found
    return None


def _registry_argument(root: Path) -> str:
    """`--registry DIR`, unless commands find this registry without it."""
    return "" if root == default_root() else f"--registry {shlex.quote(str(root))}"
