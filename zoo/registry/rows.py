"""Records as rows of the registry's tables, and back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from klas_zoo.exporters.records import Verification
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.registry.records import BuildRecord, EngineRecord, NewEngine
from klas_zoo.routes import Route

OF_A_BUILD = ("family", "device", "weights", "dataset", "data_fingerprint")
"""What an engine and its build have in common; stands in the build's row."""
_OF_AN_ENGINE = ("runtime", "precision", "macs", "parameters", "top1", "images")
_OF_A_FILE = ("sha256", "size_bytes")
_TEXTS = ("settings", "versions", "manifest")


def insert_build(connection: sqlite3.Connection, build: BuildRecord) -> int:
    """Inserts the current build of its family and device; its id."""
    texts = {name: _json(dict(getattr(build, name))) for name in _TEXTS}
    return insert(connection, "builds", {**vars(build), **texts, "current": 1})


def insert_engine(
    connection: sqlite3.Connection, build_id: int, engine: NewEngine, file: Mapping[str, str | int]
) -> None:
    """Inserts an engine and its latencies; `file` is what was stored: `sha256` and `size_bytes`."""
    values = {name: getattr(engine, name) for name in _OF_AN_ENGINE} | {
        "route": _json(engine.route.to_json()),
        "input_shape": _json(engine.input_shape),
        "verification": _json(vars(engine.verification)),
    }
    engine_id = insert(connection, "engines", values | dict(file) | {"build_id": build_id})
    for latency in engine.latencies:
        texts = {"shape": _json(latency.shape)}
        insert(connection, "latencies", {**vars(latency), **texts, "engine_id": engine_id})


def read_build(row: sqlite3.Row) -> BuildRecord:
    values = {field.name: row[field.name] for field in fields(BuildRecord)}
    texts = {name: json.loads(values[name]) for name in _TEXTS}
    return BuildRecord(**{**values, **texts})


def read_engine(row: sqlite3.Row, latencies: tuple[LatencyRecord, ...], path: Path) -> EngineRecord:
    """An engine from its row joined with its build's."""
    return EngineRecord(
        **{name: row[name] for name in (*OF_A_BUILD, *_OF_AN_ENGINE, *_OF_A_FILE)},
        route=Route.from_json(json.loads(row["route"])),
        input_shape=tuple(json.loads(row["input_shape"])),
        verification=Verification.from_json(json.loads(row["verification"])),
        latencies=latencies,
        path=path,
        build_id=row["build_id"],
        built_at=row["finished_at"],
    )


def read_latency(row: sqlite3.Row) -> LatencyRecord:
    values = {field.name: row[field.name] for field in fields(LatencyRecord)}
    return LatencyRecord(**{**values, "shape": tuple(json.loads(row["shape"]))})


def insert(connection: sqlite3.Connection, table: str, values: Mapping[str, Any]) -> int:
    """Inserts one row whose columns are the keys; its id."""
    names = ", ".join(values)
    marks = ", ".join(f":{name}" for name in values)
    row = connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", values).lastrowid
    assert row is not None
    return row


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)
