"""Images in memory: from `train.npz` and `test.npz`, and as a family's embedded sample."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from klas_zoo.data.opened import Opened
from klas_zoo.errors import DataError, first_line
from klas_zoo.pixels import decode

_HELD = ("val.npz", "test.npz")
_MOST_BYTES = 16 * 2**30


class ImageArray:
    """Images (N, H, W, 3) uint8, which need no check: there is nothing to decode."""

    in_memory = True

    def __init__(self, images: np.ndarray, labels: Sequence[int]) -> None:
        self.images, self.labels = images, labels

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def name(self, index: int) -> str:
        return f"number {index}"

    def identity(self) -> Iterator[bytes]:
        yield self.images.tobytes()


def open_arrays(folder: Path) -> Opened | None:
    """`train.npz` and `val.npz` (or `test.npz`): `images` (N, H, W, 3) or (N, H, W) uint8, `labels` (N,) of integers
    from 0, and perhaps `classes`, the names by number. None: there are not both files.

    Raises:
        DataError: a file is damaged or holds something else. Nothing in it is ever unpickled.
    """
    held = next((folder / name for name in _HELD if (folder / name).is_file()), None)
    if held is None or not (folder / "train.npz").is_file():
        return None
    (train, names), (test, _) = _read(folder / "train.npz"), _read(held)
    return Opened(train, test, f"arrays in {folder.resolve().name}", names)


def _read(path: Path) -> tuple[ImageArray, tuple[str, ...]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(one.file_size for one in archive.infolist())
        if size > _MOST_BYTES:
            raise DataError(f"{path} holds {size / 2**30:.0f} GiB: use an image folder for more than 16 GiB.")
        with np.load(path, allow_pickle=False) as found:
            images, labels = found["images"], found["labels"]
            names = found["classes"] if "classes" in found else np.empty(0, "U1")
    except DataError:
        raise
    except KeyError as error:
        raise DataError(f"{path} has no array {error}: it needs images (N, H, W, 3) and labels (N,).") from error
    except Exception as error:  # what zipfile, its decompressors and numpy's reader of headers raise has no base
        raise DataError(f"{path} cannot be read as an archive of arrays: {first_line(error)}.") from error
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, -1)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise DataError(f"{path}: images must be (N, H, W, 3) uint8, not {images.shape} {images.dtype}.")
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1] or (len(labels) and labels.min() < 0):
        raise DataError(f"{path}: labels must be {len(images)} integers from 0, not {labels.shape} {labels.dtype}.")
    if names.dtype.kind != "U" or names.ndim != 1:
        raise DataError(f"{path}: classes must be a list of texts, not {names.shape} {names.dtype}.")
    return ImageArray(images, labels.tolist()), tuple(map(str, names))


def open_sample(folder: Path) -> tuple[ImageArray, ImageArray]:
    """Sheets of square images, a row of the sheet after the other, as make_sample.py writes them.

    Raises:
        DataError: a file is missing, damaged, or holds fewer images than labels.
    """
    try:
        labels = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
        train = ImageArray(_cut(folder / "train.webp", labels["size"]), labels["train"])
        test = ImageArray(_cut(folder / "test.webp", labels["size"]), labels["test"])
    except (OSError, ValueError, KeyError, TypeError, DataError) as error:
        raise DataError(f"The family's sample images in {folder} cannot be read: {error}.") from error
    for name, part in (("train", train), ("test", test)):
        if len(part.images) < len(part.labels):
            raise DataError(
                f"{folder} is not a sample: {len(part.labels)} {name} labels for {len(part.images)} images."
            )
    return train, test


def _cut(sheet: Path, size: int) -> np.ndarray:
    pixels = np.asarray(decode(sheet))
    rows, columns = pixels.shape[0] // size, pixels.shape[1] // size
    tiles = pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles).reshape(-1, size, size, 3)
