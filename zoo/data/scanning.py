"""Image files in a folder for each class, whatever else lies there.

Links are followed, but never back to a folder above. Names that begin with a dot and the folders of file managers,
archives and network storage are skipped, as are files that are not images; images that Pillow cannot read are counted.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from klas_zoo.data.classes import natural_key, shown
from klas_zoo.errors import DataError

_WANTED = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".tif", ".tiff", ".webp",
           ".gif", ".avif", ".jp2")  # fmt: skip
_IMAGES = {*_WANTED, ".heic", ".heif", ".jxl", ".svg", ".psd", ".raw", ".dng", ".cr2", ".nef", ".arw", ".dcm", ".npy"}
_SYSTEM = {"@eadir", "__macosx", "lost+found", "$recycle.bin", "system volume information", "#recycle"}
Identity = tuple[int, int]


@dataclass(kw_only=True)
class Scan:
    """What a folder holds.

    Attributes:
        classes: files of every class folder in natural order, sorted within the class.
        loose: images that lie directly in the folder, in no class.
        left_out: how many images of each suffix cannot be read.
        skipped: how often a hidden or system folder of that name was skipped.
        loops: links to a folder above.
    """

    classes: dict[str, list[str]] = field(default_factory=dict)
    loose: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    loops: list[str] = field(default_factory=list)

    def notes(self, folder: Path) -> tuple[str, ...]:
        """What was not taken, a sentence for each kind."""
        notes = []
        if self.left_out:
            notes.append(f"{folder}: images of kinds that Pillow cannot read were left out: {_counts(self.left_out)}.")
        if self.skipped:
            notes.append(f"{folder}: hidden and system folders were skipped: {_counts(self.skipped)}.")
        if self.loops:
            notes.append(f"{folder}: links to a folder above were not followed: {', '.join(self.loops[:3])}.")
        return tuple(notes)


def readable_suffixes() -> frozenset[str]:
    """Of the image files that are taken: those that this Pillow can read."""
    Image.init()
    return frozenset(suffix for suffix in _WANTED if suffix in Image.EXTENSION)


def scan(folder: Path) -> Scan:
    """
    Raises:
        DataError: a folder cannot be read, or a link in the place of a class leads nowhere.
    """
    found, suffixes = Scan(), readable_suffixes()
    above = {_identity(place) for place in (folder.resolve(), *folder.resolve().parents)}
    for entry in _entries(str(folder)):
        if entry.is_dir():
            if not _skip(entry, found) and not _loops(entry, above, found):
                files = list(_files(entry.path, above | {_identity(entry)}, suffixes, found))
                found.classes[entry.name] = sorted(files, key=os.path.split)
        elif _is_image(entry.name, suffixes, found):
            found.loose.append(entry.path)
        elif entry.is_symlink() and not os.path.exists(entry.path) and "." not in entry.name:
            raise DataError(f"{shown(entry.path)} is a link to something that does not exist.")
    found.classes = {name: found.classes[name] for name in sorted(found.classes, key=natural_key)}
    found.loose.sort()
    return found


def _files(folder: str, above: set[Identity], suffixes: frozenset[str], found: Scan) -> Iterator[str]:
    """Images in a folder and below."""
    for entry in _entries(folder):
        if not entry.is_dir():
            # pipes and links that lead nowhere, too: the check of all images names them
            if _is_image(entry.name, suffixes, found):
                yield entry.path
        elif not _skip(entry, found) and not _loops(entry, above, found):
            yield from _files(entry.path, above | {_identity(entry)}, suffixes, found)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{shown(folder)} cannot be read: {error.strerror}.") from error


def _is_image(name: str, suffixes: frozenset[str], found: Scan) -> bool:
    if name.startswith("."):
        return False
    suffix = os.path.splitext(name)[1].lower()
    if suffix in suffixes:
        return True
    if suffix in _IMAGES:
        found.left_out[suffix] += 1
    return False


def _skip(entry: os.DirEntry[str], found: Scan) -> bool:
    hidden = entry.name.startswith(".") or entry.name.lower() in _SYSTEM
    if hidden:
        found.skipped[entry.name] += 1
    return hidden


def _loops(entry: os.DirEntry[str], above: set[Identity], found: Scan) -> bool:
    loops = entry.is_symlink() and _identity(entry) in above
    if loops:
        found.loops.append(shown(entry.path))
    return loops


def _identity(place: Path | os.DirEntry[str]) -> Identity:
    try:
        facts = place.stat()
    except OSError as error:
        raise DataError(f"{shown(str(getattr(place, 'path', place)))} cannot be read: {error.strerror}.") from error
    return facts.st_dev, facts.st_ino


def _counts(counter: Counter[str]) -> str:
    most = sorted(counter.items(), key=lambda one: (-one[1], one[0]))[:5]
    return ", ".join(f"{shown(name)} ({count:,})" for name, count in most)
