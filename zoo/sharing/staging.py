"""The folder in which a pull collects files until they are whole. Its name cannot be foreseen, and no other user may
write to it.

What an earlier pull left is taken up again only where it is a folder of this user that others cannot enter. Files
are opened relative to open folders and never through links, so that a link that somebody plants leads nowhere.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from klas_zoo.errors import PackageError
from klas_zoo.files import make_directory
from klas_zoo.units import format_size

_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0)
_FILE = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_LOCK, _INNER = "lock", "package"


@dataclass(frozen=True)
class Staging:
    """A folder of files that are not whole yet.

    Attributes:
        target: what it becomes.
        folder: where it is meanwhile.
    """

    target: Path
    folder: Path
    _parent: int
    _outer: int
    _inner: int

    def open(self, name: str) -> BinaryIO:
        """A file to read and write, made where it is missing.

        Raises:
            PackageError: something stands there that no pull made.
            OSError: it cannot be written.
        """
        path = self.folder / name
        try:
            descriptor = os.open(name, _FILE, 0o666, dir_fd=self._inner)
        except OSError as error:
            if error.errno is not None and path.is_symlink():
                raise PackageError(f"{path} is a link, which no pull makes: remove it.") from error
            error.filename = str(path)
            raise
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.geteuid():
            os.close(descriptor)
            raise PackageError(f"{path} is no file that a pull made: remove it.")
        return os.fdopen(descriptor, "r+b")

    def require_space(self, size_bytes: int) -> None:
        """
        Raises:
            PackageError: files of that size in total do not fit on the disk.
        """
        there = sum(
            os.stat(name, dir_fd=self._inner, follow_symlinks=False).st_size for name in os.listdir(self._inner)
        )
        disk = os.fstatvfs(self._inner)
        free, missing = disk.f_bavail * disk.f_frsize, size_bytes - there
        if missing > free:
            raise PackageError(
                f"{self.target} cannot be written: {format_size(missing)} are to come, and {format_size(free)} "
                "are free."
            )

    def require_only(self, names: Iterable[str]) -> None:
        """
        Raises:
            PackageError: other names are there than those.
        """
        if extra := sorted(set(os.listdir(self._inner)) - set(names)):
            raise PackageError(
                f"{self.folder} holds {', '.join(map(ascii, extra[:5]))}, which is not of the package: remove it."
            )

    def finish(self) -> None:
        """Gives the folder its name.

        Raises:
            OSError: it cannot be written, or something stands there.
        """
        os.fsync(self._inner)
        os.rename(_INNER, self.target.name, src_dir_fd=self._outer, dst_dir_fd=self._parent)
        os.fsync(self._parent)


@contextmanager
def staging_for(target: Path, version: str) -> Iterator[Staging]:
    """What an earlier pull of that version left, or a new one; one pull of this user at a time has it.

    It stays where a pull is cut short with something in it.

    Raises:
        OSError: it cannot be made.
    """
    make_directory(target.parent)
    with ExitStack() as always:
        parent = _opened(target.parent, always)
        while True:
            with ExitStack() as stack:
                with _alone(parent):
                    name = _left(parent, prefix := f".{target.name}.{version[:16]}.") or _made(parent, prefix)
                try:
                    outer = _opened(name, stack, parent)
                    lock = os.open(_LOCK, _FILE, 0o600, dir_fd=outer)
                except FileNotFoundError:
                    continue  # another pull finished just now
                stack.callback(os.close, lock)
                _lock(lock)
                if not _is_at(parent, name, outer) or not _is_at(outer, _LOCK, lock):
                    continue
                with contextlib.suppress(FileExistsError):
                    os.mkdir(_INNER, dir_fd=outer)
                inner = _opened(_INNER, stack, outer)
                try:
                    yield Staging(target, target.with_name(name) / _INNER, parent, outer, inner)
                finally:
                    _remove(parent, name, outer)
                return


def _opened(folder: Path | str, stack: ExitStack, within: int | None = None) -> int:
    descriptor = os.open(folder, _FOLDER if within is not None else os.O_RDONLY, dir_fd=within)
    stack.callback(os.close, descriptor)
    return descriptor


def _left(parent: int, prefix: str) -> str | None:
    """The name of a folder that a pull of this user left, and no other user could change."""
    for name in sorted(os.listdir(parent)):
        if name.startswith(prefix) and name.endswith(".part"):
            try:
                found = os.stat(name, dir_fd=parent, follow_symlinks=False)
            except FileNotFoundError:
                continue
            mine = found.st_uid == os.geteuid() and not found.st_mode & 0o077
            if stat.S_ISDIR(found.st_mode) and mine:
                return name
    return None


def _made(parent: int, prefix: str) -> str:
    name = f"{prefix}{os.urandom(8).hex()}.part"
    os.mkdir(name, 0o700, dir_fd=parent)
    return name


@contextmanager
def _alone(parent: int) -> Iterator[None]:
    """Keeps two pulls that start at once from making a folder each. Where the lock is not to be had, both make one,
    and one of them works in vain."""
    import fcntl
    import time

    for _ in range(100):  # another user who holds it must not keep us for longer than a second
        try:
            fcntl.flock(parent, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(0.01)
        except OSError:
            break
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(parent, fcntl.LOCK_UN)


def _lock(descriptor: int) -> None:
    import fcntl

    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _is_at(within: int, name: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(name, dir_fd=within, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _remove(parent: int, name: str, outer: int) -> None:
    """Removes a folder with nothing in it that another pull could go on with."""
    with contextlib.suppress(OSError):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(_INNER, dir_fd=outer)  # refuses where it is not empty
        os.unlink(_LOCK, dir_fd=outer)
        os.rmdir(name, dir_fd=parent)
