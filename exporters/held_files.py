"""Files of a package that stay open: what is hashed is what is used, and a later change of it does not go unnoticed."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import weakref
from pathlib import Path

from klas_zoo.errors import DamagedPackage, PackageError
from klas_zoo.exporters.graphs import check_graph
from klas_zoo.exporters.manifest import FileEntry, PackagedRoute
from klas_zoo.exporters.package import Package, read_table

_State = tuple[int, int, int, int, int]


class HeldPackage:
    """The graphs and the weights of a package, as a session reads them.

    Graphs are read once, from the file that was hashed. Weights are mapped by the runtime, which opens them by their
    name: `check` compares what stands there with the file that was hashed and is held open here.

    Raises:
        DamagedPackage: a file is not the one that the manifest names, or the manifest is another than when the package
            was opened.
    """

    def __init__(self, package: Package) -> None:
        self.package = package
        if package.digest and read_table(package.folder)[1] != package.digest:
            raise DamagedPackage(f"The package {package.folder} was replaced after it was opened: open it again.")
        used = {package.weights.name, *(one.file for one in package.routes)}
        for name in package.manifest.files:
            if name not in used:
                package.check_file(name, content=True)
        self._weights = _HeldFile(package.weights, package.manifest.files[package.weights.name])

    def graph(self, route: PackagedRoute) -> bytes:
        """The graph of a route, whose weights are read from the package's folder."""
        path = self.package.engine(route)
        content = _HeldFile(path, self.package.manifest.files[path.name]).content()
        check_graph(path, self.package.weights, content)
        return content

    def check_opened(self) -> None:
        """Called when the runtime has mapped the weights: their name still leads to the file that was hashed.

        Raises:
            DamagedPackage: it does not.
        """
        self._weights.check_name()
        self.check()

    def check(self) -> None:
        """Called after every run; asks the system for the state of one open file, which takes microseconds.

        Raises:
            DamagedPackage: somebody has written to the weights since they were hashed.
        """
        self._weights.check()


class _HeldFile:
    """A regular file, opened without following a link, that holds what a manifest says."""

    def __init__(self, path: Path, entry: FileEntry) -> None:
        self._path, self._entry, self._lock = path, entry, threading.Lock()
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise DamagedPackage(f"{path} is a link; a package holds regular files only.") from error
            raise PackageError(f"{path} cannot be read: {error.strerror}.") from error
        weakref.finalize(self, os.close, self._descriptor)
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise DamagedPackage(f"{path} is no regular file.")
        self._state = self._now()
        if self._sha256() != entry.sha256 or self._now() != self._state:
            raise DamagedPackage(f"{path} is not the file that was written: its SHA-256 is another. Copy it again.")

    def content(self) -> bytes:
        """All of the file, compared once more: it may be written to while it is read."""
        found = os.pread(self._descriptor, self._entry.size_bytes + 1, 0)
        if hashlib.sha256(found).hexdigest() != self._entry.sha256:
            raise self._changed()
        return found

    def check_name(self) -> None:
        try:
            named = self._path.stat(follow_symlinks=False)
        except OSError as error:
            raise self._changed() from error
        if _state(named)[:2] != self._now()[:2]:
            raise self._changed()

    def check(self) -> None:
        now = self._now()
        if now == self._state:
            return
        with self._lock:
            # another link, or another mode, changes nothing of the content
            if self._sha256() != self._entry.sha256 or self._now() != now:
                raise self._changed()
            self._state = now

    def _changed(self) -> DamagedPackage:
        return DamagedPackage(
            f"{self._path} was changed while it was open: answers computed from it may be wrong. Copy the package "
            "again, beside it, and open the copy."
        )

    def _now(self) -> _State:
        return _state(os.fstat(self._descriptor))

    def _sha256(self) -> str:
        digest, place = hashlib.sha256(), 0
        while chunk := os.pread(self._descriptor, 1 << 20, place):
            digest.update(chunk)
            place += len(chunk)
        return digest.hexdigest()


def _state(found: os.stat_result) -> _State:
    """Changes with every write, and with every rename of the file."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns
