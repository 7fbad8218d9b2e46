"""Writing files so that a reader never sees half of one, and knowing a file by its content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`; on success it is synced and renamed to it.

    When the body raises, the temporary file is removed and `target` stays as it was.
    """
    make_directory(target.parent)
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.part")
    # not mkstemp, which keeps the file from everybody but its owner whatever the umask says
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
        sync_directory(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_directory(folder: Path) -> None:
    """Makes `folder` and its missing parents, so that they survive a power cut."""
    if not folder.is_dir():
        make_directory(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_directory(folder.parent)


def sync_directory(folder: Path) -> None:
    """Makes a rename in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits."""
    import hashlib  # not at the top: it brings OpenSSL, and picking does not hash

    digest = hashlib.sha256()
    with file.open("rb") as content:
        while chunk := content.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
