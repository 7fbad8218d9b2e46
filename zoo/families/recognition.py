"""Which of timm's models a checkpoint is of, by the shapes of its tensors alone: names differ, shapes hardly do.

`timm_shapes.json.gz` holds the shapes of every model; `benchmarks/make_timm_shapes.py` makes it.
"""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib import resources

_LEAST = 0.2  # of all tensors; below that no model is like it


def nearest_models(shapes: Iterable[tuple[int, ...]], count: int = 3) -> list[tuple[str, float]]:
    """timm's models whose tensors are most like these, each with the share of tensors in common, 0..1.

    The share is |A ∩ B| / |A ∪ B| of the two multisets of shapes. Of models with the same shapes the first is named.
    """
    texts, models = _table()
    place = {text: number for number, text in enumerate(texts)}
    ours: Counter[int] = Counter()
    unknown = 0
    for shape in shapes:
        number = place.get(",".join(map(str, shape)))
        if number is None:
            unknown += bool(shape)
        else:
            ours[number] += 1
    found = []
    for name, theirs in models:
        common = sum(min(ours[number], amount) for number, amount in theirs.items())
        union = unknown + ours.total() + sum(theirs.values()) - common
        found.append((common / union if union else 0.0, name))
    found.sort(key=lambda one: (-one[0], one[1]))
    return [(name, share) for share, name in found[:count] if share >= _LEAST]


@cache
def _table() -> tuple[list[str], list[tuple[str, dict[int, int]]]]:
    """Shapes as text, and every model with how often it has which."""
    file = resources.files("klas_zoo.families") / "timm_shapes.json.gz"
    table = json.loads(gzip.decompress(file.read_bytes()))
    models = [(names[0], dict(zip(flat[::2], flat[1::2], strict=True))) for names, flat in table["models"]]
    return table["shapes"], models
