"""Copying the folder of a package that lies on this machine."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from klas_zoo.errors import PackageError
from klas_zoo.exporters.hub_cache import without_links
from klas_zoo.units import format_size

_MOST_FILES = 100_000


def copy_package(source: Path, target: Path) -> None:
    """Copies folders and regular files; links are copied as links, so that nothing outside gets in.

    Raises:
        PackageError: it is no folder, holds anything else, such as a pipe or a device, or does not fit on the disk.
    """
    source = without_links(source)
    if not source.is_dir():
        raise PackageError(f"{source} is no folder of a package, and no URL.")
    try:
        size = sum(_size(path) for path in _entries(source))
        free = shutil.disk_usage(target.parent).free
        if size > free:
            raise PackageError(
                f"{source} cannot be copied to {target.parent}: it has {format_size(size)}, and {format_size(free)} "
                "are free there."
            )
        shutil.copytree(source, target, symlinks=True)
    except OSError as error:
        first = error.args[0][0][2] if isinstance(error, shutil.Error) else error.strerror or error
        raise PackageError(f"{source} cannot be copied: {first}.") from error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    found: list[os.DirEntry[str]] = []
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                found.append(entry)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                if len(found) > _MOST_FILES:
                    raise PackageError(f"{folder} is no package: it holds more than {_MOST_FILES} files.")
    return found


def _size(entry: os.DirEntry[str]) -> int:
    status = entry.stat(follow_symlinks=False)
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode) or stat.S_ISLNK(status.st_mode)):
        raise PackageError(f"{entry.path} is no regular file.")
    return status.st_size
