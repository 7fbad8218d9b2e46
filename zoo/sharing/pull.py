"""Pulling a family package into a folder that appears when it is whole, or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klas_zoo.addresses import local_path
from klas_zoo.errors import PackageError, RemoteError, UsageError
from klas_zoo.exporters.manifest import MANIFEST, Manifest
from klas_zoo.exporters.manifest_reading import read_manifest
from klas_zoo.exporters.package import SIGNATURE, Package, read_table
from klas_zoo.sharing.index import LARGEST_BYTES
from klas_zoo.sharing.sources import Source, open_source
from klas_zoo.sharing.staging import staging_for
from klas_zoo.units import format_size


@dataclass(frozen=True, kw_only=True)
class Pulled:
    """What a pull did; `received_bytes` of `size_bytes` were not there before."""

    folder: Path
    name: str
    version: str
    size_bytes: int
    received_bytes: int

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"folder": str(self.folder)}


def pull(
    url: str,
    folder: Path | str,
    *,
    name: str | None = None,
    version: str | None = None,
    options: Mapping[str, Any] | None = None,
    largest_bytes: int = LARGEST_BYTES,
    on_start: Callable[[int], None] = lambda size_bytes: None,
    on_bytes: Callable[[int], None] = lambda size_bytes: None,
) -> Pulled:
    """Copies a package from a URL into a new folder; resumes where an earlier pull stopped.

    Everything is compared with its SHA-256 when it arrives, and the whole package is checked before
    the folder gets its name.

    Args:
        name: may be left out where the URL holds one package only.
        version: the first digits of a version; by default the one pushed last.
        options: what fsspec's file system takes.
        largest_bytes: that the package may have.
        on_start: called with the size in bytes.
        on_bytes: called with the size of every piece that is there.

    Raises:
        UsageError: something else stands in the folder, or there is no such package or version.
        RemoteError: the place cannot be read, does not hold what was pushed, or claims a larger package.
        PackageError: what was pushed is no sound package, or the folder cannot be written.
    """
    target = local_path(folder, "the folder to pull into").absolute()
    source = open_source(url, name=name, version=version, options=options)
    size = sum(source.files.values())
    if size > largest_bytes:
        raise RemoteError(
            f"{source.shown} names a package of {format_size(size)}, more than the {format_size(largest_bytes)} that "
            "are allowed: pass --max-size if that is right."
        )
    on_start(size)
    try:
        received = _receive(source, size, target, on_bytes)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise PackageError(
            f"{target} cannot be written: {error.strerror or error}{where}. Rerun the command to resume."
        ) from error
    return Pulled(folder=target, name=source.name, version=source.version, size_bytes=size, received_bytes=received)


def _receive(source: Source, size: int, target: Path, on_bytes: Callable[[int], None]) -> int:
    if os.path.lexists(target):
        _check_same(target, source)
        return 0
    with staging_for(target, source.version) as staging:
        if os.path.lexists(target):  # another pull was faster
            _check_same(target, source)
            return 0
        staging.require_only(source.files)
        staging.require_space(size)
        received = source.receive([MANIFEST], staging, on_bytes)
        _check_listing(source, read_manifest(read_table(staging.folder)[0], f"{source.shown}: {MANIFEST}"))
        received += source.receive(sorted(set(source.files) - {MANIFEST}), staging, on_bytes)
        Package.open(staging.folder)
        staging.require_only(source.files)
        staging.finish()
    return received


def _check_listing(source: Source, manifest: Manifest) -> None:
    """Refuses what does not belong to a package before it is fetched."""
    if {MANIFEST, *manifest.files} != set(source.files) - {SIGNATURE}:
        raise RemoteError(f"{source.shown} holds other files than its manifest names: push the package again.")
    for name, entry in manifest.files.items():
        if entry.size_bytes != source.files[name]:
            raise RemoteError(f"{source.shown} holds {name} in another size than its manifest says: push it again.")


def _check_same(target: Path, source: Source) -> None:
    """Refuses a folder that holds anything else than this version."""
    if target.is_dir() and sorted(path.name for path in target.iterdir()) == sorted(source.files):
        Package.open(target)
        if source.is_copied_to(target):
            return
    raise UsageError(f"{target} is there already and is not this package: name another folder.")
