"""What `to_triton` wrote, recorded so that it can be checked where it is served.

    OUT/repository.json     {"schema_version": 1, "entries": {path: {"size_bytes", "sha256"} or {"link"}}}

The record names every file and link under OUT/models; OUT/family is a package with a manifest of its own.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from klas_zoo.errors import DamagedPackage, NewerPackage, PackageError
from klas_zoo.files import replacing, sha256_of
from klas_zoo.reading import refuse_newer, schema_of

RECORD, CONFIG = "repository.json", "config.pbtxt"
_SCHEMA_VERSION = 1
_MOST_BYTES = 64 * 2**20


def write_record(folder: Path) -> None:
    """Writes the record of a repository; last, when all of it is there."""
    entries = {name: _facts(folder / name) for name in _entries(folder)}
    with replacing(folder / RECORD) as temporary:
        text = json.dumps({"schema_version": _SCHEMA_VERSION, "entries": entries}, indent=1, sort_keys=True)
        temporary.write_text(text + "\n", encoding="utf-8")


def is_repository(folder: Path) -> bool:
    return (folder / RECORD).is_file()


def check_repository(folder: Path, *, allow_edited_config: bool = False) -> None:
    """Compares everything that is served with the record.

    Args:
        allow_edited_config: take every config.pbtxt as it is; it is the place to change what the server does.

    Raises:
        NewerPackage: a newer klas-zoo wrote the record.
        DamagedPackage: the record is damaged, or something was altered, removed or added.
        PackageError: a file cannot be read.
    """
    recorded = _read(folder / RECORD)
    present = set(_entries(folder))
    if gone := sorted(recorded.keys() - present):
        raise DamagedPackage(f"{folder / gone[0]} is missing. Export the repository again.")
    if added := sorted(present - recorded.keys()):
        raise DamagedPackage(f"{folder / added[0]} was not exported, and would be served: remove it.")
    for name, expected in sorted(recorded.items()):
        is_config = name.endswith(f"/{CONFIG}")
        if is_config and allow_edited_config:
            continue
        if _facts(folder / name) != expected:
            advice = "Pass --allow-edited-config if that is meant." if is_config else "Export the repository again."
            raise DamagedPackage(f"{folder / name} is not what was exported. {advice}")


def _entries(folder: Path) -> Iterator[str]:
    """Paths of all files and links under models, relative to the repository, with `/`."""

    def unreadable(error: OSError) -> None:
        raise PackageError(f"{error.filename} cannot be read: {error.strerror}.") from error

    for place, folders, files in os.walk(folder / "models", onerror=unreadable):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*links, *files):
            yield Path(place, name).relative_to(folder).as_posix()


def _facts(path: Path) -> dict[str, Any]:
    try:
        mode = path.lstat().st_mode
        if stat.S_ISLNK(mode):
            return {"link": os.readlink(path)}
        if not stat.S_ISREG(mode):
            raise DamagedPackage(f"{path} is no regular file.")
        return {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror}.") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise DamagedPackage(f"{path} is too large for a record.")
        table = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PackageError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise DamagedPackage(f"{path} is not JSON.") from error
    version = schema_of(table)
    if version is None or not isinstance(table.get("entries"), dict):
        raise DamagedPackage(f"{path} is no record of a repository.")
    refuse_newer(version, _SCHEMA_VERSION, str(path), NewerPackage)
    found: dict[str, Any] = table["entries"]
    return found
