"""What stages of builds gave, on disk, each under a key made of everything that determines it.

    <registry>/cache/<stage>/<key>/              a complete result; `stage.json` says what made it
    <registry>/cache/<stage>/<key>.unfinished/   what an interrupted stage goes on from
    <registry>/cache/<stage>/<key>.lock          held by the process that works on it

A result is written beside its place and renamed, so it is there as a whole or not at all. The folder
may be deleted whenever no build is running: builds then start from their beginning.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klas_zoo.files import make_directory, sync_directory

SCHEMA_VERSION = 1
Json = Mapping[str, Any]


def content_key(inputs: Json) -> str:
    """32 hexadecimal digits that differ wherever `inputs`, as JSON, differ."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


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
        # the file stays: a lock on a file that another process has just unlinked would guard nothing
        with (folder.parent / f"{key}.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                on_wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                yield
            finally:
                # a forked worker that lives on has the lock too: closing alone would not free it
                fcntl.flock(lock, fcntl.LOCK_UN)


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
