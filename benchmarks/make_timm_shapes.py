"""Writes the shapes of the tensors of all timm models, by which klas-zoo recognises checkpoints.

    python benchmarks/make_timm_shapes.py zoo/families/timm_shapes.json.gz

About five minutes; no weights are made or fetched. Scalars (counters of batch norms) are left out.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch


def shapes_of(name: str) -> Counter[str]:
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    return Counter(",".join(map(str, tensor.shape)) for tensor in state.values() if tensor.ndim)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found = {name: shapes_of(name) for name in timm.list_models()}
    arguments.out.write_bytes(packed(found))


def packed(found: dict[str, Counter[str]]) -> bytes:
    """Models of the same shapes in one entry: names, then number of a shape and how often, by turns."""
    texts = sorted({text for shapes in found.values() for text in shapes})
    place = {text: number for number, text in enumerate(texts)}
    groups: dict[tuple[int, ...], list[str]] = {}
    for name, shapes in found.items():
        flat = tuple(number for text in sorted(shapes, key=place.get) for number in (place[text], shapes[text]))
        groups.setdefault(flat, []).append(name)
    models = [[names, list(flat)] for flat, names in groups.items()]
    text = json.dumps({"timm": timm.__version__, "shapes": texts, "models": models}, separators=(",", ":"))
    return gzip.compress(text.encode(), mtime=0)


if __name__ == "__main__":
    main()
