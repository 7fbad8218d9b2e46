"""The registry's database file: how it is made, opened and upgraded, and how its errors read.

`klas_zoo.registry.schema` has its tables; `klas_zoo.registry.store` decides in which order they are written. Reading
never changes a registry: one of an older version is read through a copy in memory that is upgraded there. Writing
upgrades the file first, in one transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from klas_zoo.errors import DamagedRegistry, NewerRegistry, RegistryError
from klas_zoo.files import replacing
from klas_zoo.filesystems import network_file_system
from klas_zoo.registry.schema import SCHEMA_VERSION, upgrade, version_of

OnUpgrade = Callable[[sqlite3.Connection], None]

_APPLICATION_ID = 0x6B6C6173  # "klas", so that another program's database is never taken for ours


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
        connection.isolation_level = None
        connection.execute(f"PRAGMA journal_mode = {_journal(database)}")
        connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        upgrade(connection)


def connect(database: Path, *, timeout_s: float = 10) -> sqlite3.Connection:
    """A connection in autocommit mode; where nothing can be written, one that only reads.

    Args:
        timeout_s: how long a statement waits for another process, in seconds.
    """
    return _connect(database, timeout_s)[0]


def _journal(database: Path) -> str:
    """How SQLite keeps changes that are not complete: a log that readers share needs memory that all of them see.

    Machines share none, so on a file system of several machines it is a rollback journal (https://sqlite.org/wal.html).
    """
    return "DELETE" if network_file_system(database.parent) else "WAL"


def _set_journal(connection: sqlite3.Connection, database: Path) -> None:
    """Changes a database that was copied to another kind of file system, or made there by an earlier version."""
    wanted = _journal(database)
    (found,) = connection.execute("PRAGMA journal_mode").fetchone()
    if found.upper() == wanted:
        return
    try:
        connection.execute(f"PRAGMA journal_mode = {wanted}")
    except sqlite3.OperationalError:
        if wanted == "DELETE":  # somebody has it open with the log
            raise


def _connect(database: Path, timeout_s: float = 10) -> tuple[sqlite3.Connection, bool]:
    """A connection as `connect` gives it, and whether it takes locks."""
    if _has_log(database) and (shared := network_file_system(database.parent)):
        log = _beside(database, "-wal")
        if log.exists() and log.stat().st_size:
            raise RegistryError(
                f"The registry {database.parent} lies on a file system that machines share ({shared}), and {log.name} "
                "holds changes that only the machine that wrote them can read: run klas-zoo registry gc there."
            )
        return _attach(database, "immutable=1", timeout_s), False
    try:
        # read-write even to read: the last one that leaves then tidies the log away
        return _attach(database, "mode=rw", timeout_s), True
    except sqlite3.OperationalError:
        for log in (_beside(database, "-wal"), _beside(database, "-journal")):
            if log.exists() and log.stat().st_size:
                raise
    # To read a WAL database SQLite has to write beside it. Without a log the file itself is complete.
    return _attach(database, "immutable=1", timeout_s), False


@contextmanager
def reading(database: Path, on_upgrade: OnUpgrade = lambda connection: None) -> Iterator[sqlite3.Connection]:
    """A connection that sees one moment, at this version's schema; nothing on the disk is changed.

    Args:
        on_upgrade: called with the upgraded copy of a registry of an earlier version.
    """
    before = _stamp(database)
    connection, locks = _connect(database)
    with closing(connection):
        connection.execute("BEGIN")
        found = version_of(connection)  # the moment that is seen begins here
        _check_version(database, found)
        if found == SCHEMA_VERSION:
            yield connection
        else:
            with closing(sqlite3.connect(":memory:", isolation_level=None)) as copy:
                connection.backup(copy)
                copy.row_factory = sqlite3.Row
                upgrade(copy, finish=on_upgrade)
                yield copy
    if not locks and _stamp(database) != before:
        # another process wrote to the file meanwhile, so that pages of two moments may have been read
        raise sqlite3.OperationalError("database is locked")


def _stamp(database: Path) -> tuple[int, int, int]:
    """Changes when a file is written or replaced."""
    found = database.stat()
    return found.st_mtime_ns, found.st_size, found.st_ino


@contextmanager
def transaction(
    database: Path, on_upgrade: OnUpgrade = lambda connection: None, *, timeout_s: float = 60
) -> Iterator[sqlite3.Connection]:
    """A connection that alone may write, at this version's schema; commits at the end, or changes nothing.

    Args:
        on_upgrade: called in the transaction that upgrades a registry of an earlier version.
    """
    # never the connection that only reads: it would say "readonly" of a disk that is full
    with closing(_attach(database, "mode=rw", timeout_s)) as connection:
        if version_of(connection) < SCHEMA_VERSION:
            upgrade(connection, finish=on_upgrade)
        _set_journal(connection, database)
        connection.execute("BEGIN IMMEDIATE")
        try:
            _check_version(database, version_of(connection))
            yield connection
            connection.execute("COMMIT")
            # else whoever reads next and closes last would have to sync the disk; what is kept is kept without it
            with suppress(sqlite3.OperationalError):
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _attach(database: Path, how: str, timeout_s: float) -> sqlite3.Connection:
    uri = f"{database.as_uri()}?{how}"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=timeout_s)
    try:
        connection.row_factory = sqlite3.Row
        # a version that is still in the log does not show in the header
        _check_version(database, version_of(connection))
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
    if found < 1:
        raise DamagedRegistry(f"{database} has schema {found}, which no klas-zoo made: move it away.")


def _has_log(database: Path) -> bool:
    """Whether its header says that changes are kept in a log that readers share."""
    with database.open("rb") as file:
        return file.read(20)[18:] == b"\2\2"


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
    except IndexError as error:
        if str(error) != "No item with that key":  # of sqlite3.Row: a column has lost its name
            raise
        raise _damaged(root, error) from error
    except UnicodeDecodeError as error:  # a damaged schema, quoted by SQLite in a message
        raise _damaged(root, error) from error
    except sqlite3.Error as error:
        # OperationalError is about the world around the file, except where a table is gone
        world = isinstance(error, sqlite3.OperationalError) and "no such" not in str(error)
        if not world:
            raise _damaged(root, error) from error
        what = str(error)
        if "disk I/O error" in what and _is_full(root):
            what += ", as the disk is full"  # it could not make the index of its log
        raise RegistryError(f"The registry {root} cannot be {done}: {what}.{_advice(what)}") from error
    except OSError as error:
        what = error.strerror or type(error).__name__
        where = f" ({error.filename})" if error.filename else ""
        raise RegistryError(f"The registry {root} cannot be {done}: {what}{where}.{_advice(what)}") from error


def _damaged(root: Path, error: Exception) -> DamagedRegistry:
    return DamagedRegistry(f"The registry {root} is damaged ({error}): move it away and run klas-zoo build again.")


def _is_full(root: Path) -> bool:
    """Whether there is not even room for the index of SQLite's log, 32 kB."""
    import shutil

    return root.is_dir() and shutil.disk_usage(root).free < 2**16


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
