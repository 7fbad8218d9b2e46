"""Where images come from: folders, CIFAR-10, arrays, a family's embedded sample, shards and Parquet files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from klas_zoo.addresses import local_path
from klas_zoo.data import cifar10
from klas_zoo.data.arrays import ImageArray as ImageArray
from klas_zoo.data.arrays import open_arrays, open_sample
from klas_zoo.data.classes import number_classes
from klas_zoo.data.folders import HELD_NAMES, open_folders, split_folders
from klas_zoo.data.folders import FolderOfImages as FolderOfImages
from klas_zoo.data.opened import LabelledImages as LabelledImages
from klas_zoo.data.opened import Opened
from klas_zoo.data.parquet import hub_name, open_hub, open_parquet
from klas_zoo.data.shards import open_shards, split_files
from klas_zoo.errors import DataError


def open_images(
    folder: str | Path | None,
    sample: Path | None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
) -> Opened:
    """Training images, test images, and what they are.

    Args:
        num_classes: of the family; None takes the classes of a folder as they come.
        classes: of the family in its own order, where data name them; None: see `klas_zoo.data.classes`.

    Raises:
        DataError: nothing there that can be used, or the classes are not the family's.
    """
    if folder is None:
        if sample is None:
            raise DataError("This family brings no images of its own: pass --data DIR.")
        return Opened(*open_sample(sample), "CIFAR-10 sample", cifar10.CLASSES)
    if (name := hub_name(folder)) is not None:
        return open_hub(name, num_classes, classes)
    folder = local_path(folder, "a folder of images")
    if not folder.is_dir():
        raise DataError(f"--data {folder} is not a folder.")
    if (place := cifar10.find(folder)) is not None:
        return _open_cifar10(place, num_classes, classes)
    if (arrays := open_arrays(folder)) is not None:
        return arrays
    title = folder.resolve().name
    if shards := split_files(folder, ".tar"):
        return open_shards(*shards, title)
    if files := split_files(folder, ".parquet"):
        return open_parquet(*files, title, num_classes, classes)
    if folders := split_folders(folder):
        return open_folders(*folders, f"images in {title}", num_classes, classes)
    raise DataError(
        f"{folder} holds neither train/ and {'/, '.join(HELD_NAMES[:-1])}/ or {HELD_NAMES[-1]}/ with a folder for each "
        "class, nor cifar-10-batches-py, nor train.npz and test.npz, nor train*.tar and val*.tar, nor train*.parquet "
        "and val*.parquet."
    )


def open_test_images(
    folder: str | Path, num_classes: int | None = None, classes: Sequence[str] | None = None
) -> Opened:
    """Test images alone: those of a data set that `open_images` opens, or a folder with a folder for each class.

    Returns:
        `train` and `test` are both the test images.

    Raises:
        DataError: as `open_images`.
    """
    place = Path(folder)
    if hub_name(folder) is None and place.is_dir() and not _has_splits(place):
        images = FolderOfImages(place)
        numbering = number_classes(images.classes, num_classes, f"images in {place.resolve().name}", classes)
        images.renumber(numbering.numbers)
        description = f"{len(images.labels)} images in {place.resolve().name}"
        return Opened(images, images, description, numbering.names, (*images.notes, *numbering.notes))
    opened = open_images(folder, None, num_classes, classes)
    description = f"{opened.description}, {len(opened.test.labels)} test images"
    return opened._replace(train=opened.test, description=description)


def _has_splits(folder: Path) -> bool:
    return bool(
        cifar10.find(folder) is not None
        or (folder / "train.npz").is_file()
        or split_files(folder, ".tar")
        or split_files(folder, ".parquet")
        or split_folders(folder)
    )


def _open_cifar10(place: Path, num_classes: int | None, classes: Sequence[str] | None) -> Opened:
    numbering = number_classes(cifar10.CLASSES, num_classes or len(cifar10.CLASSES), "CIFAR-10", classes)
    parts = []
    for train in (True, False):
        images, labels = cifar10.read(place, train=train)
        parts.append(ImageArray(images, [numbering.numbers[label] for label in labels]))
    return Opened(parts[0], parts[1], "CIFAR-10", numbering.names)


def fingerprint(*sources: LabelledImages) -> str:
    """A hash of all labels, and of images in memory or of names and sizes of files."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(np.asarray(source.labels, dtype=np.int64).tobytes())
        for part in source.identity():
            digest.update(part)
    return digest.hexdigest()
