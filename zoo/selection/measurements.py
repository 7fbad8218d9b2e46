"""What selectors decide by: numbers that cost forward passes, measured once and cached with the build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np

from klas_zoo.errors import SelectionError
from klas_zoo.reading import convert
from klas_zoo.routes import Seam
from klas_zoo.selection.candidates import Pair
from klas_zoo.selection.similarity import Similarities

Values = Mapping[Seam, float]
Need = Literal["outputs", "probes", "cka", "residual", "accuracy", "output_kl", "latency_ms"]

SEAM_NEEDS: frozenset[Need] = frozenset({"cka", "residual", "accuracy", "output_kl"})
"""What is measured for every candidate of its own, and so for those of one direction and of some pairs only."""


class SelectionWarning(UserWarning):
    """The selection is made, but the measurements behind it may mean little."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """None where it was not measured. A selector names the fields it needs.

    Attributes:
        outputs: (smaller, larger) → Θ between the anchors' own outputs, in nats.
        probes: Θ between probes of all blocks.
        cka: linear CKA of the two sides of a seam, 0..1, 1 alike.
        residual: share of the target features' variance that the closed-form T leaves, 0..1.
        accuracy: top-1 of the stitch right after the closed-form T, per cent.
        output_kl: mean KL(target's output ‖ stitch's output) right after the closed-form T, in nats.
        latency_ms: of every whole anchor, one image.
    """

    outputs: Mapping[Pair, float] | None = None
    probes: Similarities | None = None
    cka: Values | None = None
    residual: Values | None = None
    accuracy: Values | None = None
    output_kl: Values | None = None
    latency_ms: Mapping[str, float] | None = None

    def has(self, need: Need) -> bool:
        if need == "outputs":
            return self.outputs is not None or self.probes is not None
        return getattr(self, need) is not None

    def get(self, need: Need) -> Any:
        """The field `need`.

        Raises:
            SelectionError: it was not measured.
        """
        if not self.has(need):
            raise SelectionError(f"This selector needs the measurement '{need}', which was not taken.")
        return getattr(self, need)

    def output_distances(self) -> dict[Pair, float]:
        """Θ between the anchors' own outputs, (smaller, larger), in nats."""
        if self.outputs is not None:
            return dict(self.outputs)
        between: Similarities = self.get("probes")
        names = list(dict.fromkeys(name for pair in between.between for name in pair))
        return {(f, g): between.of_outputs(f, g) for f, g in combinations(names, 2)}

    def to_json(self) -> dict[str, Any]:
        """Fields that were measured; pairs and seams as lists, since JSON has only strings as keys."""
        found: dict[str, Any] = {}
        if self.outputs is not None:
            found["outputs"] = [[*pair, value] for pair, value in self.outputs.items()]
        if self.probes is not None:
            found["probes"] = _similarities_to_json(self.probes)
        for name in _SEAM_VALUES:
            if (values := getattr(self, name)) is not None:
                found[name] = [[s.source, s.i, s.target, s.j, value] for s, value in values.items()]
        if self.latency_ms is not None:
            found["latency_ms"] = dict(self.latency_ms)
        return found

    @classmethod
    def from_json(cls, found: Any, where: str = "measurements") -> Measurements:
        """What `to_json` wrote; fields of another version are left out.

        Raises:
            SelectionError: it is something else.
        """
        table = convert(found, _Written, where, SelectionError, more=True)
        values: dict[str, Any] = {name: getattr(table, name) for name in _SEAM_VALUES}
        return cls(
            outputs=None if table.outputs is None else {(f, g): theta for f, g, theta in table.outputs},
            probes=None if table.probes is None else table.probes.similarities,
            latency_ms=table.latency_ms,
            **{name: rows and {Seam(*seam): value for *seam, value in rows} for name, rows in values.items()},
        )


_SEAM_VALUES = ("cka", "residual", "accuracy", "output_kl")
_SeamRows = list[tuple[str, int, str, int, float]]


@dataclass(frozen=True, kw_only=True)
class _WrittenSimilarities:
    """`Similarities` as they are written."""

    between: list[tuple[str, str, list[list[float]]]]
    probe_accuracy: dict[str, list[float]]
    entropy: dict[str, list[float]]
    images: int
    chance: float

    @property
    def similarities(self) -> Similarities:
        return Similarities(
            between={(f, g): np.array(table) for f, g, table in self.between},
            probe_accuracy={name: np.array(one) for name, one in self.probe_accuracy.items()},
            entropy={name: np.array(one) for name, one in self.entropy.items()},
            images=self.images,
            chance=self.chance,
        )


@dataclass(frozen=True, kw_only=True)
class _Written:
    """`Measurements` as they are written."""

    outputs: list[tuple[str, str, float]] | None = None
    probes: _WrittenSimilarities | None = None
    cka: _SeamRows | None = None
    residual: _SeamRows | None = None
    accuracy: _SeamRows | None = None
    output_kl: _SeamRows | None = None
    latency_ms: dict[str, float] | None = None


def _similarities_to_json(found: Similarities) -> dict[str, Any]:
    return {
        "between": [[f, g, table.tolist()] for (f, g), table in found.between.items()],
        "probe_accuracy": {name: list(map(float, one)) for name, one in found.probe_accuracy.items()},
        "entropy": {name: list(map(float, one)) for name, one in found.entropy.items()},
        "images": found.images,
        "chance": found.chance,
    }
