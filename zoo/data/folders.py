"""Images in folders: train/ with a folder for each class, and val/ alike or flat with annotations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from unicodedata import normalize

from PIL import Image

from klas_zoo.data.annotations import classes_of, find_annotations
from klas_zoo.data.classes import natural_key, number_classes, shown
from klas_zoo.data.opened import Opened
from klas_zoo.data.scanning import Scan, readable_suffixes, scan
from klas_zoo.errors import DataError
from klas_zoo.pixels import decode

HELD_NAMES = ("val", "validation", "valid", "test", "eval")
"""Of what reports accuracy; the first that holds anything is taken."""


class FolderOfImages:
    """One folder for each class, as in ImageNet; or one for all, and annotations.

    Attributes:
        classes: names in natural order.
        labels: of every image, the place of its class in `classes` until `renumber` is called.
        notes: sentences about what was skipped.
    """

    def __init__(self, folder: Path) -> None:
        found = scan(folder)
        self.notes = found.notes(folder)
        annotations = find_annotations(folder) if _is_flat(folder, found) else None
        if annotations is None:
            files = _by_folder(folder, found)
        else:
            images = found.loose or [file for files in found.classes.values() for file in files]
            files = list(classes_of(images, annotations))
            self.notes += (f"Classes of {folder} are read from {annotations}.",)
        # the two ways to write an accent are one name: macOS takes names apart, and copies of folders keep that
        files = [(path, normalize("NFC", name)) for path, name in files]
        self.classes = sorted({name for _, name in files}, key=natural_key)
        number = {name: place for place, name in enumerate(self.classes)}
        files.sort(key=lambda one: number[one[1]])  # stable: sorted within a class
        self.labels = [number[name] for _, name in files]
        self._paths = [path for path, _ in files]

    def renumber(self, numbers: Sequence[int]) -> None:
        """Gives every class another number."""
        self.labels = [numbers[label] for label in self.labels]

    def image(self, index: int) -> Image.Image:
        return decode(Path(self._paths[index]))

    def name(self, index: int) -> str:
        return shown(self._paths[index])

    def identity(self) -> Iterator[bytes]:
        for path in self._paths:
            folder, name = os.path.split(path)
            try:
                size = os.stat(path).st_size
            except OSError:
                size = -1  # gone, or a link that leads nowhere
            yield b"%s/%s:%d" % (os.fsencode(os.path.basename(folder)), os.fsencode(name), size)


def split_folders(folder: Path) -> tuple[Path, Path] | None:
    """train/ and the first of val/, validation/, valid/, test/ and eval/ that is not empty, in any case of letters."""
    try:
        places = {entry.name: Path(entry.path) for entry in os.scandir(folder) if entry.is_dir()}
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}.") from error

    def named(name: str) -> Path | None:
        return places.get(name) or next((path for other, path in places.items() if other.lower() == name), None)

    train = named("train")
    held = [path for path in map(named, HELD_NAMES) if path is not None]
    if train is None or not held:
        return None
    return train, next((path for path in held if _holds_anything(path)), held[0])


def open_folders(
    train_folder: Path, held_folder: Path, description: str, num_classes: int | None, listed: Sequence[str] | None
) -> Opened:
    """
    Raises:
        DataError: classes of the two differ, are not the family's, or hold no images.
    """
    train, test = FolderOfImages(train_folder), FolderOfImages(held_folder)
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes), key=natural_key)[0]
        one, other = (train_folder, held_folder) if odd in train.classes else (held_folder, train_folder)
        raise DataError(f"{one} has a class '{shown(odd)}' that {other} does not have: both need the same classes.")
    numbering = number_classes(train.classes, num_classes, description, listed)
    train.renumber(numbering.numbers)
    test.renumber(numbering.numbers)
    return Opened(
        train, test, description, numbering.names, (*train.notes, *test.notes, *numbering.notes), numbering.alternatives
    )


def _holds_anything(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(not entry.name.startswith(".") for entry in entries)


def _is_flat(folder: Path, found: Scan) -> bool:
    """Images in no class; or in the one folder that Tiny ImageNet keeps them in, beside their annotations."""
    return bool(found.loose and not any(found.classes.values())) or (folder / "val_annotations.txt").is_file()


def _by_folder(folder: Path, found: Scan) -> list[tuple[str, str]]:
    if not found.classes:
        flat = f" (images in no class: {len(found.loose):,})" if found.loose else ""
        annotated = ", or annotations (a labels.csv, or XML files)" if found.loose else ""
        raise DataError(f"{folder} has no usable classes{flat}. It needs a folder for each class{annotated}.")
    empty = [name for name, files in found.classes.items() if not files]
    if empty:
        listed = ", ".join(map(shown, empty[:5])) + (", …" if len(empty) > 5 else "")
        kinds = ", ".join(sorted(readable_suffixes()))
        raise DataError(
            f"{folder} has no usable classes in {len(empty)} of its folders, which hold no image ({kinds}): {listed}. "
            "Remove them, or put images in."
        )
    return [(file, name) for name, files in found.classes.items() for file in files]
