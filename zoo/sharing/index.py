"""The index of a shared package: of which pieces each of its files is made. Read from untrusted places."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from klas_zoo.errors import RemoteError
from klas_zoo.reading import Count, PlainName, Sha256, read

SCHEMA_VERSION = 1
CHUNK_BYTES = 32 * 2**20
"""A file is cut into pieces of this size; a transfer that was interrupted resumes with the next piece."""
MOST_INDEX_BYTES = 64 * 2**20
LARGEST_BYTES = 64 * 10**9
"""Of a package, unless more is allowed: what a place claims is not taken for granted."""
# not in the class below: annotations there are evaluated when the first index is read, and tests change CHUNK_BYTES
PieceBytes = Annotated[int, Meta(gt=0, le=CHUNK_BYTES)]
_MOST_FILES = 100_000
_AGAIN = "Push the package again."


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A piece of a file."""

    sha256: Sha256
    size_bytes: PieceBytes


@dataclass(frozen=True, kw_only=True)
class SharedFile:
    """A file of a package; its pieces one after another are its content."""

    name: PlainName
    size_bytes: Count
    chunks: tuple[Chunk, ...]

    def __post_init__(self) -> None:
        if self.size_bytes != sum(chunk.size_bytes for chunk in self.chunks):
            raise ValueError(f"the pieces of {self.name} are not as long as the file")


@dataclass(frozen=True, kw_only=True)
class Index:
    """All files of one version of a package."""

    files: tuple[SharedFile, ...]

    def __post_init__(self) -> None:
        names = {file.name.lower() for file in self.files}
        if not 0 < len(self.files) <= _MOST_FILES or len(names) < len(self.files):
            raise ValueError("it names no file, too many, or one twice")

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
    chunks = tuple(Chunk(sha256=hashlib.sha256(piece).hexdigest(), size_bytes=len(piece)) for piece in pieces(path))
    return SharedFile(name=path.name, size_bytes=sum(one.size_bytes for one in chunks), chunks=chunks)


def pieces(path: Path) -> Iterator[bytes]:
    """The content of a file, one piece after another."""
    with path.open("rb") as file:
        while piece := file.read(CHUNK_BYTES):
            yield piece


def read_index(content: bytes, where: str) -> Index:
    """Checks what is stored as an index, and that it names nothing outside of its package.

    Args:
        where: its URL, for messages.

    Raises:
        RemoteError: it is none, or a newer klas-zoo wrote it.
    """
    return read(content, Index, where, RemoteError, newest=SCHEMA_VERSION, more=True, advice=_AGAIN)
