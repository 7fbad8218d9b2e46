"""Looking after a registry: which builds it holds, removing some, and deleting what nobody refers to."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from klas_zoo.errors import UnknownName, UsageError
from klas_zoo.registry import Registry, database
from klas_zoo.registry.store import supernet_path
from klas_zoo.registry.tags import now, tags_of_builds

_LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{8}\.part")  # what klas_zoo.files.replacing calls its temporary files


@dataclass(frozen=True, kw_only=True)
class BuildSummary:
    """A build as lists show it; `size_bytes` of its engines, some of which others may have too."""

    number: int
    family: str
    device: str
    finished_at: str
    current: bool
    tags: tuple[str, ...]
    engines: int
    size_bytes: int
    removed_at: str | None

    def to_json(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """A file in the registry's folder that nobody refers to; `left_over` where a copy was cut short."""

    path: Path
    size_bytes: int
    left_over: bool


def builds(registry: Registry) -> list[BuildSummary]:
    """Every build that was ever registered, the newest first.

    Raises:
        RegistryError: the registry cannot be read.
    """
    with registry.reading() as connection:
        return _builds(connection)


def remove(registry: Registry, target: str, *, device: str | None = None) -> list[BuildSummary]:
    """Forgets the engines of one build, or of every build of a family; their files stay until `collect`.

    Args:
        target: the build's number, or the family's name.

    Raises:
        UsageError: no such build, family or device; or a tag points to one of the builds.
        RegistryError: the registry cannot be written.
    """
    with registry.changing() as connection:
        there = [build for build in _builds(connection) if build.removed_at is None]
        if target.isascii() and target.isdigit():
            found = [build for build in there if build.number == int(target[:18])]
            if not found:
                raise UsageError(f"There is no build {target[:18]}: klas-zoo registry builds shows those there are.")
        else:
            found = [build for build in there if build.family == target]
            if not found:
                raise UnknownName("family", target, {build.family for build in there})
        if device is not None and device not in {build.device for build in found}:
            raise UnknownName("device", device, {build.device for build in found})
        found = [build for build in found if device in (None, build.device)]
        for build in found:
            if build.tags:
                raise UsageError(
                    f"Build {build.number} is {' and '.join(build.tags)} on {build.device}: move that tag or "
                    "delete it (klas-zoo registry tag) before the build is removed. Nothing was removed."
                )
        _forget(connection, [build.number for build in found])
        return found


def collect(
    registry: Registry, *, old_builds: bool = False, dry_run: bool = False
) -> tuple[list[BuildSummary], list[Garbage]]:
    """Deletes the files that nobody refers to; waits for whoever is registering.

    Args:
        old_builds: first remove the builds that are neither current nor tagged.
        dry_run: change nothing.

    Returns:
        the builds that were removed and the files that were deleted, or would be.

    Raises:
        RegistryError: the registry cannot be read, or not be written.
    """
    with registry.changing_files():
        with registry.reading() as connection:
            known = _builds(connection)
            old = [b for b in known if old_builds and not b.current and not b.tags and b.removed_at is None]
            kept = referred(registry, connection, but_not={build.number for build in old})
        if old and not dry_run:
            with registry.changing() as connection:
                _forget(connection, [build.number for build in old])
        with database.in_one_sentence(registry.root, "tidied"):
            garbage = unreferenced(registry, kept)
            if not dry_run:
                for one in garbage:
                    one.path.unlink(missing_ok=True)
                _remove_empty_folders(registry.root / "engines")
    return old, garbage


def referred(registry: Registry, connection: sqlite3.Connection, but_not: Collection[int] = ()) -> set[Path]:
    """The files that builds need: their engines, and the supernet of each family and device."""
    engines = connection.execute("SELECT build_id, sha256 FROM engines")
    paths = {registry.path_of(row["sha256"]) for row in engines if row["build_id"] not in but_not}
    builds = connection.execute("SELECT id, family, device FROM builds WHERE removed_at IS NULL")
    left = [row for row in builds if row["id"] not in but_not]
    return paths | {supernet_path(registry.root, row["family"], row["device"]) for row in left}


def results_of_builds(registry: Registry, but_not: Collection[int] = ()) -> set[str]:
    """The keys of the stages' results that builds were made from, as their manifests tell; not of removed ones.

    Raises:
        RegistryError: the registry cannot be read.
    """
    with registry.reading() as connection:
        rows = connection.execute("SELECT id, manifest FROM builds WHERE removed_at IS NULL")
        manifests = [json.loads(row["manifest"]) for row in rows if row["id"] not in but_not]
    keys = {stage["key"] for manifest in manifests for stage in manifest.get("stages", ())}
    return keys | {manifest["key"] for manifest in manifests if "key" in manifest}


def unreferenced(registry: Registry, kept: set[Path]) -> list[Garbage]:
    """The files of the store that are not in `kept`, and copies cut short; the caller holds the lock."""
    found = []
    for path in _files(registry.root):
        left_over = bool(_LEFT_OVER.fullmatch(path.name))
        if left_over or (path.parent != registry.root and path not in kept):
            found.append(Garbage(path=path, size_bytes=path.lstat().st_size, left_over=left_over))
    return sorted(found, key=lambda one: str(one.path))


def _files(root: Path) -> Iterator[Path]:
    """Everything in the store, and what lies beside the database; links are not followed."""
    yield from (path for path in root.iterdir() if path.is_file())
    for store in ("engines", "supernets"):
        for folder, _, names in os.walk(root / store, onerror=_unless_missing):
            yield from (Path(folder) / name for name in names)


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _remove_empty_folders(root: Path) -> None:
    for folder in root.glob("*/"):
        if not any(folder.iterdir()):
            folder.rmdir()


def _builds(connection: sqlite3.Connection) -> list[BuildSummary]:
    tags = tags_of_builds(connection)
    return [
        BuildSummary(
            number=row["id"],
            family=row["family"],
            device=row["device"],
            finished_at=row["finished_at"],
            current=bool(row["current"]),
            tags=tags.get(row["id"], ()),
            engines=row["engines"],
            size_bytes=row["size_bytes"],
            removed_at=row["removed_at"],
        )
        for row in connection.execute(
            "SELECT builds.*, count(engines.id) AS engines, coalesce(sum(engines.size_bytes), 0) AS size_bytes"
            " FROM builds LEFT JOIN engines ON engines.build_id = builds.id GROUP BY builds.id ORDER BY builds.id DESC"
        )
    ]


def _forget(connection: sqlite3.Connection, numbers: list[int]) -> None:
    for number in numbers:
        of_build = "(SELECT id FROM engines WHERE build_id = ?)"
        connection.execute(f"DELETE FROM latencies WHERE engine_id IN {of_build}", (number,))
        connection.execute("DELETE FROM engines WHERE build_id = ?", (number,))
        # the row stays: it is what the history of tags tells of
        connection.execute("UPDATE builds SET current = 0, removed_at = ? WHERE id = ?", (now(), number))
