"""Records as rows of the registry's tables, and back."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klas_zoo.exporters.records import Verification
from klas_zoo.profiles.records import CascadeLatency, Conditions, EstimatedLatency, LatencyRecord
from klas_zoo.registry.records import BuildRecord, EngineRecord, NewEngine
from klas_zoo.routes import Route

if TYPE_CHECKING:
    from klas_zoo.cascades.definition import Cascade
    from klas_zoo.cascades.records import CascadeFacts

OF_A_BUILD = ("family", "device", "weights")
"""What an engine and its build have in common; stored in the build's row."""
_OF_AN_ENGINE = (
    "format", "runtime", "precision", "status", "reason", "macs", "parameters", "num_classes", "top1", "top5",
    "images", "accuracy_source", "dataset", "data_fingerprint",
)  # fmt: skip
_OF_A_FILE = ("package", "sha256", "file_bytes", "size_bytes")
_TEXTS = ("settings", "versions", "manifest")
_RANK = "CASE {} WHEN 'measured' THEN 0 WHEN 'interpolated' THEN 1 ELSE 2 END"
LATENCIES = "latencies CROSS JOIN conditions ON conditions.id = latencies.conditions_id"
"""Latencies with their conditions."""
IN_ORDER = f"batch, {_RANK.format('origin')}, clock DESC, measured_at DESC"
"""Of latencies of one engine: by batch size; measured ones before predictions, host clock first, newest first."""
_OF_CONDITIONS = ("device", *(field.name for field in fields(Conditions)))
_TEXT_COLUMNS = {
    "builds": ("family", "device", "kind", "weights", "dataset", "data_fingerprint", "command", "hardware",
               "started_at", "finished_at"),
    "engines": ("format", "runtime", "precision", "status", "reason", "file", "package", "sha256",
                "accuracy_source", "dataset", "data_fingerprint", "finished_at", *OF_A_BUILD),
    "latencies": ("device", "hardware", "runtime", "runtime_version", "provider", "precision", "options", "clock",
                  "origin", "measured_at"),
}  # fmt: skip
_INTEGER_COLUMNS = {
    "builds": (),
    "engines": ("build_id", "file_bytes", "size_bytes", "macs", "parameters", "num_classes", "images"),
    "latencies": ("threads", "batch", "runs"),
}


class UnreadableRow(ValueError):
    """A row does not hold what this version writes."""


@contextmanager
def readable() -> Iterator[None]:
    """Turns what a damaged row raises while it is read into `UnreadableRow`."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise UnreadableRow(str(error) or type(error).__name__) from error


def insert_build(connection: sqlite3.Connection, build: BuildRecord) -> int:
    """Inserts the current build of its family and device; returns its id."""
    texts = {name: _json(dict(getattr(build, name))) for name in _TEXTS}
    return insert(connection, "builds", {**vars(build), **texts, "current": 1})


def insert_engine(
    connection: sqlite3.Connection, build_id: int, engine: NewEngine, file: Mapping[str, str | int]
) -> None:
    """Inserts an engine and its latencies.

    Args:
        file: as it was stored: `file`, relative to the registry's folder, and the fields of `_OF_A_FILE`.
    """
    seen = engine.verification
    values = {name: getattr(engine, name) for name in _OF_AN_ENGINE} | {
        "route": _json(engine.route.to_json()),
        "input_shape": _json(engine.input_shape),
        "preprocessing": _json(dict(engine.preprocessing)),
        "verification": None if seen is None else _json(vars(seen)),
        "cascade": None if engine.cascade is None else _json(engine.cascade.to_json()),
    }
    engine_id = insert(connection, "engines", values | dict(file) | {"build_id": build_id})
    for latency in engine.latencies:
        put_latency(connection, engine_id, latency)


def put_latency(
    connection: sqlite3.Connection, engine_id: int, latency: LatencyRecord, *, from_profile: bool = False
) -> None:
    """Adds a latency of an engine, or replaces the one under the same conditions.

    A prediction never replaces a measurement, a roofline never an interpolation, nothing older anything newer
    of its kind, unless it is dated in the future. Times are compared as times: their zones may differ.

    Args:
        from_profile: whether a profile knew it, not whoever registered the engine.
    """
    values = {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in vars(latency).items()
        if name not in _OF_CONDITIONS
    }
    values |= {"engine_id": engine_id, "conditions_id": _conditions(connection, latency)}
    if isinstance(latency, CascadeLatency):
        values["paths_ms"] = _json(latency.paths_ms)
    if not from_profile:
        connection.execute(
            "UPDATE latencies SET from_profile = 0 WHERE engine_id = :engine_id AND conditions_id = :conditions_id",
            values,
        )
    changes = ", ".join(f"{name} = excluded.{name}" for name in values)
    if not isinstance(latency, EstimatedLatency):
        changes += ", error_percent = NULL, error_method = NULL"
    new, old = (_RANK.format(f"{table}.origin") for table in ("excluded", "latencies"))
    connection.execute(
        f"INSERT INTO latencies ({', '.join(values)}, from_profile)"
        f" VALUES ({', '.join(f':{name}' for name in values)}, :from_profile)"
        f" ON CONFLICT (engine_id, conditions_id) DO UPDATE SET {changes} WHERE {new} < {old} OR ({new} = {old}"
        # what is dated in the future is of a wrong clock: it would never be replaced
        " AND (julianday(excluded.measured_at) BETWEEN julianday(latencies.measured_at) AND julianday('now', '+1 day')"
        " OR julianday(latencies.measured_at) > julianday('now', '+1 day')))",
        values | {"from_profile": int(from_profile)},
    )


def _conditions(connection: sqlite3.Connection, latency: LatencyRecord) -> int:
    """The id of a latency's conditions, which are inserted where they are new."""
    values = {name: getattr(latency, name) for name in _OF_CONDITIONS} | {"shape": _json(latency.shape)}
    known = " AND ".join(f"{name} = :{name}" for name in values)
    row = connection.execute(f"SELECT id FROM conditions WHERE {known}", values).fetchone()
    return int(row["id"]) if row else insert(connection, "conditions", values)


