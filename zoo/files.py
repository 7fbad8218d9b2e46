"""Writing files so that a reader never sees half of one, and knowing a file by its content."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

_SEAL = "sha256"
_NO_LOCKS = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOLCK}


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


@contextmanager
def locked(
    file: Path, *, shared: bool = False, on_wait: Callable[[], None] = lambda: None
) -> Iterator[BinaryIO]:
    """Holds a lock on `file`, alone or together with other `shared` holders; yields the opened file.

    The system frees the lock when the process dies. The file stays: a lock on a file that another process has just
    unlinked would guard nothing. (The library filelock has no shared locks of this kind, and falls back to lock files,
    which outlive their process, where a file system cannot lock.)

    Args:
        on_wait: called once, before it waits for others; may raise instead.
    """
    with file.open("a+b") as lock:
        take, release = _lock_calls(lock, shared)
        try:
            take(False)
        except BlockingIOError:
            on_wait()
            take(True)
        try:
            yield lock
        finally:
            # a forked worker that lives on has the lock too: closing alone would not free it
            release()


def _lock_calls(lock: BinaryIO, shared: bool) -> tuple[Callable[[bool], None], Callable[[], None]]:
    """Takes a lock, waiting for it or not; and releases it. By flock, or by POSIX locks where there is none."""
    import fcntl  # not at the top: picking takes no lock

    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    lockers = [fcntl.flock, fcntl.lockf]

    def take(wait: bool) -> None:
        while True:
            try:
                return lockers[0](lock, kind if wait else kind | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):  # POSIX locks say either where somebody has it
                    raise BlockingIOError(error.errno, error.strerror) from error
                if error.errno not in _NO_LOCKS:
                    raise
                if len(lockers) == 1:
                    what = "this file system has no locks: use a folder on a local disk"
                    raise OSError(error.errno, what, lock.name) from error
                del lockers[0]

    return take, lambda: lockers[0](lock, fcntl.LOCK_UN)


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


def sealed(table: Mapping[str, Any]) -> str:
    """A table as JSON that also has its own SHA-256, so that `unsealed` finds every change."""
    return json_text({**table, _SEAL: seal_of(table)})


def unsealed(text: str | bytes) -> dict[str, Any] | None:
    """What `sealed` was given; None where one byte of it is another."""
    try:
        found = text if isinstance(text, str) else text.decode()
        table = json.loads(found)
        del table[_SEAL]
        return table if found == sealed(table) else None
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None


def seal_of(table: Mapping[str, Any]) -> str:
    """The SHA-256 of a table as JSON, however it is laid out in a file."""
    import hashlib

    return hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest()


def json_text(table: Mapping[str, Any]) -> str:
    """A table as JSON files have it: sorted keys, one value a line."""
    return json.dumps(table, indent=1, sort_keys=True) + "\n"


def share_like(path: Path, model: Path) -> None:
    """Gives a file or folder the group and the permissions of the file `model`, whatever the umask is.

    Does nothing where that is not allowed, as on files of another user, or for a group that the user is not in.
    """
    wanted, found = model.stat(), path.stat()
    mode, before = wanted.st_mode & 0o666, found.st_mode
    if wanted.st_gid != found.st_gid:
        with contextlib.suppress(OSError):
            os.chown(path, -1, wanted.st_gid)
    if stat.S_ISDIR(before):
        mode |= (mode & 0o444) >> 2  # a folder that may be read may also be entered
        mode |= before & 0o7000  # its group is inherited by what is made in it
    if mode != stat.S_IMODE(before):
        with contextlib.suppress(OSError):
            path.chmod(mode)
