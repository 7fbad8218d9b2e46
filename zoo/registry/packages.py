"""Packages as the registry stores them: each one a folder under the SHA-256 of its manifest.

    <root>/packages/<digest>/manifest.json    names every other file with its size and SHA-256
    <root>/packages/<digest>/…

The digest thus covers every byte of a package. What else a manifest says is read by
`klas_zoo.exporters.package`; here only its list of files is. Imports nothing heavy.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from klas_zoo.errors import DamagedRegistry, RegistryError
from klas_zoo.files import make_directory, sha256_of, share_like, sync_directory

MANIFEST = "manifest.json"
FOLDER = "packages"


def package_folder(root: Path, digest: str) -> Path:
    """Where a registry stores the package of that digest, or would."""
    return root / FOLDER / digest


def digest_of(folder: Path) -> str:
    """The SHA-256 of a package's manifest.

    Raises:
        OSError: it cannot be read.
    """
    return sha256_of(folder / MANIFEST)


def files_of(folder: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of every file that a package's manifest names.

    Raises:
        ValueError: the manifest has no such list.
        OSError: it cannot be read.
    """
    table = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = table.get("files") if isinstance(table, dict) else None
    if not isinstance(files, Mapping):
        raise ValueError("it has no list of files")
    return dict(_entries(files))


def _entries(files: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, str]]]:
    for name, entry in files.items():
        size, sha256 = entry.get("size_bytes"), entry.get("sha256")
        if Path(name).name != name or name == MANIFEST or type(size) is not int or not isinstance(sha256, str):
            raise ValueError(f"its entry {name!r} is no file of the package's own folder")
        yield name, (size, sha256)


def size_of(folder: Path) -> int:
    """Bytes of a package on the disk."""
    return sum(size for size, _ in files_of(folder).values()) + (folder / MANIFEST).stat().st_size


def check_package(folder: Path, digest: str, *, content: Callable[[str], bool] = lambda name: True) -> None:
    """Compares a stored package with its digest: the manifest, and the size and SHA-256 of every file.

    Args:
        content: whether to hash the file of that name; of the others only the size is compared.

    Raises:
        DamagedRegistry: a file is missing, cannot be read, or is not the one that was registered.
    """
    name = MANIFEST
    try:
        same = digest_of(folder) == digest
        for name, (size, sha256) in files_of(folder).items() if same else ():
            path = folder / name
            same = not path.is_symlink() and path.stat().st_size == size
            if not (same and (not content(name) or sha256_of(path) == sha256)):
                same = False
                break
        found = "is not the file that was registered"
    except (OSError, ValueError) as error:
        same, found = False, f"cannot be read ({getattr(error, 'strerror', None) or error})"
    if not same:
        raise DamagedRegistry(f"The file {folder / name} {found}. Run klas-zoo build or install again.")


def is_intact(folder: Path, digest: str, *, content: Callable[[str], bool] = lambda name: True) -> bool:
    """Whether `check_package` finds nothing."""
    try:
        check_package(folder, digest, content=content)
    except DamagedRegistry:
        return False
    return True


def add_package(root: Path, folder: Path, *, link: bool = False, model: Path) -> tuple[str, bool]:
    """Stores a package, or finds it stored; returns its digest, and whether it is new.

    Every file is hashed on the way and compared with the manifest, so that what was verified is what is
    stored. The caller holds the lock.

    Args:
        link: link files instead of copying them where the file system can: for folders that are not changed later.
        model: a file; whoever may use it may use the stored files.

    Raises:
        RegistryError: a file is not what the manifest says.
        OSError: a file cannot be read or written.
    """
    import shutil  # not at the top: it brings zlib, bz2 and lzma, and picking copies nothing

    digest = digest_of(folder)
    target = package_folder(root, digest)
    if target.is_dir() and is_intact(target, digest):
        return digest, False
    new = not target.exists()
    temporary = target.with_name(f".{digest}.{os.urandom(4).hex()}.part")
    make_directory(temporary)
    try:
        for name, (_, sha256) in files_of(folder).items():
            _copy(folder / name, temporary / name, link)
            if sha256_of(temporary / name) != sha256:
                raise RegistryError(f"{folder / name} changed after its package was written: make the package again.")
        shutil.copyfile(folder / MANIFEST, temporary / MANIFEST)
        if digest_of(temporary) != digest:
            raise RegistryError(f"{folder / MANIFEST} changed while it was copied: try again.")
        for path in (*temporary.iterdir(), temporary, temporary.parent):
            share_like(path, model)
        _sync(temporary)
        if not new:  # damaged: replaced as a whole
            shutil.rmtree(target)
        temporary.rename(target)
        sync_directory(target.parent)
    except ValueError as error:
        raise RegistryError(f"{folder / MANIFEST} is no manifest of a package: {error}.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return digest, new


def _copy(source: Path, target: Path, link: bool) -> None:
    import shutil

    if link and not source.is_symlink():
        with suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copyfile(source, target)


def _sync(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_directory(folder)
