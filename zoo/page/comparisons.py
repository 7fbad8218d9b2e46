"""Which engines `klas-zoo pick` would compare, for every question that the page lets one ask.

The conditions are chosen by `klas_zoo.registry.candidates`, which `pick` uses too; the page only applies limits to
the engines that compare.
"""

from __future__ import annotations

import shlex
import sqlite3
from collections.abc import Mapping
from typing import Any

from klas_zoo.errors import KlasZooError
from klas_zoo.registry.candidates import Query, comparable
from klas_zoo.registry.tags import builds_of


def comparisons(
    connection: sqlite3.Connection, numbers: Mapping[int, int], *, family: str | None, device: str | None, root: str
) -> list[dict[str, Any]]:
    """One for each family and all of them, device, hardware and batch size.

    Args:
        numbers: the place of each engine in the page's list, by its number in the database.
        family: only this one, or the builds of a tag; then there is no comparison over all families.
        root: the registry's folder, for messages.

    Returns:
        For each: `family` (None: all), `device`, `hardware`, `batch`, `arguments` of a pick that compares so,
        `left_out`, and `rows` `[place, p50, p90, p99, origin, order]`, or an `error` instead of rows. Rows of equal
        numbers are preferred by `order`.
    """
    found: list[dict[str, Any]] = []
    for one in _questions(connection, family, device):
        known: set[str] = set()
        errors: list[str] = []
        for hardware in (None, *one["hardware"]):
            asked = Query(family=one["family"], device=one["device"], batch=one["batch"], hardware=hardware)
            try:
                seen = comparable(connection, asked, root)
            except KlasZooError as error:
                errors.append(str(error))
                continue
            if seen.hardware not in known:
                known.add(seen.hardware)
                found.append(_facts(asked, seen.hardware, seen.left_out) | {"rows": _rows(connection, numbers)})
        if not known:
            asked = Query(family=one["family"], device=one["device"], batch=one["batch"])
            found.append(_facts(asked, "", ()) | {"error": errors[0], "rows": []})
    return found


def _questions(connection: sqlite3.Connection, family: str | None, device: str | None) -> list[dict[str, Any]]:
    """Families, devices and batch sizes there are latencies of, with the hardware of these."""
    chosen, names = builds_of(connection, family, device)
    rows = connection.execute(
        "SELECT DISTINCT family, builds.device AS device, conditions.batch AS batch, conditions.hardware AS hardware"
        " FROM builds CROSS JOIN engines ON engines.build_id = builds.id"
        " LEFT JOIN latencies ON latencies.engine_id = engines.id"
        f" LEFT JOIN conditions ON conditions.id = latencies.conditions_id WHERE {chosen} ORDER BY 1, 2, 3, 4",
        names,
    ).fetchall()
    asked: dict[tuple[str | None, str, int], set[str]] = {}
    for row in rows:
        own = family if family is not None else row["family"]
        for scope in {own, family}:  # without a family: its own, and all of them
            key = (scope, row["device"], row["batch"] or 1)
            asked.setdefault(key, set())
            if row["hardware"] is not None:
                asked[key].add(row["hardware"])
    return [
        {"family": scope, "device": where, "batch": batch, "hardware": sorted(hardware)}
        for (scope, where, batch), hardware in sorted(asked.items(), key=lambda one: (one[0][0] or "", *one[0][1:]))
    ]


def _facts(asked: Query, hardware: str, left_out: tuple[str, ...]) -> dict[str, Any]:
    words = ["--device", str(asked.device)]
    words += ["--family", asked.family] if asked.family is not None else []
    words += ["--batch", str(asked.batch)] if asked.batch != 1 else []
    words += ["--hardware", asked.hardware] if asked.hardware is not None else []
    return {
        "family": asked.family, "device": asked.device, "hardware": hardware, "batch": asked.batch,
        "arguments": shlex.join(words), "left_out": list(left_out),
    }  # fmt: skip


def _rows(connection: sqlite3.Connection, numbers: Mapping[int, int]) -> list[list[Any]]:
    """Of the table of comparable latencies, sorted as a pick prefers among equals."""
    rows = connection.execute(
        "SELECT candidates.engine_id AS engine, candidates.p50_ms, candidates.p90_ms, candidates.p99_ms, origin"
        " FROM candidates JOIN latencies USING (engine_id, conditions_id) ORDER BY candidates.name, candidates.rowid"
    )
    return [
        [numbers[row["engine"]], row["p50_ms"], row["p90_ms"], row["p99_ms"], row["origin"], order]
        for order, row in enumerate(rows)
        if row["engine"] in numbers
    ]
