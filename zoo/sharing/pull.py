"""Pulling a family package into a folder that appears when it is whole, or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klas_zoo.errors import PackageError, RemoteError, UnknownName, UsageError
from klas_zoo.exporters.manifest import MANIFEST
from klas_zoo.exporters.package import Package
from klas_zoo.files import make_directory, sync_directory
from klas_zoo.sharing.index import (
    MOST_INDEX_BYTES,
    Chunk,
    Index,
    SharedFile,
    index_of,
    read_index,
    read_table,
)
from klas_zoo.sharing.push import check_name, latest_path, object_path, version_path
from klas_zoo.sharing.remote import Remote
from klas_zoo.stored import is_sha256

_VERSION = re.compile(r"[0-9a-f]{4,64}")


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
    on_start: Callable[[int], None] = lambda size_bytes: None,
    on_bytes: Callable[[int], None] = lambda size_bytes: None,
) -> Pulled:
    """Copies a package from a URL into a new folder; goes on where a pull before it stopped.

    Every piece is compared with its SHA-256 when it arrives, and the whole package is checked before
    the folder gets its name.

    Args:
        name: may be left out where the URL holds one package only.
        version: the first digits of a version; by default the one pushed last.
        options: what fsspec's file system takes.
        on_start: told how much there is.
        on_bytes: told of every piece that is there.

    Raises:
        UsageError: something else stands in the folder, or there is no such package or version.
        RemoteError: the place cannot be read, or does not hold what was pushed.
        PackageError: what was pushed is no sound package, or the folder cannot be written.
    """
    target = Path(folder).expanduser().absolute()
    remote = Remote(url, options)
    name = _name(remote, name)
    version = _version(remote, name, version)
    index = _index(remote, name, version)
    on_start(index.size_bytes)
    try:
        received = _receive(remote, index, target, on_bytes)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise PackageError(
            f"{target} cannot be written: {error.strerror or error}{where}. The same command goes on where it stopped."
        ) from error
    return Pulled(folder=target, name=name, version=version, size_bytes=index.size_bytes, received_bytes=received)


def _receive(remote: Remote, index: Index, target: Path, on_bytes: Callable[[int], None]) -> int:
    if os.path.lexists(target):
        _check_same(target, index)
        return 0
    with _staging(target, index.version) as staging:
        if os.path.lexists(target):  # another pull was faster
            _check_same(target, index)
            return 0
        received = sum(_fetch(remote, file, staging / file.name, on_bytes) for file in index.files)
        package = Package.open(staging)
        if {MANIFEST, *package.manifest.files} != {file.name for file in index.files}:
            raise RemoteError(f"{remote.url} holds other files than its manifest names: push the package again.")
        sync_directory(staging)
        staging.rename(target)
        sync_directory(target.parent)
    return received


@contextmanager
def _staging(target: Path, version: str) -> Iterator[Path]:
    """A folder for what arrives, kept where the pull is cut short; one pull at a time has it."""
    import fcntl

    make_directory(target.parent)
    outer = target.with_name(f".{target.name}.{version[:16]}.part")
    while True:
        outer.mkdir(exist_ok=True)
        try:
            lock = (outer / "lock").open("ab")
        except FileNotFoundError:
            continue  # another pull was done just now
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_at(lock.fileno(), outer / "lock"):
                continue
            inner = outer / "package"
            inner.mkdir(exist_ok=True)
            yield inner
            shutil.rmtree(outer)
            return


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _fetch(remote: Remote, file: SharedFile, path: Path, on_bytes: Callable[[int], None]) -> int:
    """Completes a file piece by piece; how many bytes had to come."""
    received = 0
    with path.open("r+b" if path.exists() else "w+b") as output:
        for chunk in file.chunks:
            start = output.tell()
            if hashlib.sha256(output.read(chunk.size_bytes)).hexdigest() != chunk.sha256:
                output.seek(start)
                output.truncate()
                output.write(_chunk(remote, chunk))
                received += chunk.size_bytes
            on_bytes(chunk.size_bytes)
        output.truncate()
        output.flush()
        os.fsync(output.fileno())
    return received


def _chunk(remote: Remote, chunk: Chunk) -> bytes:
    path = object_path(chunk.sha256)
    content = remote.read(path, chunk.size_bytes)
    if content is None:
        raise RemoteError(f"{remote.where(path)} is missing: push the package again.")
    if hashlib.sha256(content).hexdigest() != chunk.sha256:
        raise RemoteError(f"{remote.where(path)} is not what was pushed: push the package again.")
    return content


def _check_same(target: Path, index: Index) -> None:
    """Refuses a folder that holds anything else than this version."""
    names = [file.name for file in index.files]
    if target.is_dir() and sorted(path.name for path in target.iterdir()) == sorted(names):
        Package.open(target)
        if index_of(target, names) == index:
            return
    raise UsageError(f"{target} is there already and is not this package: name another folder.")


def _name(remote: Remote, name: str | None) -> str:
    if name is not None and remote.size(latest_path(check_name(name))) is not None:
        return name
    known = remote.names("packages")
    if name is not None:
        raise UnknownName("package", name, known, f"It was looked for at {remote.url}.")
    if not known:
        raise RemoteError(f"There is no package at {remote.url}: klas-zoo push puts one there.")
    if len(known) > 1:
        raise UsageError(f"{remote.url} holds several packages, {', '.join(known[:12])}: say --name.")
    return check_name(known[0])


def _version(remote: Remote, name: str, wanted: str | None) -> str:
    if wanted is None:
        where = latest_path(name)
        content = remote.read(where, MOST_INDEX_BYTES)
        if content is None:
            raise RemoteError(f"{remote.where(where)} is missing: push the package again, or say --version.")
        version = read_table(content, remote.where(where)).get("version")
        if not isinstance(version, str) or not is_sha256(version):
            raise RemoteError(f"{remote.where(where)} names no version: push the package again.")
        return version
    known = [one.removesuffix(".json") for one in remote.names(f"packages/{name}")]
    known = [one for one in known if is_sha256(one)]
    found = [one for one in known if one.startswith(wanted)]
    if len(found) != 1 or not _VERSION.fullmatch(wanted):
        short = [one[:12] for one in known]
        raise UnknownName("version", wanted, short, "Write four digits or more that only one has.")
    return found[0]


def _index(remote: Remote, name: str, version: str) -> Index:
    path = version_path(name, version)
    content = remote.read(path, MOST_INDEX_BYTES)
    if content is None:
        raise RemoteError(f"{remote.where(path)} is missing: push the package again.")
    if hashlib.sha256(content).hexdigest() != version:
        raise RemoteError(f"{remote.where(path)} is not what was pushed: push the package again.")
    return read_index(content, remote.where(path))
