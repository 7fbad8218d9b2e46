"""What stages of builds gave, on disk, each under a key made of everything that determines it.

    <registry>/cache/<stage>/<key>/              a complete result; `stage.json` says what made it, and the
                                                 size and SHA-256 of its files
    <registry>/cache/<stage>/<key>.unfinished/   what an interrupted stage resumes from
    <registry>/cache/<stage>/<key>.lock          held by the process that works on it
    <registry>/cache/in-use.lock                 held by every build that runs, together

A result is written beside its place and renamed, so it is there as a whole or not at all; it is compared with
its note before it is used. The folder
may be deleted whenever no build is running: builds then start from their beginning. `collect` deletes
what no registered build was made from and no build has used for a while.
"""

from __future__ import annotations

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
from klas_zoo.files import locked, make_directory, replacing, sealed, sha256_of, share_like, sync_directory, unsealed

SCHEMA_VERSION = 2  # 1: files without hashes, which are not believed
NOTE = "stage.json"
_IN_USE = "in-use.lock"
_ENTRY = re.compile(r"\.?([0-9a-f]{32})(\..+)?")  # whatever lies here for a key: result, checkpoint, lock, leftovers
Json = Mapping[str, Any]


def content_key(inputs: Json) -> str:
    """32 hexadecimal digits that differ wherever `inputs`, as JSON, differ."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"), allow_nan=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True)
class Unused:
    """A result that is not needed, with the checkpoint and the lock of its key where there are any."""

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
        """A folder for what a stage needs to resume after an interruption; may not exist."""
        return self.folder(stage, f"{key}.unfinished")

    def facts(self, stage: str, key: str) -> dict[str, Any] | None:
        """What was noted with the result; None where there is no result that this version reads.

        Besides what the stage noted: `files`, size and SHA-256 of each by its name, and `result`, a SHA-256 of all.
        """
        return read_note(self.folder(stage, key))

    def damage(self, stage: str, key: str) -> str | None:
        """The first file of a result that is not what was written; None where all are. Reads all of them."""
        folder = self.folder(stage, key)
        noted = (read_note(folder) or {}).get("files", {})
        for name, entry in noted.items():
            try:
                same = _entry(folder / name) == entry
            except OSError:
                same = False
            if not same:
                return str(name)
        return None

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
            shutil.rmtree(left)  # of a process that died here: a living one would hold the lock that this one holds
        temporary = target.parent / f".{key}.part"
        temporary.mkdir()
        try:
            yield temporary
            files = _entries(temporary)
            note = {"schema_version": SCHEMA_VERSION, "stage": stage, "key": key, "files": files, **facts()}
            note["result"] = content_key({name: entry["sha256"] for name, entry in files.items()})
            (temporary / NOTE).write_text(sealed(note), encoding="utf-8")
            for path in (temporary, *temporary.rglob("*")):
                self._share(path)
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
        self._share(folder.parent)
        with locked(folder.parent / f"{key}.lock", on_wait=on_wait) as lock:
            self._share(Path(lock.name))
            yield

    @contextmanager
    def in_use(self, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Keeps `collect` away while a build runs; builds do not keep one another away."""
        make_directory(self.root)
        self._share(self.root)
        with locked(self.root / _IN_USE, shared=True, on_wait=on_wait) as lock:
            self._share(Path(lock.name))
            yield

    def collect(
        self, needed: Callable[[], Collection[str]], *, unused_s: float, dry_run: bool = False
    ) -> list[Unused]:
        """Deletes what is not needed and was neither made nor used in the last `unused_s` seconds.

        Args:
            needed: gives the keys to keep; asked when no build can register any more.
            dry_run: change nothing, and mind no build.

        Raises:
            RegistryError: a build is running: what it resumes from may not be registered yet.
        """
        if not self.root.is_dir():
            return []
        if dry_run:
            return self._unused(needed(), unused_s)

        def refuse() -> NoReturn:
            raise RegistryError(
                f"A build is running: results in {self.root} can be deleted when it has ended. None was."
            )

        with locked(self.root / _IN_USE, on_wait=refuse):
            found = self._unused(needed(), unused_s)
            for one in found:
                for path in self._entries(one.stage)[one.key]:
                    _remove(path)
            return found

    def _share(self, path: Path) -> None:
        """Whoever may use the registry may use its cache, whatever this process's umask is."""
        model = self.root.parent / "registry.sqlite"
        if model.is_file():
            share_like(path, model)

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
        """What lies there for each key; other files are ignored."""
        entries: dict[str, list[Path]] = {}
        for path in sorted((self.root / stage).iterdir()):
            if (match := _ENTRY.fullmatch(path.name)) and not path.is_symlink():
                entries.setdefault(match[1], []).append(path)
        return entries


def read_note(folder: Path) -> dict[str, Any] | None:
    """What was noted with the result in a folder; None where it is not there, or not what was written."""
    try:
        found = unsealed((folder / NOTE).read_bytes())
    except OSError:
        return None  # what cannot be read is as good as not there
    return found if found and found.get("schema_version") == SCHEMA_VERSION else None


def registered_packages(folder: Path) -> dict[str, str]:
    """The digests of packages of the registry that hold files of a result in its folder's place, by their names."""
    return dict((read_note(folder) or {}).get("registered", {}))


def moved_to_registry(folder: Path, digests: Mapping[str, str], gone: Callable[[str], bool]) -> None:
    """Notes that files of a result are in packages of the registry now, and removes them here.

    Args:
        digests: of the packages, by their names; `registered_packages` gives them.
        gone: whether a file of the result is in one of them.
    """
    note = read_note(folder)
    if note is None:
        return  # the next build makes it again
    files = {name: entry for name, entry in note["files"].items() if not gone(name)}
    with replacing(folder / NOTE) as temporary:
        temporary.write_text(sealed({**note, "files": files, "registered": dict(digests)}), encoding="utf-8")
    # all that is not noted: a process that died here may have left some
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir():
            with suppress(OSError):  # others are left in it
                path.rmdir()
        elif path.relative_to(folder).as_posix() not in (*files, NOTE):
            path.unlink()


def _entries(folder: Path) -> dict[str, dict[str, Any]]:
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _entry(path) for path in found}


def _entry(path: Path) -> dict[str, Any]:
    if path.is_symlink():
        raise OSError(f"{path} is a link")
    return {"size_bytes": path.stat().st_size, "sha256": sha256_of(path)}


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
