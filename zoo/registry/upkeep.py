"""Maintenance of a registry: which builds it holds, removing some, and deleting what nothing refers to."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
from collections.abc import Collection, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from klas_zoo.errors import DamagedRegistry, UnknownName, UsageError
from klas_zoo.registry import Registry, database, rows
from klas_zoo.registry.packages import FOLDER, MANIFEST, digest_of, package_folder
from klas_zoo.registry.tags import now, registered_device, tags_of_builds

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
    """A file or package that nothing refers to; `left_over` where a copy was cut short."""

    path: Path
    size_bytes: int
    left_over: bool

    def delete(self) -> None:
        if self.path.is_dir() and not self.path.is_symlink():
            shutil.rmtree(self.path)
        else:
            self.path.unlink(missing_ok=True)


def legacy_supernet(root: Path, family: str, device: str) -> Path:
    """Where registries from before packages hold what the newest build of a family and device tuned."""
    return root / "supernets" / f"{family}-{device}.safetensors"


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
        device = registered_device(connection, device)
        there = [build for build in _builds(connection) if build.removed_at is None]
        if target.isascii() and target.isdigit():
            found = [build for build in there if build.number == int(target[:18])]
            if not found:
                raise UsageError(f"There is no build {target[:18]}: klas-zoo registry builds lists them.")
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
                    f"Build {build.number} is {' and '.join(build.tags)} on {build.device}: move that tag or delete "
                    "it (klas-zoo registry tag) before the build is removed. Nothing was removed."
                )
        _forget(connection, [build.number for build in found])
        return found


def collect(
    registry: Registry, *, old_builds: bool = False, dry_run: bool = False
) -> tuple[list[BuildSummary], list[Garbage]]:
    """Deletes the files that no build refers to; waits for a build that is being registered.

    Args:
        old_builds: first remove the builds that are neither current nor tagged.
        dry_run: change nothing.

    Returns:
        the builds that were removed and the files that were deleted, or would be.

    Raises:
        DamagedRegistry: the database or a file that it refers to is damaged or missing; nothing was deleted.
        RegistryError: the registry cannot be read, or not be written.
    """
    # where nothing can be written no build is registered, and a dry run needs no lock
    locked = nullcontext() if dry_run and not os.access(registry.root, os.W_OK) else registry.changing_files()
    with locked:
        # decided and forgotten in one write transaction: a tag that is set meanwhile pins its build or finds none
        with registry.reading() if dry_run else registry.changing() as connection:
            refuse_damaged(registry, connection)
            known = _builds(connection)
            old = [b for b in known if old_builds and not b.current and not b.tags and b.removed_at is None]
            kept = referred(registry, connection, but_not={build.number for build in old})
            supernets = supernets_of_builds(registry, connection)
            if not dry_run:
                _forget(connection, [build.number for build in old])
        with database.in_one_sentence(registry.root, "tidied"):
            garbage = unreferenced(registry, kept, supernets)
            if not dry_run:
                for one in garbage:
                    one.delete()
                _remove_empty_folders(registry.root / "engines")
    return old, garbage


def refuse_damaged(registry: Registry, connection: sqlite3.Connection) -> None:
    """
    Raises:
        DamagedRegistry: the database is damaged, or a file that it refers to is missing or another one, so that what
            it does not refer to may be needed.
    """
    found = [sentence for (sentence,) in connection.execute("PRAGMA integrity_check") if sentence != "ok"]
    found += [f"row {row[1]} of {row[0]} has no {row[2]}" for row in connection.execute("PRAGMA foreign_key_check")]
    found += list(_missing(registry, connection))
    if found:
        raise DamagedRegistry(
            f"The registry {registry.root} is damaged ({found[0]}), so nothing in it was deleted: klas-zoo registry "
            "check lists the damage; restore the database from a backup, or remove the builds that are damaged."
        )


def _missing(registry: Registry, connection: sqlite3.Connection) -> Iterator[str]:
    """Engines and packages that the database refers to and that are not there; compares manifests, no other content."""
    for row in connection.execute("SELECT id, file, package, file_bytes FROM engines"):
        if not isinstance(row["file"], str):
            yield f"engine {row['id']} names no file"
            continue
        path = registry.root / row["file"]
        if not path.is_file() or path.stat().st_size != row["file_bytes"]:
            yield f"engine {row['id']} is not at {row['file']}"
        if row["package"] and path.parent != package_folder(registry.root, row["package"]):
            yield f"engine {row['id']} is not in its package"
    for row in connection.execute("SELECT DISTINCT digest FROM packages"):
        if not isinstance(row["digest"], str):
            yield "a package has no digest"
            continue
        folder = package_folder(registry.root, row["digest"])
        if not (folder / MANIFEST).is_file() or digest_of(folder) != row["digest"]:
            yield f"package {row['digest'][:12]}… is missing or altered"


@rows.readable()
def referred(registry: Registry, connection: sqlite3.Connection, but_not: Collection[int] = ()) -> set[Path]:
    """The files and packages that builds need; of builds from before packages also their supernets."""
    paths = set()
    for row in connection.execute("SELECT build_id, file, package FROM engines"):
        if row["build_id"] not in but_not:
            paths.add(package_folder(registry.root, row["package"]) if row["package"] else registry.root / row["file"])
    for row in connection.execute("SELECT build_id, digest FROM packages"):
        if row["build_id"] not in but_not:
            paths.add(package_folder(registry.root, row["digest"]))
    left = connection.execute("SELECT id, family, device FROM builds WHERE removed_at IS NULL").fetchall()
    return paths | {
        legacy_supernet(registry.root, row["family"], row["device"]) for row in left if row["id"] not in but_not
    }


@rows.readable()
def supernets_of_builds(registry: Registry, connection: sqlite3.Connection) -> set[Path]:
    """Where the supernets of all builds that ever were are or were; a file elsewhere is not known to be garbage."""
    return {
        legacy_supernet(registry.root, row["family"], row["device"])
        for row in connection.execute("SELECT DISTINCT family, device FROM builds")
    }


def results_of_builds(registry: Registry, but_not: Collection[int] = ()) -> set[str]:
    """The keys of the stages' results that builds were made from, by their manifests; not those of removed builds.

    Raises:
        RegistryError: the registry cannot be read.
    """
    with registry.reading() as connection:
        found = connection.execute("SELECT id, manifest FROM builds WHERE removed_at IS NULL").fetchall()
        with rows.readable():
            manifests = [json.loads(row["manifest"]) for row in found if row["id"] not in but_not]
            keys = {stage["key"] for manifest in manifests for stage in manifest.get("stages", ())}
            return keys | {manifest["key"] for manifest in manifests if "key" in manifest}


def unreferenced(registry: Registry, kept: Collection[Path], supernets: Collection[Path]) -> list[Garbage]:
    """The files and packages of the store that are not in `kept`, and copies cut short; the caller holds the lock.

    Args:
        supernets: files of the folder of supernets that may be deleted.
    """
    found = []
    for path in _entries(registry.root):
        left_over = bool(_LEFT_OVER.fullmatch(path.name))
        known = path.parent != registry.root and (path.parent.name != "supernets" or path in supernets)
        if left_over or (known and path not in kept):
            found.append(Garbage(path=path, size_bytes=_size(path), left_over=left_over))
    return sorted(found, key=lambda one: str(one.path))


def _entries(root: Path) -> Iterator[Path]:
    """All packages and loose files in the store, and the files beside the database; links are not followed."""
    yield from (path for path in root.iterdir() if path.is_file())
    if (root / FOLDER).is_dir():
        yield from (root / FOLDER).iterdir()
    for store in ("engines", "supernets"):
        for folder, _, names in os.walk(root / store, onerror=_unless_missing):
            yield from (Path(folder) / name for name in names)


def _size(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(one.lstat().st_size for one in path.rglob("*"))
    return path.lstat().st_size


def _unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _remove_empty_folders(root: Path) -> None:
    for folder in root.glob("*/"):
        if not folder.is_symlink() and not any(folder.iterdir()):
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
            "SELECT builds.*, count(engines.id) AS engines, coalesce("
            " (SELECT sum(size_bytes) FROM packages WHERE packages.build_id = builds.id),"
            " sum(CASE package WHEN '' THEN size_bytes END), 0) AS size_bytes"
            " FROM builds LEFT JOIN engines ON engines.build_id = builds.id GROUP BY builds.id ORDER BY builds.id DESC"
        )
    ]


def _forget(connection: sqlite3.Connection, numbers: list[int]) -> None:
    for number in numbers:
        of_build = "(SELECT id FROM engines WHERE build_id = ?)"
        connection.execute(f"DELETE FROM latencies WHERE engine_id IN {of_build}", (number,))
        connection.execute("DELETE FROM engines WHERE build_id = ?", (number,))
        connection.execute("DELETE FROM packages WHERE build_id = ?", (number,))
        connection.execute("DELETE FROM conditions WHERE id NOT IN (SELECT conditions_id FROM latencies)")
        # the row stays: the history of tags refers to it
        connection.execute("UPDATE builds SET current = 0, removed_at = ? WHERE id = ?", (now(), number))
