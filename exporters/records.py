"""What was found when an engine was compared with its route. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Differences between an engine and the torch route it was exported from.

    Attributes:
        images: how many real images were compared.
        max_abs_difference: largest |engine − torch| over all logits.
        top1_agreement: share of the images, 0..1, with the same most likely class.
        tolerance: the largest `max_abs_difference` that was allowed, in units of the logits.
        min_agreement: the smallest `top1_agreement` that was allowed.
    """

    images: int
    max_abs_difference: float
    top1_agreement: float
    tolerance: float
    min_agreement: float

    @property
    def passed(self) -> bool:
        # written so that a NaN never passes
        return self.max_abs_difference <= self.tolerance and self.top1_agreement >= self.min_agreement
