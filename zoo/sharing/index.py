"""The index of a shared package: of which pieces each of its files is made. Read from strangers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klas_zoo.errors import RemoteError
from klas_zoo.stored import is_plain_name, is_sha256, refuse_newer, schema_of

SCHEMA_VERSION = 1
CHUNK_BYTES = 32 * 2**20
"""A file is cut into pieces of this size; a transfer that was cut short goes on with the next piece."""
MOST_INDEX_BYTES = 64 * 2**20
_MOST_FILES = 100_000


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of a file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class SharedFile:
    """A file of a package; its pieces one after another are its content."""

    name: str
    size_bytes: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, kw_only=True)
class Index:
    """All files of one version of a package."""

    files: tuple[SharedFile, ...]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Each piece once."""
        return tuple(dict.fromkeys(chunk for file in self.files for chunk in file.chunks))

    def to_bytes(self) -> bytes:
        """The same bytes for the same files, so that their SHA-256 is the version."""
        table = {"schema_version": SCHEMA_VERSION, "files": [asdict(file) for file in self.files]}
        return json.dumps(table, sort_keys=True).encode()

    @property
    def version(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()


def index_of(folder: Path, names: list[str]) -> Index:
    """The index of files in a folder.

    Raises:
        OSError: one cannot be read.
    """
    return Index(files=tuple(_shared_file(folder / name) for name in sorted(names)))


def _shared_file(path: Path) -> SharedFile:
    chunks = tuple(
        Chunk(sha256=hashlib.sha256(piece).hexdigest(), size_bytes=len(piece)) for piece in pieces(path)
    )
    return SharedFile(name=path.name, size_bytes=sum(one.size_bytes for one in chunks), chunks=chunks)


def pieces(path: Path) -> Iterator[bytes]:
    """The content of a file, one piece after another."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def read_index(content: bytes, where: str) -> Index:
    """Checks what somebody stored as an index, and that it names nothing outside of its package.

    Args:
        where: its URL, for messages.

    Raises:
        RemoteError: it is none, or a newer klas-zoo wrote it.
    """
    table = read_table(content, where)
    try:
        files = tuple(map(_file_from_json, table["files"]))
    except (KeyError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise RemoteError(f"{where} is no index of a package ({what}): push it again.") from error
    if not 0 < len(files) <= _MOST_FILES or len({file.name.lower() for file in files}) < len(files):
        raise RemoteError(f"{where} is no index of a package: it names no file, too many, or one twice.")
    return Index(files=files)


def read_table(content: bytes, where: str) -> dict[str, Any]:
    """A JSON object of a schema that this version knows.

    Raises:
        RemoteError: it is none.
    """
    try:
        table = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise RemoteError(f"{where} is not JSON ({error}): push the package again.") from error
    version = schema_of(table)
    if version is None:
        raise RemoteError(f"{where} was not written by klas-zoo: it has no schema_version.")
    refuse_newer(version, SCHEMA_VERSION, where, RemoteError)
    assert isinstance(table, dict)
    return table


def _file_from_json(table: dict[str, Any]) -> SharedFile:
    name, size_bytes = table["name"], table["size_bytes"]
    if not is_plain_name(name):
        raise ValueError(f"a file {str(name)[:80]!r}, which is no plain file of the package's own folder")
    chunks = tuple(map(_chunk_from_json, table["chunks"]))
    if type(size_bytes) is not int or size_bytes != sum(chunk.size_bytes for chunk in chunks):
        raise ValueError(f"the pieces of {name} are not as long as the file")
    return SharedFile(name=name, size_bytes=size_bytes, chunks=chunks)


def _chunk_from_json(table: dict[str, Any]) -> Chunk:
    sha256, size_bytes = table["sha256"], table["size_bytes"]
    if not is_sha256(sha256) or type(size_bytes) is not int or not 0 < size_bytes <= CHUNK_BYTES:
        raise ValueError("a piece without SHA-256, or of no possible size")
    return Chunk(sha256=sha256, size_bytes=size_bytes)
