"""What was found when an engine was compared with its route. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Differences between an engine and the fp32 torch route it was exported from.

    What is None was not measured, or is not limited.

    Attributes:
        images: how many real images were compared.
        max_abs_difference: largest |engine − torch| over all logits.
        top1_agreement: share of the images, 0..1, with the same most likely class.
        tolerance: the largest `max_abs_difference` that was allowed, in units of the logits.
        min_agreement: the smallest `top1_agreement` that was allowed.
        cosine: the smallest cosine similarity, -1..1, of an image's logits.
        min_cosine: the smallest `cosine` that was allowed.
        top1, reference_top1: accuracy of the engine and of torch on these images, per cent.
        most_lost: how far, in points, `top1` may lie below `reference_top1`.
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

    @property
    def passed(self) -> bool:
        # written so that a NaN never passes
        within = self.max_abs_difference <= self.tolerance and self.top1_agreement >= self.min_agreement
        if self.min_cosine is not None and self.cosine is not None:
            within = within and self.cosine >= self.min_cosine
        if self.most_lost is not None and self.lost is not None:
            within = within and self.lost <= self.most_lost
        return within

    @property
    def lost(self) -> float | None:
        """Points of top-1 that the engine loses against torch; None where labels were not known."""
        if self.top1 is None or self.reference_top1 is None:
            return None
        return self.reference_top1 - self.top1

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Verification:
        """From what `vars` gave; fields of another version are left out."""
        return cls(**{field.name: values[field.name] for field in fields(cls) if field.name in values})


def explain(verification: Verification) -> str:
    """One sentence: which limit was missed by how much, or that none was."""
    largest, tolerance = verification.max_abs_difference, verification.tolerance
    images = f"on {verification.images} images"
    if verification.passed:
        return f"The engine computes what torch computes: {images} logits differ by at most {largest:.2g}."
    missed = []
    if not math.isfinite(largest):
        missed.append("some logits are not finite")
    elif largest > tolerance:
        times = f"{largest / tolerance:.1f} times the {tolerance:g} that is allowed"
        missed.append(f"logits differ by up to {largest:.2g}, {times}")
    if verification.top1_agreement < verification.min_agreement:
        found, required = 100 * verification.top1_agreement, 100 * verification.min_agreement
        missed.append(f"the top class is the same for {found:.2f} % of them, {required:.2f} % are required")
    if verification.min_cosine is not None and not (verification.cosine or 0.0) >= verification.min_cosine:
        missed.append(f"the smallest cosine is {verification.cosine:.4g}, {verification.min_cosine:g} is required")
    if verification.most_lost is not None and (verification.lost or 0.0) > verification.most_lost:
        missed.append(f"{verification.lost:.2f} points of top-1 are lost, at most {verification.most_lost:g} may be")
    return f"The engine does not compute what torch computes: {images} {', and '.join(missed)}."
