"""The registry's schema as a list of migrations: version n is the result of the first n of them.

A released migration is never changed. To change the schema, append a migration whose statements turn
any registry of the version before, rows included, into the next one; first add a registry of the
version before to the tests where there is none yet: python tests/golden/make.py.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Migration:
    """The SQL that leads from one version of the schema to the next, and its purpose in a few words."""

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
            raise ValueError(f"the migration '{self.purpose}' ends in the middle of a statement")


STEPS = (
    Migration(
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
    Migration(
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
    Migration(
        "what each build was made from, and how long its stages took",
        """
        ALTER TABLE builds ADD COLUMN manifest TEXT NOT NULL DEFAULT '{}';
        """,
    ),
    Migration(
        # Engines of every format, precision and runtime, as files of packages; `file` is relative to the
        # registry's folder. Engines of earlier versions keep their files: engines/ab/ab12….onnx.
        # A latency belongs to the conditions it was measured under, so that an engine has several;
        # `from_profile` is 0 where a build, add or install measured or predicted under these conditions itself.
        # Machines that share a registry have a current build each, and a tag points to one of each machine:
        # to all builds of the newest `operation` that moved it on a device.
        "packages, engines of every runtime, conditions of latencies",
        """
        ALTER TABLE builds ADD COLUMN kind TEXT NOT NULL DEFAULT 'build';
        CREATE TABLE packages (
            id INTEGER PRIMARY KEY,
            build_id INTEGER NOT NULL REFERENCES builds (id),
            digest TEXT NOT NULL, format TEXT NOT NULL, precision TEXT NOT NULL, size_bytes INTEGER NOT NULL,
            UNIQUE (build_id, digest)
        );
        CREATE TABLE engines_new (
            id INTEGER PRIMARY KEY,
            build_id INTEGER NOT NULL REFERENCES builds (id),
            route TEXT NOT NULL, format TEXT NOT NULL, runtime TEXT NOT NULL, precision TEXT NOT NULL,
            status TEXT NOT NULL, reason TEXT NOT NULL,
            file TEXT NOT NULL, package TEXT NOT NULL, sha256 TEXT NOT NULL,
            file_bytes INTEGER NOT NULL, size_bytes INTEGER NOT NULL,
            macs INTEGER NOT NULL, parameters INTEGER NOT NULL,
            input_shape TEXT NOT NULL, num_classes INTEGER NOT NULL, preprocessing TEXT NOT NULL,
            top1 REAL NOT NULL, top5 REAL, images INTEGER NOT NULL, accuracy_source TEXT NOT NULL,
            dataset TEXT NOT NULL, data_fingerprint TEXT NOT NULL, verification TEXT
        );
        INSERT INTO engines_new
            SELECT engines.id, build_id, route, 'onnx', runtime, precision, 'verified', '',
                'engines/' || substr(sha256, 1, 2) || '/' || sha256 || '.onnx', '', sha256, size_bytes, size_bytes,
                macs, parameters, input_shape, 0, '{}',
                top1, NULL, images, '', dataset, data_fingerprint, verification
            FROM engines JOIN builds ON builds.id = engines.build_id;
        CREATE TABLE conditions (
            id INTEGER PRIMARY KEY,
            device TEXT NOT NULL, hardware TEXT NOT NULL,
            runtime TEXT NOT NULL, runtime_version TEXT NOT NULL, provider TEXT NOT NULL, options TEXT NOT NULL,
            precision TEXT NOT NULL, threads INTEGER NOT NULL, batch INTEGER NOT NULL, shape TEXT NOT NULL,
            clock TEXT NOT NULL,
            UNIQUE
                (device, hardware, runtime, runtime_version, provider, options, precision, threads, batch, shape, clock)
        );
        INSERT INTO conditions
            SELECT DISTINCT NULL, device, hardware, runtime, runtime_version, provider, '', precision, threads, batch,
                shape, 'host'
            FROM latencies;
        CREATE TABLE latencies_new (
            engine_id INTEGER NOT NULL REFERENCES engines (id),
            conditions_id INTEGER NOT NULL REFERENCES conditions (id),
            runs INTEGER NOT NULL,
            min_ms REAL, p50_ms REAL NOT NULL, p90_ms REAL, p99_ms REAL,
            coefficient_of_variation REAL, origin TEXT NOT NULL, measured_at TEXT NOT NULL,
            error_percent REAL, error_method TEXT,
            from_profile INTEGER NOT NULL,
            PRIMARY KEY (engine_id, conditions_id)
        );
        INSERT INTO latencies_new
            SELECT engine_id, conditions.id, runs, min_ms, p50_ms, p90_ms, p99_ms, coefficient_of_variation, origin,
                measured_at, NULL, NULL, 0
            FROM latencies JOIN conditions USING
                (device, hardware, runtime, runtime_version, provider, precision, threads, batch, shape);
        DROP TABLE latencies;
        DROP TABLE engines;
        ALTER TABLE engines_new RENAME TO engines;
        ALTER TABLE latencies_new RENAME TO latencies;
        CREATE INDEX engines_of_a_build ON engines (build_id, status);
        CREATE INDEX packages_by_digest ON packages (digest);
        DROP INDEX one_current_build;
        CREATE UNIQUE INDEX one_current_build ON builds (family, device, hardware) WHERE current;
        ALTER TABLE tag_moves ADD COLUMN operation INTEGER NOT NULL DEFAULT 0;
        UPDATE tag_moves SET operation = id;
        """,
    ),
    Migration(
        # A cascade is an engine whose `route` is the JSON of its stages, an object where that of a route is a list,
        # and whose `file` is the list of cascades in its package. These columns are NULL for all other engines.
        "cascades: shares of images, and the mean, worst case and paths of their latencies",
        """
        ALTER TABLE engines ADD COLUMN cascade TEXT;
        ALTER TABLE latencies ADD COLUMN mean_ms REAL;
        ALTER TABLE latencies ADD COLUMN worst_ms REAL;
        ALTER TABLE latencies ADD COLUMN paths_ms TEXT;
        """,
    ),
)
SCHEMA_VERSION = len(STEPS)


def version_of(connection: sqlite3.Connection) -> int:
    version: int = connection.execute("PRAGMA user_version").fetchone()[0]
    return version


def upgrade(
    connection: sqlite3.Connection,
    steps: tuple[Migration, ...] = STEPS,
    finish: Callable[[sqlite3.Connection], None] = lambda connection: None,
) -> None:
    """Applies the migrations that the registry lacks, all or none of them. The connection is in autocommit mode.

    Args:
        finish: called after the last migration, in the same transaction, if the registry was of an earlier version.
    """
    # a migration may replace a table that others refer to; inside a transaction this pragma has no effect
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("BEGIN IMMEDIATE")
    try:
        # read again: another process may have upgraded it meanwhile
        missing = list(enumerate(steps, start=1))[version_of(connection) :]
        for number, step in missing:
            for statement in step.statements():
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
        if missing:
            finish(connection)
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    finally:
        connection.execute("PRAGMA foreign_keys = ON")
