"""Checking a registry: that every row and every file is what it should be, and which files are not needed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from klas_zoo.errors import DamagedRegistry
from klas_zoo.registry import Registry, rows
from klas_zoo.registry.packages import check_package, files_of, package_folder
from klas_zoo.registry.records import EngineRecord
from klas_zoo.registry.store import check_file
from klas_zoo.registry.tags import POINTS
from klas_zoo.registry.upkeep import referred, supernets_of_builds, unreferenced

Kind = Literal["damaged", "dangling", "unreadable", "unverified", "orphan", "left over"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not as it should be.

    Attributes:
        kind: `damaged` file or database, `dangling` or `unreadable` row, `unverified` engine; or, which is
            harmless, an `orphan` that no row refers to, or a file `left over` from an incomplete copy.
        what: a sentence.
    """

    kind: Kind
    what: str
    path: Path | None = None
    size_bytes: int = 0

    @property
    def harmless(self) -> bool:
        return self.kind in ("orphan", "left over")

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"path": str(self.path) if self.path else None, "harmless": self.harmless}


def check(
    registry: Registry, *, content: bool = True, on_engine: Callable[[EngineRecord], None] = lambda engine: None
) -> list[Finding]:
    """Everything that is wrong with a registry; changes nothing.

    Args:
        content: also compare every engine's SHA-256; without, only sizes.
        on_engine: called before each engine's file is read.

    Raises:
        RegistryError: the registry cannot be read at all.
    """
    with _still(registry), registry.reading() as connection:
        findings = list(_rows(connection))
        engines = []
        for row in connection.execute(
            f"SELECT engines.*, finished_at, {', '.join(rows.OF_A_BUILD)} FROM engines"
            " JOIN builds ON builds.id = engines.build_id ORDER BY engines.id"
        ):
            try:
                engines.append(_engine(registry, connection, row))
            except rows.UnreadableRow as error:
                what = f"engine {row['id']} of build {row['build_id']} cannot be understood: {error}"
                findings.append(Finding(kind="unreadable", what=what))
        for one in unreferenced(registry, referred(registry, connection), supernets_of_builds(registry, connection)):
            findings.append(
                Finding(
                    kind="left over" if one.left_over else "orphan",
                    what="an incomplete copy" if one.left_over else "no build refers to this",
                    path=one.path,
                    size_bytes=one.size_bytes,
                )
            )
    # without the lock: hashing takes long, and what is registered meanwhile changes no file
    packages: dict[str, dict[str, tuple[int, str]]] = {}
    for engine in engines:
        on_engine(engine)
        if engine.package and engine.package not in packages:
            packages[engine.package], found = _package(registry, engine.package, content)
            findings += found
        findings += _engine_findings(engine, content, packages.get(engine.package, {}))
    return _without_removed(registry, findings)


def _still(registry: Registry) -> AbstractContextManager[None]:
    """Keeps others from adding files meanwhile, which would look like orphans; where that can be done."""
    from os import W_OK, access

    lock = registry.root / "store.lock"
    may = access(lock, W_OK) if lock.exists() else access(registry.root, W_OK)
    return registry.changing_files() if may else nullcontext()


def _rows(connection: sqlite3.Connection) -> Iterator[Finding]:
    for (sentence,) in connection.execute("PRAGMA integrity_check"):
        if sentence != "ok":
            yield Finding(kind="damaged", what=f"the database: {sentence}")
    for table, number, parent, _ in connection.execute("PRAGMA foreign_key_check"):
        yield Finding(kind="dangling", what=f"row {number} of {table} refers to {parent} that are not there")
    for what, query in (
        ("is current, but has no engines", "current AND id NOT IN (SELECT build_id FROM engines)"),
        ("was removed, but is current or has engines",
         "removed_at IS NOT NULL AND (current OR id IN (SELECT build_id FROM engines))"),
        ("is what a tag points to, but was removed",
         f"removed_at IS NOT NULL AND id IN (SELECT build_id FROM ({POINTS}))"),
    ):  # fmt: skip
        for row in connection.execute(f"SELECT id FROM builds WHERE {query}"):
            yield Finding(kind="dangling", what=f"build {row['id']} {what}")
    for row in connection.execute("SELECT * FROM builds"):
        try:
            rows.read_build(row)
        except rows.UnreadableRow as error:
            yield Finding(kind="unreadable", what=f"build {row['id']} cannot be understood: {error}")


def _engine(registry: Registry, connection: sqlite3.Connection, row: sqlite3.Row) -> EngineRecord:
    latencies = connection.execute(
        f"SELECT * FROM {rows.LATENCIES} WHERE engine_id = ? ORDER BY {rows.IN_ORDER}", (row["id"],)
    )
    return rows.read_engine(row, tuple(map(rows.read_latency, latencies)), registry.root)


def _package(registry: Registry, digest: str, content: bool) -> tuple[dict[str, tuple[int, str]], list[Finding]]:
    """Size and SHA-256 of each file of a package, by its manifest, and what is wrong with the package."""
    folder = package_folder(registry.root, digest)
    try:
        check_package(folder, digest, content=lambda name: content)
        return files_of(folder), []
    except DamagedRegistry as error:
        return {}, [Finding(kind="damaged", what=str(error), path=folder)]


def _engine_findings(
    engine: EngineRecord, content: bool, files: Mapping[str, tuple[int, str]]
) -> Iterator[Finding]:
    """
    Args:
        files: of the engine's package; empty where it has none, or a damaged one that was reported.
    """
    if engine.verification is not None and not engine.verification.passed:
        what = f"engine {engine.route} of build {engine.build_id} did not pass its verification"
        yield Finding(kind="unverified", what=what, path=engine.path)
    if not engine.package:
        try:
            check_file(engine, content=content)
        except DamagedRegistry as error:
            yield Finding(kind="damaged", what=str(error), path=engine.path, size_bytes=engine.size_bytes)
    elif files and files.get(engine.path.name) != (engine.file_bytes, engine.sha256):
        what = f"engine {engine.route} of build {engine.build_id} is not the file of that name in its package"
        yield Finding(kind="damaged", what=what, path=engine.path, size_bytes=engine.size_bytes)


def _without_removed(registry: Registry, findings: list[Finding]) -> list[Finding]:
    """Leaves out files that were removed, together with their rows, while they were read."""
    with registry.reading() as connection:
        kept = referred(registry, connection)
        kept |= {registry.root / row["file"] for row in connection.execute("SELECT file FROM engines")}
    return [one for one in findings if one.kind != "damaged" or one.path is None or one.path in kept]
