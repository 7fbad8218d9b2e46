"""What stages of builds gave, on disk, each under a key made of everything that determines it.

    <registry>/cache/<stage>/<key>/              a complete result; `stage.json` says what made it
    <registry>/cache/<stage>/<key>.unfinished/   what an interrupted stage goes on from
    <registry>/cache/<stage>/<key>.lock          held by the process that works on it
    <registry>/cache/in-use.lock                 held by every build that runs, together

A result is written beside its place and renamed, so it is there as a whole or not at all. The folder
may be deleted whenever no build is running: builds then start from their beginning. `collect` deletes
what no registered build was made from and nobody used for a while.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from klas_zoo.errors import RegistryError
from klas_zoo.files import make_directory, sync_directory

SCHEMA_VERSION = 1
_IN_USE = "in-use.lock"
_ENTRY = re.compile(r"\.?([0-9a-f]{32})(\..+)?")  # whatever lies here for a key: result, checkpoint, lock, leftovers
Json = Mapping[str, Any]


def content_key(inputs: Json) -> str:
    """32 hexadecimal digits that differ wherever `inputs`, as JSON, differ."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Unused:
    """A result that nobody needs, with the checkpoint and the lock of its key where there are any."""

    stage: str
    key: str
    size_bytes: int


@dataclass(frozen=True)
class Cache:
    """A folder of results. Several processes may use it at once."""

    root: Path

    def folder(self, stage: str, key: str) -> Path:
        """Where the result lies, whether or not it is there."""
        return self.root / stage.replace(" ", "-") / key

    def unfinished(self, stage: str, key: str) -> Path:
        """A folder for what a stage needs to go on after an interruption; may not exist."""
        return self.folder(stage, f"{key}.unfinished")

    def facts(self, stage: str, key: str) -> dict[str, Any] | None:
        """What was noted with the result; None where there is no result that this version reads."""
        try:
            found = json.loads((self.folder(stage, key) / "stage.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # what cannot be read is as good as not there
        readable = isinstance(found, dict) and found.get("schema_version") == SCHEMA_VERSION
        return found if readable else None

    def used(self, stage: str, key: str) -> None:
        """Notes that a result was used now."""
        with suppress(OSError):  # another user's: its age then counts from when it was made
            os.utime(self.folder(stage, key))

    @contextmanager
    def storing(self, stage: str, key: str, facts: Callable[[], Json]) -> Iterator[Path]:
        """Yields a folder to write into; on success it becomes the result, and replaces one that was there.

        Args:
            facts: asked when everything else is written; noted with the result.
        """
        target = self.folder(stage, key)
        make_directory(target.parent)
        for left in target.parent.glob(f".{key}.*"):
            shutil.rmtree(left)  # of a process that died here; whoever lives holds the lock, and that is us
        temporary = target.parent / f".{key}.part"
        temporary.mkdir()
        try:
            yield temporary
            note = {"schema_version": SCHEMA_VERSION, "stage": stage, "key": key, **facts()}
            (temporary / "stage.json").write_text(json.dumps(note, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            _sync(temporary)
            if target.exists():
                target.rename(target.parent / f".{key}.old")
            temporary.rename(target)
            sync_directory(target.parent)
            shutil.rmtree(target.parent / f".{key}.old", ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(self.unfinished(stage, key), ignore_errors=True)

    @contextmanager
    def working(self, stage: str, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Keeps other processes from the same work; calls `on_wait` once if one is at it.

        The system frees the lock when the process dies.
        """
        folder = self.folder(stage, key)
        make_directory(folder.parent)
        with _locked(folder.parent / f"{key}.lock", fcntl.LOCK_EX, on_wait):
            yield

    @contextmanager
    def in_use(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keeps `collect` away while a build runs; builds do not keep one another away."""
        make_directory(self.root)
        with _locked(self.root / _IN_USE, fcntl.LOCK_SH, on_wait):
            yield

    def collect(
        self, needed: Callable[[], Collection[str]], *, unused_s: float, dry_run: bool = False
    ) -> list[Unused]:
        """Deletes what nobody needs, and nobody made or used in the last `unused_s` seconds.

        Args:
            needed: gives the keys to keep; asked when no build can register any more.
            dry_run: change nothing, and mind no build.

        Raises:
            RegistryError: a build is running: what it goes on from may not be registered yet.
        """
        if not self.root.is_dir():
            return []
        if dry_run:
            return self._unused(needed(), unused_s)

        def refuse() -> NoReturn:
            raise RegistryError(
                f"A build is running: results in {self.root} can be deleted when it has ended. None was."
            )

        with _locked(self.root / _IN_USE, fcntl.LOCK_EX, refuse):
            found = self._unused(needed(), unused_s)
            for one in found:
                for path in self._entries(one.stage)[one.key]:
                    _remove(path)
            return found

    def _unused(self, needed: Collection[str], unused_s: float) -> list[Unused]:
        before, found = time.time() - unused_s, []
        for stage in sorted(path.name for path in self.root.iterdir() if path.is_dir()):
            for key, paths in sorted(self._entries(stage).items()):
                # a lock is as old as the first try, so what lies beside it counts
                aged = [path for path in paths if path.suffix != ".lock"] or paths
                if key not in needed and max(path.stat().st_mtime for path in aged) <= before:
                    found.append(Unused(stage=stage, key=key, size_bytes=sum(map(_size_bytes, paths))))
        return found

    def _entries(self, stage: str) -> dict[str, list[Path]]:
        """What lies there for each key; files of other names are nobody's business here."""
        entries: dict[str, list[Path]] = {}
        for path in sorted((self.root / stage).iterdir()):
            if (match := _ENTRY.fullmatch(path.name)) and not path.is_symlink():
                entries.setdefault(match[1], []).append(path)
        return entries


@contextmanager
def _locked(file: Path, kind: int, on_wait: Callable[[], None]) -> Iterator[None]:
    """Holds a lock of fcntl's `kind`; calls `on_wait` once, before it waits for others.

    The file stays: a lock on a file that another process has just unlinked would guard nothing.
    """
    with file.open("ab") as lock:
        try:
            fcntl.flock(lock, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(lock, kind)
        try:
            yield
        finally:
            # a forked worker that lives on has the lock too: closing alone would not free it
            fcntl.flock(lock, fcntl.LOCK_UN)


def _size_bytes(path: Path) -> int:
    return sum(one.lstat().st_size for one in (path, *path.rglob("*")) if one.is_file())


def _remove(path: Path) -> None:
    """So that no half of a result is ever taken for a whole one."""
    if path.is_file():
        path.unlink()
        return
    if not path.name.startswith("."):
        path = path.rename(path.with_name(f".{path.name}.old"))
    shutil.rmtree(path)


def _sync(folder: Path) -> None:
    """Makes a folder and all that is in it survive a power cut."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    sync_directory(folder)
