"""What was found when an engine was compared with its route. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from klas_zoo.confidence import lower_paired_difference, upper_share

_RANGES = (
    (1, ("top1_agreement", "level")),
    (100, ("top1", "reference_top1")),
    (math.inf, ("max_abs_difference", "tolerance")),
    (2**63 - 1, ("images", "newly_wrong", "newly_right")),
)
"""The largest value of fields that are not below zero."""
RESIDUAL_NOTE = ("residual", "fp32")
"""Metadata of graphs that keep their residual stream in fp32."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Differences between an engine and the fp32 torch route it was exported from.

    What is None was not measured, or is not limited. Records written before `level` existed compare
    shares with their limits directly; all later ones compare confidence bounds.

    Attributes:
        images: how many real images were compared.
        max_abs_difference: largest |engine - torch| over all logits.
        top1_agreement: share of the images, 0..1, with the same most likely class.
        tolerance: the largest `max_abs_difference` that was allowed, in units of the logits.
        min_agreement: the smallest share of equal top classes that was allowed; 0: not limited.
        cosine: the smallest cosine similarity, -1..1, of an image's logits.
        min_cosine: the smallest `cosine` that was allowed.
        top1, reference_top1: accuracy of the engine and of torch on these images, per cent.
        most_lost: how far, in points, the true top-1 may lie below that of torch.
        level: of the one-sided confidence bounds, 0..1.
        newly_wrong, newly_right: images that only torch, and only the engine, classifies correctly.
        rounded_images, rounded_difference: of an fp16 engine on a CPU, which computes it in fp32: on how many images
            it was run with every operator rounded to fp16, and the largest difference then.
        largest_fp16: magnitude of any fp16 tensor on these images; fp16 ends at 65,504.
        residual: `fp32` where the engine keeps its residual stream in fp32.
    """

    images: int
    max_abs_difference: float
    top1_agreement: float
    tolerance: float
    min_agreement: float
    cosine: float | None = None
    min_cosine: float | None = None
    top1: float | None = None
    reference_top1: float | None = None
    most_lost: float | None = None
    level: float | None = None
    newly_wrong: int | None = None
    newly_right: int | None = None
    rounded_images: int | None = None
    rounded_difference: float | None = None
    largest_fp16: float | None = None
    residual: str | None = None

    def __post_init__(self) -> None:
        # not the types of `klas_zoo.reading`: they cost a pick milliseconds
        for most, names in _RANGES:
            for name in names:
                value = getattr(self, name)
                if value is not None and (value < 0 or value > most):
                    raise ValueError(f"{name} is {value}, not 0..{most:g}")
        if self.images < 1:
            raise ValueError("it saw no images")

    @property
    def passed(self) -> bool:
        return not _missed(self)

    @property
    def lost(self) -> float | None:
        """Points of top-1 that the engine loses against torch; None where labels were not known."""
        if self.top1 is None or self.reference_top1 is None:
            return None
        return self.reference_top1 - self.top1

    @property
    def most_agreement(self) -> float:
        """Upper confidence bound of the true share of equal top classes, 0..1; without a level, the share."""
        if self.level is None:
            return self.top1_agreement
        return upper_share(round(self.top1_agreement * self.images), self.images, self.level)

    @property
    def least_lost(self) -> float | None:
        """Lower confidence bound of the true loss of top-1, points; without a level, the loss itself."""
        if self.level is None or self.newly_wrong is None or self.newly_right is None:
            return self.lost
        return 100 * lower_paired_difference(self.newly_wrong, self.newly_right, self.images, self.level)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Verification:
        """From what `vars` gave; fields of another version are left out."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def explain(verification: Verification) -> str:
    """One sentence: which limits were missed and by how much, or that none was."""
    images = f"on {verification.images} images"
    missed = _missed(verification)
    if missed:
        return f"The engine does not compute what torch computes: {images} {', and '.join(missed)}."
    largest = verification.max_abs_difference
    return f"The engine computes what torch computes: {images} logits differ by at most {largest:.2g}."


def _missed(one: Verification) -> list[str]:
    """Limits that were missed. Comparisons are written so that a NaN misses them."""
    missed = []
    if not math.isfinite(one.max_abs_difference):
        missed.append("some logits are not finite")
    elif not one.max_abs_difference <= one.tolerance:
        largest = f"logits differ by up to {one.max_abs_difference:.2g}"
        times = f"{one.max_abs_difference / one.tolerance:.1f} times the" if one.tolerance else "more than the"
        missed.append(f"{largest}, {times} {one.tolerance:.3g} that is allowed")
    if one.min_agreement and not one.most_agreement >= one.min_agreement:
        found, required = 100 * one.top1_agreement, 100 * one.min_agreement
        missed.append(
            f"the top class is the same for {found:.2f} % of them{_at_most(one)}, {required:.2f} % are required"
        )
    if one.min_cosine is not None and one.cosine is not None and not one.cosine >= one.min_cosine:
        missed.append(f"the smallest cosine is {one.cosine:.4g}, {one.min_cosine:g} is required")
    if one.most_lost is not None and one.least_lost is not None and not one.least_lost <= one.most_lost:
        missed.append(f"{one.lost:.2f} points of top-1 are lost{_at_least(one)}, at most {one.most_lost:g} may be")
    return missed


def _at_most(one: Verification) -> str:
    if one.level is None:
        return ""
    return f" and at most {100 * one.most_agreement:.2f} % of all ({100 * one.level:g} % confidence)"


def _at_least(one: Verification) -> str:
    if one.level is None or one.least_lost is None or one.newly_wrong is None:
        return ""
    return f" and at least {one.least_lost:.2f} on all images ({100 * one.level:g} % confidence)"