@readable()
def read_build(row: sqlite3.Row) -> BuildRecord:
    _check_types("builds", row)
    values = {field.name: row[field.name] for field in fields(BuildRecord)}
    texts = {name: json.loads(values[name]) for name in _TEXTS}
    return BuildRecord(**{**values, **texts})


@readable()
def read_engine(row: sqlite3.Row, latencies: tuple[LatencyRecord, ...], root: Path) -> EngineRecord:
    """An engine from its row joined with its build's.

    Args:
        root: the registry's folder.
    """
    _check_types("engines", row)
    file = Path(row["file"])
    if file.is_absolute() or ".." in file.parts:
        raise ValueError(f"the file {row['file']!r} is outside of the registry")
    seen, cascade = row["verification"], row["cascade"]
    return EngineRecord(
        **{name: row[name] for name in (*OF_A_BUILD, *_OF_AN_ENGINE, *_OF_A_FILE)},
        route=read_route(row["route"]),
        cascade=None if cascade is None else _read_facts(cascade),
        input_shape=tuple(json.loads(row["input_shape"])),
        preprocessing=json.loads(row["preprocessing"]),
        verification=None if seen is None else Verification.from_json(json.loads(seen)),
        latencies=latencies,
        path=root / file,
        build_id=row["build_id"],
        built_at=row["finished_at"],
    )


def read_route(text: str) -> Route | Cascade:
    """A route, which is stored as a list, or a cascade."""
    table = json.loads(text)
    if not isinstance(table, dict):
        return Route.from_json(table)
    from klas_zoo.cascades.definition import Cascade  # not at the top: a pick of other engines does without

    return Cascade.from_json(table)


def _read_facts(text: str) -> CascadeFacts:
    from klas_zoo.cascades.records import CascadeFacts

    return CascadeFacts.from_json(json.loads(text))


@readable()
def read_latency(row: sqlite3.Row) -> LatencyRecord:
    _check_types("latencies", row)
    kind: type[LatencyRecord] = LatencyRecord if row["origin"] == "measured" else EstimatedLatency
    if row["paths_ms"] is not None:
        kind = CascadeLatency
    values = {field.name: row[field.name] for field in fields(kind)}
    if row["paths_ms"] is not None:
        values["paths_ms"] = tuple(map(float, json.loads(row["paths_ms"])))
    unknown = {name: math.nan for name, value in values.items() if value is None}
    return kind(**{**values, **unknown, "shape": tuple(json.loads(row["shape"]))})


def insert(connection: sqlite3.Connection, table: str, values: Mapping[str, Any]) -> int:
    """Inserts one row whose columns are the keys; returns its id."""
    names = ", ".join(values)
    marks = ", ".join(f":{name}" for name in values)
    row = connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", values).lastrowid
    assert row is not None
    return row


def _check_types(table: str, row: sqlite3.Row) -> None:
    """SQLite stores values of any type in any column."""
    for kind, names in ((str, _TEXT_COLUMNS[table]), (int, _INTEGER_COLUMNS[table])):
        for name in names:
            if not isinstance(row[name], kind):
                raise TypeError(f"its {name} is {row[name]!r}")


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)
