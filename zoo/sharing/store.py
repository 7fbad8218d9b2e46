"""A package in a folder or an object store: found by its name and version, its files put together from objects."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klas_zoo.errors import RemoteError, UnknownName, UsageError
from klas_zoo.reading import check_schema, is_sha256, parse
from klas_zoo.sharing.index import MOST_INDEX_BYTES, SCHEMA_VERSION, Chunk, Index, index_of, read_index
from klas_zoo.sharing.names import check_name, latest_path, object_path, version_path
from klas_zoo.sharing.remote import Remote
from klas_zoo.sharing.staging import Staging

_VERSION = re.compile(r"[0-9a-f]{4,64}")


@dataclass(frozen=True)
class StoredPackage:
    """See `klas_zoo.sharing.sources.Source`."""

    remote: Remote
    name: str
    version: str
    index: Index

    @classmethod
    def find(
        cls, url: str, name: str | None, version: str | None, options: Mapping[str, Any] | None
    ) -> StoredPackage:
        """
        Raises:
            UsageError, RemoteError: see `klas_zoo.sharing.sources.open_source`.
        """
        remote = Remote(url, options)
        name = _name(remote, name)
        version = _version(remote, name, version)
        return cls(remote, name, version, _index(remote, name, version))

    @property
    def shown(self) -> str:
        return self.remote.url

    @property
    def files(self) -> Mapping[str, int]:
        return {file.name: file.size_bytes for file in self.index.files}

    def receive(self, names: Iterable[str], staging: Staging, on_bytes: Callable[[int], None]) -> int:
        """Every piece is compared with its SHA-256 when it arrives; those that are there already are not fetched."""
        received, wanted = 0, set(names)
        for file in self.index.files:
            if file.name not in wanted:
                continue
            with staging.open(file.name) as output:
                for chunk in file.chunks:
                    start = output.tell()
                    if hashlib.sha256(output.read(chunk.size_bytes)).hexdigest() != chunk.sha256:
                        output.seek(start)
                        output.truncate()
                        output.write(_chunk(self.remote, chunk))
                        received += chunk.size_bytes
                    on_bytes(chunk.size_bytes)
                output.truncate()
                output.flush()
                os.fsync(output.fileno())
        return received

    def is_copied_to(self, folder: Path) -> bool:
        return index_of(folder, list(self.files)) == self.index


def _chunk(remote: Remote, chunk: Chunk) -> bytes:
    path = object_path(chunk.sha256)
    content = remote.read(path, chunk.size_bytes)
    if content is None:
        raise RemoteError(f"{remote.where(path)} is missing: push the package again.")
    if hashlib.sha256(content).hexdigest() != chunk.sha256:
        raise RemoteError(f"{remote.where(path)} is not what was pushed: push the package again.")
    return content


def _name(remote: Remote, name: str | None) -> str:
    if name is not None and remote.size(latest_path(check_name(name))) is not None:
        return name
    known = remote.names("packages")
    if name is not None:
        raise UnknownName("package", name, known, f"It was looked for at {remote.url}.")
    if not known:
        raise RemoteError(f"There is no package at {remote.url}: klas-zoo push puts one there.")
    if len(known) > 1:
        raise UsageError(f"{remote.url} holds several packages, {', '.join(known[:12])}: pass --name.")
    return check_name(known[0])


def _version(remote: Remote, name: str, wanted: str | None) -> str:
    if wanted is None:
        where = latest_path(name)
        content = remote.read(where, MOST_INDEX_BYTES)
        if content is None:
            raise RemoteError(f"{remote.where(where)} is missing: push the package again, or pass --version.")
        table = parse(content, remote.where(where), RemoteError)
        check_schema(table, SCHEMA_VERSION, remote.where(where), RemoteError)
        version = table.get("version")
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
