"""The routes a selector would choose for a family, without building any."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from klas_zoo.data.loading import load_data
from klas_zoo.errors import SelectionError
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import FamilySpec
from klas_zoo.profiles.macs import RouteCost, part_costs, route_costs
from klas_zoo.progress.tables import Column, new_table
from klas_zoo.routes import Route
from klas_zoo.selection import select
from klas_zoo.selection.candidates import Candidate, SelectionSettings
from klas_zoo.selection.latency_cost import latency_cost
from klas_zoo.selection.measurements import SEAM_NEEDS, Measurements, Need
from klas_zoo.selection.measuring import Progress, images_of, measure, seams_of
from klas_zoo.selection.pairs import stitchable_pairs
from klas_zoo.selection.probes import ProbeSettings
from klas_zoo.selection.selectors import find_selector
from klas_zoo.tuning.settings import PRESETS
from klas_zoo.units import format_macs


@dataclass(frozen=True, kw_only=True)
class ListedRoute:
    """An anchor (`candidate` None) or a chosen stitch."""

    route: Route
    cost: RouteCost
    candidate: Candidate | None

    def to_json(self) -> dict[str, Any]:
        """`source` of an anchor is its own name; what only a stitch has is null there."""
        one = self.candidate
        return {
            "route": str(self.route),
            "source": self.route.segments[0].anchor,
            "i": one.i if one else None,
            "target": one.target if one else None,
            "j": one.j if one else None,
            "macs": self.cost.macs,
            "parameters": self.cost.parameters,
            "segments": self.route.to_json(),
            "bucket": one.bucket if one else None,
            "score": one.score if one else None,
            "reason": one.reason if one else None,
        }


def list_routes(
    spec: FamilySpec,
    settings: SelectionSettings,
    *,
    root: Path,
    data: Path | None = None,
    weights: Path | None = None,
    classes: Sequence[str] | None = None,
    stage: Progress,
    say: Callable[[str], None],
) -> list[ListedRoute]:
    """All anchors and the stitches a selector chooses, by multiply-adds. Downloads nothing.

    Where the selector needs measurements, they are those of the last build of the family that took
    them, unless `data` or `weights` are given; or else they are taken now, on the family's sample.

    Args:
        root: the registry's folder.
        data, weights, classes: as a build takes them.

    Raises:
        SelectionError: nothing that was measured, and nothing to measure it on.
    """
    needs = find_selector(settings.selector).asks_for(settings)
    anew = data is not None or weights is not None
    family = None if anew else load_family(spec, random_weights=True)
    measured = None if anew else Measurements()
    if family is not None and needs:
        measured = _stored(root, family, needs, settings, say)
    if measured is None:
        family, measured = _measured(spec, settings, needs, data, weights, classes, stage, say)
    assert family is not None
    return _chosen(family, settings, measured)


def _chosen(family: Family, settings: SelectionSettings, measured: Measurements) -> list[ListedRoute]:
    cost_of = route_costs(family)
    price: Callable[[Route], float] = lambda route: cost_of(route).macs  # noqa: E731  two costs, one name
    unit = "multiply-adds"
    if find_selector(settings.selector).cost == "latency":
        price, unit = latency_cost(part_costs(family), measured.latency_ms or {}, price), "ms"
    anchors = [Route.anchor(name, chain.depth) for name, chain in family.chains.items()]
    chosen = {c.route: c for c in select(family.chains, measured, price, settings, unit=unit).chosen}
    listed = [ListedRoute(route=r, cost=cost_of(r), candidate=chosen.get(r)) for r in (*anchors, *chosen)]
    return sorted(listed, key=lambda one: one.cost.macs)


def _measured(
    spec: FamilySpec,
    settings: SelectionSettings,
    needs: Set[Need],
    data: Path | None,
    weights: Path | None,
    classes: Sequence[str] | None,
    stage: Progress,
    say: Callable[[str], None],
) -> tuple[Family, Measurements]:
    """Takes the measurements now."""
    if "latency_ms" in needs:
        raise SelectionError(
            f"{settings.selector} needs the latencies of {spec.name}'s anchors, which only a build measures: run "
            f"klas-zoo build --family {spec.argument} first."
        )
    at_hand = weights is not None or all(anchor.checkpoint is not None for anchor in spec.anchors)
    if not at_hand or (data is None and spec.sample is None):
        way = "" if settings.direction == spec.direction else f" --direction {settings.direction}"
        raise SelectionError(
            f"{settings.selector} needs measurements of {spec.name} that no build has taken: run klas-zoo build "
            f"--family {spec.argument} --selector {settings.selector}{way} first, or pass --data and --weights."
        )
    family = load_family(spec, weights_folder=weights)
    cost_of, probing = route_costs(family), ProbeSettings()
    macs: Callable[[Route], float] = lambda route: cost_of(route).macs  # noqa: E731  see _chosen
    stitchable_pairs(family.chains, macs, settings)  # refused before images are read and probes learn
    images = load_data(
        data, sample=spec.sample, num_classes=family.num_classes, data_config=family.data_config, seed=settings.seed,
        classes=classes,
    )  # fmt: skip
    streams = images_of(
        images, probing=probing, batch=100, init_images=PRESETS[spec.preset].init_images, seed=settings.seed
    )
    found = measure(
        family.chains, needs, streams, macs, settings, probing=probing, stage=stage, warn=say,
    )  # fmt: skip
    return family, found


def _stored(
    root: Path, family: Family, needs: Set[Need], settings: SelectionSettings, say: Callable[[str], None]
) -> Measurements | None:
    """Of the last build of this family that took everything in `needs`, for all pairs and directions asked for."""
    for report in _reports(root):
        if report["build"]["family"] != family.name or not _same_anchors(report, family):
            continue
        try:
            measured = Measurements.from_json(report["selection"]["measurements"])
        except SelectionError:
            continue  # of another version, or damaged
        found = _with_latencies(measured, report)
        if all(found.has(need) for need in needs) and _covers(found, family, needs, settings):
            made = report["build"]
            loud = ", RANDOM WEIGHTS" if made["weights"] == "random" else ""
            say(f"Scores are those of build {report['build_id']}, {made['finished_at']}{loud}.")
            return found
    return None


def _reports(root: Path) -> Iterator[dict[str, Any]]:
    """Reports in the registry that hold measurements, the newest first."""

    def number(path: Path) -> int:
        head = path.parent.name.partition("-")[0]
        return int(head) if head.isdecimal() else -1

    for path in sorted((root / "reports").glob("*/report.json"), key=number, reverse=True):
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue  # what cannot be read is as good as not there
        if isinstance(report, dict) and "measurements" in report.get("selection", {}):
            yield report


def _same_anchors(report: dict[str, Any], family: Family) -> bool:
    """Whether the build's anchors compute the same; builds that were made without a manifest do not say."""
    return bool(report["build"].get("manifest", {}).get("architecture_sha256") == family.architecture)


