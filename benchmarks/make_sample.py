"""Cuts the sample of CIFAR-10 that ships with deit-micro: 4,000 training and 1,000 test images.

    python benchmarks/make_sample.py data/cifar10 zoo/builtin/deit-micro/sample

The same number of every class, drawn with a fixed seed, as one lossless WebP sheet a
split and one JSON file of labels.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

COLUMNS = 50


def choose(labels: list[int], count: int, seed: int) -> np.ndarray:
    """Indices of `count` images, the same number of each class, in random order."""
    generator = np.random.default_rng(seed)
    array = np.asarray(labels)
    chosen = [generator.choice(np.flatnonzero(array == c), count // 10, replace=False) for c in range(10)]
    return generator.permutation(np.concatenate(chosen))


def write_sheet(path: Path, images: np.ndarray) -> None:
    count, size = images.shape[:2]
    tiles = images.reshape(count // COLUMNS, COLUMNS, size, size, 3).transpose(0, 2, 1, 3, 4)
    sheet = Image.fromarray(tiles.reshape(-1, COLUMNS * size, 3))
    sheet.save(path, "WEBP", lossless=True, quality=100, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="holds train.npz and test.npz (prepare_cifar10.py makes them)")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    table: dict[str, object] = {"size": 32}
    for split, count in (("train", 4_000), ("test", 1_000)):
        with np.load(arguments.data / f"{split}.npz") as found:
            images, labels = found["images"], found["labels"].tolist()
        chosen = choose(labels, count, arguments.seed)
        write_sheet(arguments.out / f"{split}.webp", images[chosen])
        table[split] = [labels[index] for index in chosen]
    (arguments.out / "labels.json").write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    main()
