"""All engines of one machine in one picture: which are on the frontier, and which a plain network dominates.

Imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from klas_zoo.budget import Candidates
from klas_zoo.errors import UnknownName
from klas_zoo.registry import Registry, rows
from klas_zoo.registry.candidates import Query, comparable
from klas_zoo.registry.records import PERCENTILES
from klas_zoo.registry.tags import registered_device


@dataclass(frozen=True, kw_only=True)
class Point:
    """One comparable engine.

    Attributes:
        plain: a network that was never stitched.
        top1: per cent, counted on `images` images, or `claimed` by somebody.
        on_frontier: no other engine is at least as fast and as accurate.
        dominated_by: a plain network that is both at least as fast and as accurate, and better in one of them: the
            most accurate one; empty for plain networks and where there is none.
    """

    family: str
    route: str
    runtime: str
    precision: str
    plain: bool
    latency_ms: float
    top1: float
    size_bytes: int
    origin: str
    images: int = 0
    claimed: bool = False
    on_frontier: bool = False
    dominated_by: str = ""

    @property
    def name(self) -> str:
        """`deit: tiny.1-3+base.6-12 (onnxruntime, fp32)`."""
        return f"{self.family}: {self.route} ({self.runtime}, {self.precision})"

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Overview:
    """Comparable engines from fast to slow, and under which conditions they compare.

    Attributes:
        left_out: what does not compare and why, a clause each.
    """

    points: tuple[Point, ...]
    hardware: str
    percentile: str
    batch: int
    left_out: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {**vars(self), "points": [one.to_json() for one in self.points], "left_out": list(self.left_out)}


def overview(
    registry: Registry | Path | str | None = None,
    *,
    device: str | None = None,
    family: str | None = None,
    percentile: str = "p50",
    batch: int = 1,
    measured_only: bool = False,
    hardware: str | None = None,
    threads: int | None = None,
    claimed: bool = False,
) -> Overview:
    """The engines that a pick would choose from; see `klas_zoo.registry.picking.pick` for the arguments.

    Raises:
        UsageError: a name that is not registered, or nothing that compares.
        RegistryError: there is no registry, it is empty, or it cannot be read.
    """
    if percentile not in PERCENTILES:
        raise UnknownName("percentile", percentile, PERCENTILES)
    place = registry if isinstance(registry, Registry) else Registry.open(registry, create=False)
    with place.reading() as connection:
        query = Query(
            family=family, device=registered_device(connection, device), batch=batch, hardware=hardware,
            threads=threads, measured_only=measured_only, claimed=claimed,
        )  # fmt: skip
        found = comparable(connection, query, str(place.root))
        found_rows = connection.execute(
            f"SELECT candidates.family, candidates.name AS route, runtime, precision, candidates.top1, origin, images,"
            f" accuracy_source <> '' AS claimed,"
            f" candidates.size_bytes, candidates.{percentile}_ms AS latency_ms FROM candidates"
            " JOIN engines ON engines.id = candidates.engine_id JOIN latencies"
            " ON latencies.engine_id = candidates.engine_id AND latencies.conditions_id = candidates.conditions_id"
            " WHERE latency_ms IS NOT NULL"
        ).fetchall()
    points = [_point(dict(row)) for row in found_rows]
    return Overview(
        points=tuple(_marked(points)), hardware=found.hardware, percentile=percentile, batch=batch,
        left_out=found.left_out,
    )  # fmt: skip


def _point(row: dict[str, object]) -> Point:
    route = rows.read_route(str(row["route"]))
    return Point(**{**row, "route": str(route), "plain": route.is_anchor, "claimed": bool(row["claimed"])})  # type: ignore[arg-type]


def _marked(points: list[Point]) -> list[Point]:
    """From fast to slow, with what dominates them."""

    def candidates(some: list[Point]) -> Candidates[Point]:
        return Candidates(
            items=some, latency_ms=lambda one: one.latency_ms, accuracy=lambda one: one.top1,
            size_bytes=lambda one: one.size_bytes, name=lambda one: one.name,
        )  # fmt: skip

    best = {one.name for one in candidates(points).frontier()}
    plain = candidates([one for one in points if one.plain]).frontier()
    marked = []
    for one in points:
        better = [
            other for other in plain
            if other.latency_ms <= one.latency_ms and other.top1 >= one.top1
            and (other.latency_ms, other.top1) != (one.latency_ms, one.top1)
        ]  # fmt: skip
        by = max(better, key=lambda other: other.top1).name if better and not one.plain else ""
        marked.append(replace(one, on_frontier=one.name in best, dominated_by=by))
    return sorted(marked, key=lambda one: (one.latency_ms, -one.top1, one.name))
