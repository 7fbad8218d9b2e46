"""Pushing a family package: objects first, then the version, then the name."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klas_zoo.addresses import local_path
from klas_zoo.errors import PackageError, RemoteError, UsageError
from klas_zoo.exporters.package import Package
from klas_zoo.sharing.index import SCHEMA_VERSION, Chunk, index_of, pieces
from klas_zoo.sharing.names import check_name, latest_path, object_path, version_path
from klas_zoo.sharing.remote import Remote
from klas_zoo.sharing.urls import scheme_of


@dataclass(frozen=True, kw_only=True)
class Pushed:
    """What a push did; `sent_bytes` of `size_bytes` were not there before."""

    url: str
    name: str
    version: str
    size_bytes: int
    sent_bytes: int

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def push(
    folder: Path | str,
    url: str,
    *,
    name: str | None = None,
    trust_sizes: bool = False,
    options: Mapping[str, Any] | None = None,
    on_start: Callable[[int], None] = lambda size_bytes: None,
    on_bytes: Callable[[int], None] = lambda size_bytes: None,
) -> Pushed:
    """Copies a package to a URL and moves the package's name there to it.

    Every file is compared with the manifest before, and everything that was written is read back and
    compared. What is there already, from a push before or from one that was cut short, is read instead
    of sent, or with `trust_sizes` only looked at.

    Args:
        name: by default the family's.
        options: what fsspec's file system takes.
        on_start: called with the size in bytes.
        on_bytes: called once with the size of every piece that is there.

    Raises:
        PackageError: the package is damaged; nothing was written.
        UsageError: a name that is none.
        RemoteError: the place cannot be written, or what was written reads back as something else.
    """
    scheme = scheme_of(url)
    folder = local_path(folder, "a package")
    package = Package.open(folder)
    if scheme in ("oci", "hf"):
        return _push_whole(scheme, package, url, name, trust_sizes, on_start, on_bytes)
    name = check_name(package.manifest.family.name if name is None else name)
    try:
        index = index_of(folder, list(package.shared_files))
    except OSError as error:
        raise PackageError(f"{folder} cannot be read: {error.strerror}.") from error
    remote = Remote(url, options)
    on_start(index.size_bytes)
    sent: dict[Chunk, bool] = {}
    for file in index.files:
        for chunk, piece in zip(file.chunks, pieces(folder / file.name), strict=True):
            if hashlib.sha256(piece).hexdigest() != chunk.sha256:
                raise PackageError(f"{folder / file.name} changed while it was pushed: push again.")
            if chunk not in sent:
                sent[chunk] = _ensure(remote, object_path(chunk.sha256), piece, trust_sizes)
            on_bytes(chunk.size_bytes)
    _ensure(remote, version_path(name, index.version), index.to_bytes(), trust_sizes=False)
    pointer = json.dumps({"schema_version": SCHEMA_VERSION, "version": index.version}, sort_keys=True)
    remote.write(latest_path(name), pointer.encode())
    remote.remove_leftovers(latest_path(name))
    return Pushed(
        url=remote.url,
        name=name,
        version=index.version,
        size_bytes=index.size_bytes,
        sent_bytes=sum(chunk.size_bytes for chunk, was_sent in sent.items() if was_sent),
    )


def _push_whole(
    scheme: str, package: Package, url: str, name: str | None, trust_sizes: bool, on_start: Callable[[int], None],
    on_bytes: Callable[[int], None],
) -> Pushed:  # fmt: skip
    """To a registry or the hub, which have layouts and digests of their own."""
    from klas_zoo.sharing.hub import push_to_hub
    from klas_zoo.sharing.oci import push_to_registry

    if name is not None or trust_sizes:
        raise UsageError(
            f"A URL with {scheme}:// names the package, and digests are compared there: leave out --name and "
            "--trust-sizes."
        )
    send = push_to_hub if scheme == "hf" else push_to_registry
    place, version, size, sent = send(package, url, on_start, on_bytes)
    return Pushed(url=str(place), name=place.name, version=version, size_bytes=size, sent_bytes=sent)


def _ensure(remote: Remote, path: str, content: bytes, trust_sizes: bool) -> bool:
    """Sees to it that an object is there and whole; whether it had to be sent."""
    size = remote.size(path)
    if size == len(content) and (trust_sizes or remote.read(path, len(content)) == content):
        return False
    remote.write(path, content)
    if remote.read(path, len(content)) != content:
        raise RemoteError(f"{remote.where(path)} reads back as something else than was written: push again.")
    return True
