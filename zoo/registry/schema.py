"""The registry's schema, told as the steps that made it: version n is what the first n steps leave.

A step that was released is never changed. Who needs another schema appends a step, whose
statements turn any registry of the version before into the next one, rows included; and, where
it is not there yet, first keeps a registry of the version before: python tests/golden/make.py.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """What leads from one version of the schema to the next: SQL, and what it is for, in a few words."""

    purpose: str
    sql: str

    def statements(self) -> Iterator[str]:
        """One by one: SQLite's own executescript would commit after each."""
        statement = ""
        for line in self.sql.splitlines(keepends=True):
            statement += line
            if sqlite3.complete_statement(statement):
                yield statement.strip()
                statement = ""
        if statement.strip():
            raise ValueError(f"the step '{self.purpose}' ends in the middle of a statement")


STEPS = (
    Step(
        "builds, their engines and latencies",
        """
        CREATE TABLE builds (
            id INTEGER PRIMARY KEY,
            family TEXT NOT NULL, device TEXT NOT NULL,
            weights TEXT NOT NULL, dataset TEXT NOT NULL, data_fingerprint TEXT NOT NULL,
            command TEXT NOT NULL, settings TEXT NOT NULL, versions TEXT NOT NULL, hardware TEXT NOT NULL,
            started_at TEXT NOT NULL, finished_at TEXT NOT NULL,
            current INTEGER NOT NULL CHECK (current IN (0, 1))
        );
        CREATE UNIQUE INDEX one_current_build ON builds (family, device) WHERE current;
        CREATE TABLE engines (
            id INTEGER PRIMARY KEY,
            build_id INTEGER NOT NULL REFERENCES builds (id),
            route TEXT NOT NULL, runtime TEXT NOT NULL, precision TEXT NOT NULL,
            sha256 TEXT NOT NULL, size_bytes INTEGER NOT NULL,
            macs INTEGER NOT NULL, parameters INTEGER NOT NULL, input_shape TEXT NOT NULL,
            top1 REAL NOT NULL, images INTEGER NOT NULL, verification TEXT NOT NULL
        );
        CREATE INDEX engines_of_a_build ON engines (build_id);
        CREATE TABLE latencies (
            engine_id INTEGER NOT NULL REFERENCES engines (id),
            device TEXT NOT NULL, hardware TEXT NOT NULL,
            runtime TEXT NOT NULL, runtime_version TEXT NOT NULL, provider TEXT NOT NULL, precision TEXT NOT NULL,
            threads INTEGER NOT NULL, batch INTEGER NOT NULL, shape TEXT NOT NULL, runs INTEGER NOT NULL,
            min_ms REAL NOT NULL, p50_ms REAL NOT NULL, p90_ms REAL NOT NULL, p99_ms REAL NOT NULL,
            coefficient_of_variation REAL NOT NULL, origin TEXT NOT NULL, measured_at TEXT NOT NULL,
            PRIMARY KEY (engine_id, batch)
        );
        """,
    ),
    Step(
        # the newest move of a tag says where it points; build_id NULL: nowhere any more. Moves are
        # ordered by id, not by time: clocks go backwards. A removed build keeps its row for them.
        "tags, and builds that were removed",
        """
        CREATE TABLE tag_moves (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            family TEXT NOT NULL, tag TEXT NOT NULL, device TEXT NOT NULL,
            build_id INTEGER REFERENCES builds (id),
            moved_at TEXT NOT NULL
        );
        CREATE INDEX moves_of_a_tag ON tag_moves (family, tag, device, id);
        ALTER TABLE builds ADD COLUMN removed_at TEXT;
        """,
    ),
    Step(
        "what each build was made from, and how long its stages took",
        """
        ALTER TABLE builds ADD COLUMN manifest TEXT NOT NULL DEFAULT '{}';
        """,
    ),
)
SCHEMA_VERSION = len(STEPS)


def version_of(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def upgrade(connection: sqlite3.Connection, steps: tuple[Step, ...] = STEPS) -> None:
    """Takes the steps that the registry lacks, all or none of them. The connection is in autocommit mode."""
    # a step may make a table anew, to which others refer; changed inside a transaction this has no effect
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("BEGIN IMMEDIATE")
    try:
        for number, step in enumerate(steps[version_of(connection) :], start=version_of(connection) + 1):
            for statement in step.statements():
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    finally:
        connection.execute("PRAGMA foreign_keys = ON")
