"""How far an engine may be from the fp32 torch route: one table, and the images that its limits need.

Limits on logits hold for every image, and are checked however few there are. Limits on shares of
images (equal top classes, top-1 lost) are checked from `FEW` images on, by their confidence bounds:
an engine is refused when the images contradict the limit at `LEVEL`, not when an unlucky sample
misses it. Imports nothing heavy.

The limit of fp32 lies between rounding and the smallest mistake. Measured on 2,000 CIFAR-10 images
with trained anchors of deit-micro, whose logits have a standard deviation (spread) of 1.4, the largest
difference, as a share of the spread, was

    2e-6    onnxruntime against torch
    6e-6    torch with oneDNN against torch without
    9e-5    GELU's tanh approximation in one of eight blocks
    3e-4    one matrix rounded to fp16
    3e-2    all weights rounded to bf16

and 7e-6 at most in onnxruntime over 23 routes of DeiT Ti/S/B at random weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from klas_zoo.confidence import trials_to_refuse, trials_to_see
from klas_zoo.errors import UnknownName

LEVEL = 0.99  # of the bounds: of 100 engines exactly at a limit one is refused
FEW = 100  # below so many images one of them is more than a percentage point
POWER = 0.95  # with which `images_needed` finds a bad engine
_FACTOR = 3  # an engine is bad that misses a limit on shares so many times
_RARE = 0.01  # share of images on which a fault of logits may show and still be found


@dataclass(frozen=True, kw_only=True)
class VerificationLimits:
    """How far an engine may be from the fp32 torch route.

    Attributes:
        relative: largest difference of a logit, as a share of the spread (standard deviation) of
            torch's logits.
        min_agreement: share of images, 0..1, with the same top class; 0: not limited.
        min_cosine: of the logits of any image, -1..1.
        most_lost: points of top-1.
        tolerance: largest difference in units of the logits; the larger of this and `relative` holds.
            For engines that were verified before, on more images.
    """

    relative: float
    min_agreement: float = 0.0
    min_cosine: float | None = None
    most_lost: float | None = None
    tolerance: float = 0.0


LIMITS: Mapping[str, VerificationLimits] = {
    "fp32": VerificationLimits(relative=5e-5, min_agreement=0.999),
    "fp16": VerificationLimits(relative=2e-2, min_agreement=0.99, min_cosine=0.9999, most_lost=0.2),
    "bf16": VerificationLimits(relative=2e-1, min_agreement=0.95, min_cosine=0.99, most_lost=1.0),
    "int8": VerificationLimits(relative=1.0, min_agreement=0.9, min_cosine=0.95, most_lost=1.0),
}


def limits_for(precision: str, weights: str) -> VerificationLimits:
    """How far an engine of a precision may be from the fp32 torch route.

    Args:
        weights: `random` for untrained networks: the logits of their classes lie within rounding of
            one another, so that only fp32 has to agree on the top class.

    Raises:
        UnknownName: there is no such precision.
    """
    if precision not in LIMITS:
        raise UnknownName("precision", precision, LIMITS)
    limits = LIMITS[precision]
    if weights == "random" and precision != "fp32":
        return replace(limits, min_agreement=0.0, most_lost=None)
    return limits


def images_needed(limits: VerificationLimits) -> int:
    """How many images find a bad engine with a probability of `POWER`, whichever limit it misses.

    Bad is an engine whose logits are wrong on one image in a hundred, or whose true share of changed
    top classes, or true loss of top-1, is three times what is allowed. The shares of fp32 ask for no
    more images: where no logit may differ by more than 0.00005 of the spread, only images whose two best
    logits lie within twice that can change their class, and the logits show any engine that does more.
    """
    needed = trials_to_see(_RARE, POWER)
    if limits.relative > LIMITS["fp32"].relative:
        for allowed in (1 - limits.min_agreement, (limits.most_lost or 0) / 100):
            if 0 < allowed < 1:
                needed = max(needed, trials_to_refuse(allowed, _FACTOR * allowed, LEVEL, POWER))
    return needed
