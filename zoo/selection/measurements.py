"""What selectors decide by: numbers that cost forward passes, measured once and kept with the build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, Literal

import numpy as np

from klas_zoo.errors import SelectionError
from klas_zoo.routes import Seam
from klas_zoo.selection.candidates import Pair
from klas_zoo.selection.similarity import Similarities

Values = Mapping[Seam, float]
Need = Literal["outputs", "probes", "calibrated", "cka", "residual", "accuracy", "output_kl", "latency_ms"]


class SelectionWarning(UserWarning):
    """Selection goes on, but what it goes by may mean little."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """None where nobody asked for it. A selector names the fields it needs.

    Attributes:
        outputs: (cheaper, dearer) → Θ between the anchors' own outputs, in nats.
        probes: Θ between probes of all blocks.
        calibrated: the same of probes whose temperature was fitted on other held-out images.
        cka: linear CKA of the two sides of a seam, 0..1, 1 alike.
        residual: share of the target features' variance that the closed-form T leaves, 0..1.
        accuracy: top-1 of the stitch right after the closed-form T, per cent.
        output_kl: mean KL(target's output ‖ stitch's output) right after the closed-form T, in nats.
        latency_ms: of every whole anchor, one image.
    """

    outputs: Mapping[Pair, float] | None = None
    probes: Similarities | None = None
    calibrated: Similarities | None = None
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
        """Θ between the anchors' own outputs, (cheaper, dearer), in nats."""
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
        for name in ("probes", "calibrated"):
            if (similar := getattr(self, name)) is not None:
                found[name] = _similarities_to_json(similar)
        for name in _SEAM_VALUES:
            if (values := getattr(self, name)) is not None:
                found[name] = [[s.source, s.i, s.target, s.j, value] for s, value in values.items()]
        if self.latency_ms is not None:
            found["latency_ms"] = dict(self.latency_ms)
        return found

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Measurements:
        """What `to_json` wrote; fields of a newer version are left out."""
        known: dict[str, Any] = {}
        for name in {one.name for one in fields(cls)} & found.keys():
            value = found[name]
            if name == "outputs":
                known[name] = {(f, g): float(theta) for f, g, theta in value}
            elif name in ("probes", "calibrated"):
                known[name] = _similarities_from_json(value)
            elif name in _SEAM_VALUES:
                known[name] = {Seam(s, int(i), t, int(j)): float(one) for s, i, t, j, one in value}
            else:
                known[name] = {anchor: float(one) for anchor, one in value.items()}
        return cls(**known)


_SEAM_VALUES = ("cka", "residual", "accuracy", "output_kl")


def _similarities_to_json(found: Similarities) -> dict[str, Any]:
    return {
        "between": [[f, g, table.tolist()] for (f, g), table in found.between.items()],
        "probe_accuracy": {name: list(map(float, one)) for name, one in found.probe_accuracy.items()},
        "entropy": {name: list(map(float, one)) for name, one in found.entropy.items()},
        "images": found.images,
        "chance": found.chance,
    }


def _similarities_from_json(found: dict[str, Any]) -> Similarities:
    return Similarities(
        between={(f, g): np.array(table) for f, g, table in found["between"]},
        probe_accuracy={name: np.array(one) for name, one in found["probe_accuracy"].items()},
        entropy={name: np.array(one) for name, one in found["entropy"].items()},
        images=found["images"],
        chance=found["chance"],
    )