def _covers(found: Measurements, family: Family, needs: Set[Need], settings: SelectionSettings) -> bool:
    """Whether what is measured for each seam was measured for all that can be chosen now."""
    of_seams = [getattr(found, need) for need in needs & SEAM_NEEDS]
    if not of_seams:
        return True
    if settings.pairs is None and not found.has("outputs"):
        return False
    cost_of = route_costs(family)
    wanted = seams_of(family.chains, found, lambda route: cost_of(route).macs, settings)
    return all(values.keys() >= set(wanted) for values in of_seams)


def _with_latencies(found: Measurements, report: dict[str, Any]) -> Measurements:
    """Every build times its anchors in the end, whatever it selected by."""
    if found.latency_ms is not None:
        return found
    timed = {
        one["route"]: one["latencies"][0]["p50_ms"]
        for one in report["routes"]
        if len(one["segments"]) == 1 and one["latencies"]
    }
    anchors = sum(len(one["segments"]) == 1 for one in report["routes"])
    return replace(found, latency_ms=timed) if len(timed) == anchors else found


def routes_table(listed: list[ListedRoute], settings: SelectionSettings) -> Table:
    """One row a route, from small to large."""
    numbers = ("MACs", "parameters", "bucket", "score", "because")
    rows = []
    for one in listed:
        stitch = one.candidate
        score = stitch.score if stitch and stitch.score is not None else math.nan
        cells = [
            str(one.route), format_macs(one.cost.macs), format_macs(one.cost.parameters),
            str(stitch.bucket) if stitch else "", "" if math.isnan(score) else f"{score:.4g}",
            stitch.reason if stitch else "anchor",
        ]  # fmt: skip
        rows.append((cells, "" if stitch else "bold"))
    columns = [Column(heading="route", name=True), *(Column(heading=one, number=True) for one in numbers)]
    return new_table(f"Routes of the selector {settings.selector}", columns, rows)
