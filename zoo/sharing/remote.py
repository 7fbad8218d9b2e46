"""A place that fsspec can reach, and what goes wrong there as one sentence."""

from __future__ import annotations

import errno
import os
import posixpath
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from klas_zoo.addresses import without_credentials
from klas_zoo.errors import KlasZooError, RemoteError
from klas_zoo.files import replacing
from klas_zoo.sharing.urls import scheme_of

# where an object appears as a whole or not at all
_WHOLE = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "memory"})
_BUGS = (TypeError, AttributeError, NameError, AssertionError)
_LEFT = re.compile(r"\.(?:[0-9a-f]{64}|[A-Za-z0-9._@-]+\.json)\.[0-9a-f]{8}\.part")  # as `replacing` names files
_DAY_S = 86_400
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs"}


class Remote:
    """A folder at a URL. Paths are relative to it, with slashes.

    Args:
        url: `s3://bucket/zoo`, `gs://…`, any other of fsspec, or a local folder.
        options: what fsspec's file system of that protocol takes, such as `endpoint_url`.

    Raises:
        RemoteError: fsspec, or its part for that protocol, is missing; or there is no such protocol.
    """

    def __init__(self, url: str, options: Mapping[str, Any] | None = None) -> None:
        scheme_of(url)
        self.url = without_credentials(url.rstrip("/") or url)
        self._given = url
        try:
            import fsspec
        except ImportError as error:
            raise RemoteError("Pushing and pulling need fsspec: pip install 'klas-zoo[remote]'.") from error
        protocol = url.split("://", 1)[0].rsplit("::", 1)[-1]
        # a listing that somebody else made stale would hide what is there
        fresh = {"skip_instance_cache": True, "use_listings_cache": False}
        try:
            with self._speaking("reached", bugs=()):  # some protocols lack arguments without which they are none
                self._fs, self._root = fsspec.url_to_fs(url, **fresh, **(options or {}))
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            advice = f"pip install 'klas-zoo[{extra}]'" if extra else _first_line(error)
            raise RemoteError(f"{self.url} needs another package: {advice}.") from error
        spoken = self._fs.protocol
        self._protocols = {spoken} if isinstance(spoken, str) else set(spoken)
        self._local = bool(self._protocols & {"file", "local"})

    def where(self, path: str) -> str:
        return f"{self.url}/{path}"

    def read(self, path: str, most_bytes: int) -> bytes | None:
        """The content of an object, but at most one byte more than `most_bytes`; None: it is not there.

        Raises:
            RemoteError: it cannot be read.
        """
        with self._speaking("read", path):
            try:
                if self._local:
                    return _read_file(Path(self._full(path)), most_bytes + 1)
                content: bytes = self._fs.cat_file(self._full(path), start=0, end=most_bytes + 1)
            except (FileNotFoundError, IsADirectoryError):
                return None
            return content

    def size(self, path: str) -> int | None:
        """
        Raises:
            RemoteError: it cannot be read.
        """
        with self._speaking("read", path):
            try:
                size: int = self._fs.info(self._full(path))["size"]
            except FileNotFoundError:
                return None
            return size

    def names(self, path: str) -> list[str]:
        """What lies in a folder; empty where there is none.

        Raises:
            RemoteError: it cannot be read.
        """
        with self._speaking("read", path):
            try:
                found = self._fs.ls(self._full(path), detail=False)
            except FileNotFoundError:
                return []
            return sorted({posixpath.basename(str(one).rstrip("/")) for one in found})

    def write(self, path: str, content: bytes) -> None:
        """Writes an object, so that a reader never sees half of it.

        Raises:
            RemoteError: it cannot be written.
        """
        with self._speaking("written", path):
            full = self._full(path)
            if self._local:
                with replacing(Path(full)) as temporary:
                    temporary.write_bytes(content)
            elif self._protocols & _WHOLE:
                self._fs.pipe_file(full, content)
            else:
                self._write_and_move(full, content)

    def remove_leftovers(self, newest: str) -> None:
        """Removes what pushes that were killed left half written in a folder; object stores have no halves.

        Args:
            newest: an object that was written just now. Half of a file that is a day older is written to no more; by
                the clock of the place, which other machines share.
        """
        if not self._local:
            return
        root = Path(self._full(""))
        with suppress(OSError):  # it is tidying: another push may be at it, or the files be another user's
            before = (root / newest).stat().st_mtime - _DAY_S
            for path in (*root.glob("objects/*/.*.part"), *root.glob("packages/*/.*.part")):
                with suppress(OSError):
                    if _LEFT.fullmatch(path.name) and path.lstat().st_mtime < before:
                        path.unlink()

    def _write_and_move(self, full: str, content: bytes) -> None:
        temporary = f"{full}.{os.urandom(4).hex()}.part"
        self._fs.makedirs(posixpath.dirname(full), exist_ok=True)
        try:
            self._fs.pipe_file(temporary, content)
            self._fs.mv(temporary, full)
        except BaseException:
            with suppress(Exception):  # the first error is the one to report
                self._fs.rm_file(temporary)
            raise

    def _full(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}"

    @contextmanager
    def _speaking(self, done: str, path: str = "", bugs: tuple[type[Exception], ...] = _BUGS) -> Iterator[None]:
        try:
            yield
        except (KlasZooError, ImportError):
            raise
        except bugs:
            raise
        except Exception as error:  # what file systems and their transports raise has no base of its own
            where = self.where(path) if path else self.url
            what = error.strerror if isinstance(error, OSError) and error.strerror else _first_line(error)
            sentence = f"{where} cannot be {done}: {what.rstrip('.')}. Rerun the command to resume."
            safe = without_credentials(sentence, self._given)
            raise RemoteError(safe) from (error if safe == sentence else None)


def _read_file(path: Path, most_bytes: int) -> bytes:
    """The beginning of a file. A pipe would wait for a writer for ever, and opening a device may do something."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    with os.fdopen(os.open(path, flags), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file")
        return file.read(most_bytes)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
