"""CIFAR-10's original files, and no other pickles.

Reading a pickle can run code, and even one restricted to arrays can corrupt memory through a crafted dtype. So a file
is unpickled only after its MD5 sum, as torchvision publishes it, has been compared: of the very bytes that are then
read. Everything else belongs into `train.npz` and `test.npz` (`klas_zoo.data.arrays`) or into image folders.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path

import numpy as np

from klas_zoo.errors import DataError

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def find(folder: Path) -> Path | None:
    """The folder of the batches: this one, or `cifar-10-batches-py` in it; None: there are none."""
    places = (folder, folder / "cifar-10-batches-py")
    return next((place for place in places if (place / "data_batch_1").is_file()), None)


def read(folder: Path, *, train: bool) -> tuple[np.ndarray, list[int]]:
    """Images (N, 32, 32, 3) uint8 and labels 0..9 from a folder `cifar-10-batches-py`.

    Raises:
        DataError: a batch is missing, or is not the original file.
    """
    from torchvision.datasets import CIFAR10  # not at the top: other images are read without torch

    images, labels = [], []
    for name, md5 in CIFAR10.train_list if train else CIFAR10.test_list:
        rows, found = _read_batch(folder / name, md5)
        images.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.extend(found)
    return np.ascontiguousarray(np.concatenate(images)), labels


def _read_batch(path: Path, md5: str) -> tuple[np.ndarray, list[int]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"CIFAR-10 is not complete: {path} cannot be read ({error.strerror}).") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise DataError(
            f"{path} is not the original file of CIFAR-10: its MD5 sum differs. Other pickles are not read, because "
            "that can run code: save the images as train.npz and test.npz (docs/data.md), or as folders of PNG files."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy's, about arrays that were pickled by Python 2
        batch = pickle.loads(content, encoding="latin1")
    return batch["data"], batch["labels"]
