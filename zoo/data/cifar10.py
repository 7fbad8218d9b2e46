"""CIFAR-10 in the form torchvision keeps on disk, read without running what a pickle may hold."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from klas_zoo.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_TRAIN = tuple(f"data_batch_{index}" for index in range(1, 6))
_TEST = ("test_batch",)
# what arrays need under numpy 1 and 2, and in the original files of Python 2; nothing else
_ALLOWED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read(folder: Path, *, train: bool) -> tuple[np.ndarray, list[int]]:
    """Images (N, 32, 32, 3) uint8 and labels 0..9 from a folder `cifar-10-batches-py`.

    Raises:
        DataError: a batch is missing, damaged, or holds anything but arrays and labels.
    """
    images, labels = [], []
    for name in _TRAIN if train else _TEST:
        rows, found = _read_batch(folder / name)
        images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.extend(found)
    return np.ascontiguousarray(np.concatenate(images)), labels


def _read_batch(path: Path) -> tuple[np.ndarray, list[int]]:
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="latin1").load()
    except FileNotFoundError as error:
        raise DataError(f"CIFAR-10 is not complete: {path} does not exist.") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        raise DataError(f"{path} is not a batch of CIFAR-10 ({error}).") from error
    rows, labels = (batch.get("data"), batch.get("labels")) if isinstance(batch, dict) else (None, None)
    if (
        not isinstance(rows, np.ndarray)
        or rows.dtype != np.uint8
        or rows.ndim != 2
        or rows.shape[1] != 3_072
        or not isinstance(labels, list)
        or len(labels) != len(rows)
        or not all(type(label) is int and 0 <= label < 10 for label in labels)
    ):
        raise DataError(f"{path} is not a batch of CIFAR-10: expected data (N, 3072) and N labels 0..9.")
    return rows, labels
