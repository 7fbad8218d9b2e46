"""Where images come from: folders, CIFAR-10, a family's embedded sample, shards and Parquet files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from torchvision.datasets import ImageFolder

from klas_zoo.data import cifar10
from klas_zoo.data.classes import numbers_of
from klas_zoo.data.parquet import hub_name, open_hub, open_parquet
from klas_zoo.data.shards import open_shards, split_files
from klas_zoo.errors import DataError


class LabelledImages(Protocol):
    """What a source has: PIL images, their labels, and a name for each to complain with."""

    @property
    def labels(self) -> Sequence[int]: ...
    def image(self, index: int) -> Image.Image: ...
    def name(self, index: int) -> str: ...
    def identity(self) -> Iterator[bytes]:
        """What tells these images from others, cheap to read: the pixels, or names and sizes of files."""
        ...


def open_images(
    folder: Path | None, sample: Path | None, num_classes: int | None = None
) -> tuple[LabelledImages, LabelledImages, str]:
    """Training images, test images, and what they are in a few words.

    Args:
        num_classes: of the family; None takes the classes of a folder as they come.

    Raises:
        DataError: nothing there that can be used, or a folder's classes are not the family's.
    """
    if folder is None:
        if sample is None:
            raise DataError("This family brings no images of its own: say --data DIR.")
        return (*_open_sample(sample), "CIFAR-10 sample")
    if (name := hub_name(folder)) is not None:
        return open_hub(name)
    if not folder.is_dir():
        raise DataError(f"--data {folder} is not a folder.")
    for place in (folder, folder / "cifar-10-batches-py"):
        if (place / "data_batch_1").is_file():
            numbers_of(cifar10.CLASSES, num_classes or len(cifar10.CLASSES), "CIFAR-10")
            parts = [ImageArray(*cifar10.read(place, train=train)) for train in (True, False)]
            return parts[0], parts[1], "CIFAR-10"
    for held in ("val", "test"):
        if (folder / "train").is_dir() and (folder / held).is_dir():
            train, test = FolderOfImages(folder / "train"), FolderOfImages(folder / held)
            if train.classes != test.classes:
                odd = sorted(set(train.classes) ^ set(test.classes))[0]
                raise DataError(f"{folder}: train and {held} have other classes; one has '{odd}', one has not.")
            description = f"images in {folder.resolve().name}"
            if num_classes is not None:
                numbers = numbers_of(train.classes, num_classes, description)
                train.renumber(numbers)
                test.renumber(numbers)
            return train, test, description
        if shards := split_files(folder, held, ".tar"):
            return open_shards(*shards, folder.resolve().name)
        if files := split_files(folder, held, ".parquet"):
            return open_parquet(*files, folder.resolve().name)
    raise DataError(
        f"{folder} holds neither train/ and val/ (or test/) with a folder a class, nor cifar-10-batches-py, nor "
        "train*.tar and val*.tar, nor train*.parquet and val*.parquet."
    )


class FolderOfImages:
    """One folder a class, as in ImageNet."""

    def __init__(self, folder: Path) -> None:
        try:
            found = ImageFolder(str(folder))
        except FileNotFoundError as error:
            raise DataError(f"{folder} has no usable classes: {str(error).splitlines()[0]}") from error
        self.classes = found.classes
        self.labels = found.targets
        self._paths = [Path(path) for path, _ in found.samples]

    def renumber(self, numbers: Sequence[int]) -> None:
        """Gives every class another number."""
        self.labels = [numbers[label] for label in self.labels]

    def image(self, index: int) -> Image.Image:
        with Image.open(self._paths[index]) as opened:
            return opened.convert("RGB")

    def name(self, index: int) -> str:
        return str(self._paths[index])

    def identity(self) -> Iterator[bytes]:
        for path in self._paths:
            yield f"{path.parent.name}/{path.name}:{path.stat().st_size}".encode()


class ImageArray:
    """Images in memory: (N, H, W, 3) uint8."""

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        self.images, self.labels = images, labels

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def name(self, index: int) -> str:
        return f"number {index}"

    def identity(self) -> Iterator[bytes]:
        yield self.images.tobytes()


def _open_sample(folder: Path) -> tuple[ImageArray, ImageArray]:
    """Sheets of square images, a row of the sheet after the other, as make_sample.py writes them."""
    try:
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        train = ImageArray(_cut(folder / "train.webp", labels["size"]), labels["train"])
        test = ImageArray(_cut(folder / "test.webp", labels["size"]), labels["test"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"The family's sample images in {folder} cannot be read: {error}.") from error
    for name, part in (("train", train), ("test", test)):
        if len(part.images) < len(part.labels):
            raise DataError(
                f"{folder} is no sample: {len(part.labels)} {name} labels for {len(part.images)} images."
            )
    return train, test


def _cut(sheet: Path, size: int) -> np.ndarray:
    with Image.open(sheet) as opened:
        pixels = np.asarray(opened.convert("RGB"))
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    tiles = pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(-1, size, size, 3)


def fingerprint(*sources: LabelledImages) -> str:
    """A hash of all labels, and of images in memory or of names and sizes of files."""
    digest = hashlib.sha256()
    for source in sources:
        digest.update(np.asarray(source.labels, dtype=np.int64).tobytes())
        for part in source.identity():
            digest.update(part)
    return digest.hexdigest()
