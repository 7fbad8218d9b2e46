"""The registry's database file: its schema, how it is made and opened, and how its errors read.

What is registered, and in which order it is written, is `klas_zoo.registry`'s business.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from klas_zoo.errors import DamagedRegistry, NewerRegistry, RegistryError
from klas_zoo.files import replacing

SCHEMA_VERSION = 1
_APPLICATION_ID = 0x6B6C6173  # "klas", so that another program's database is never taken for ours

_SCHEMA = f"""
PRAGMA journal_mode = WAL;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
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
"""


def is_there(database: Path) -> bool:
    """Whether a database that this version reads is there; looks at its header and touches nothing.

    SQLite itself would leave files beside a newer registry. Where a header keeps the version
    and the application is fixed: https://sqlite.org/fileformat2.html#the_database_header

    Raises:
        NewerRegistry: a newer klas-zoo made it.
        DamagedRegistry: it is something else.
        OSError: it cannot be read.
    """
    try:
        with database.open("rb") as file:
            header = file.read(100)
    except FileNotFoundError:
        return False
    if not header:
        return False
    if len(header) < 100 or not header.startswith(b"SQLite format 3\0"):
        raise DamagedRegistry(f"{database} is no SQLite database: move it away and run klas-zoo build again.")
    if int.from_bytes(header[68:72], "big") != _APPLICATION_ID:
        raise DamagedRegistry(f"{database} is not a registry of klas-zoo: name another folder.")
    _check_version(database, int.from_bytes(header[60:64], "big"))
    return True


def create(database: Path) -> None:
    """Makes an empty registry in one step; the caller holds the lock."""
    # logs of a database that somebody deleted would be played into the new one
    for suffix in ("-wal", "-shm"):
        _beside(database, suffix).unlink(missing_ok=True)
    with replacing(database) as temporary, closing(sqlite3.connect(temporary)) as connection:
        connection.executescript(_SCHEMA)


def connect(database: Path, *, timeout_s: float = 10) -> sqlite3.Connection:
    """A connection in autocommit mode; where nothing can be written, one that only reads.

    Args:
        timeout_s: how long a statement waits for another process, in seconds.
    """
    try:
        # read-write even to read: the last one that leaves then tidies the log away
        return _attach(database, "mode=rw", timeout_s)
    except sqlite3.OperationalError:
        log = _beside(database, "-wal")
        if log.exists() and log.stat().st_size:
            raise
    # To read a WAL database SQLite has to write beside it. Without a log the file itself is
    # complete, and is not written: whoever could would write a log first.
    return _attach(database, "immutable=1", timeout_s)


def _attach(database: Path, how: str, timeout_s: float) -> sqlite3.Connection:
    uri = f"{database.as_uri()}?{how}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=timeout_s)
    try:
        connection.row_factory = sqlite3.Row
        # a version that is still in the log does not show in the header
        _check_version(database, connection.execute("PRAGMA user_version").fetchone()[0])
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA synchronous = FULL")
    except BaseException:
        connection.close()
        raise
    return connection


def _check_version(database: Path, found: int) -> None:
    if found > SCHEMA_VERSION:
        raise NewerRegistry(
            f"The registry {database.parent} was made by a newer klas-zoo: its schema is {found}, this one "
            f"knows up to {SCHEMA_VERSION}. Upgrade klas-zoo, or name another registry."
        )
    if found < SCHEMA_VERSION:
        raise DamagedRegistry(f"{database} has schema {found}, which no klas-zoo made: move it away.")


def _beside(database: Path, suffix: str) -> Path:
    return database.with_name(database.name + suffix)


@contextmanager
def in_one_sentence(root: Path, done: str) -> Iterator[None]:
    """Turns what the disk and SQLite raise while the registry is `done` into errors for people.

    Bugs (a broken constraint, a wrong use of the interface) stay what they are.

    Raises:
        DamagedRegistry: SQLite does not understand the file.
        RegistryError: anything else: no permission, no space, another process for too long.
    """
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise
    except sqlite3.Error as error:
        # OperationalError is about the world around the file, except where a table is gone
        world = isinstance(error, sqlite3.OperationalError) and "no such" not in str(error)
        if not world:
            raise DamagedRegistry(
                f"The registry {root} is damaged ({error}): move it away and run klas-zoo build again."
            ) from error
        raise RegistryError(f"The registry {root} cannot be {done}: {error}.{_advice(str(error))}") from error
    except OSError as error:
        what = error.strerror or type(error).__name__
        where = f" ({error.filename})" if error.filename else ""
        raise RegistryError(f"The registry {root} cannot be {done}: {what}{where}.{_advice(what)}") from error


def _advice(message: str) -> str:
    """What to do about the commonest of SQLite's and the system's messages."""
    lower = message.lower()
    for words, advice in (
        (("full", "no space", "quota"), " Free some space; what was registered before is unchanged."),
        (("locked",), " Another process is writing to it: try again."),
        (("unable to open", "readonly", "read-only", "permission"), " Check who may write to that folder."),
    ):
        if any(word in lower for word in words):
            return advice
    return ""
