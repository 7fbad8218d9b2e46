"""What became of images in a cascade. Imports nothing heavy: picks read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of images in a cascade.

    Attributes:
        shares: of the images that each stage answers, 0..1; their sum is 1.
        escalated: of all images, those that go on behind each stage but the last, with its confidence interval.
        top1: per cent, with its two-sided confidence interval by Clopper and Pearson (1934).

    Raises:
        ValueError: numbers that cannot be.
    """

    images: int
    shares: tuple[float, ...]
    escalated: tuple[float, ...]
    escalated_intervals: tuple[Interval, ...]
    top1: float
    top1_interval: Interval

    def __post_init__(self) -> None:
        if self.images < 1 or abs(sum(self.shares) - 1) > 1e-6:
            raise ValueError("shares of images sum up to 1")
        if not len(self.escalated) == len(self.escalated_intervals) == len(self.shares) - 1:
            raise ValueError("there is one share that goes on for each stage but the last")
        known = (*self.shares, *self.escalated, *(end for one in self.escalated_intervals for end in one))
        if not all(0 <= one <= 1 for one in known):
            raise ValueError("a share is a number from 0 to 1")
        if not 0 <= self.top1_interval[0] <= self.top1_interval[1] <= 100 or not 0 <= self.top1 <= 100:
            raise ValueError("top-1 is per cent, 0 to 100")

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Outcome:
        """From what `asdict` gave, also by way of JSON."""
        pairs = {"top1_interval": tuple(table["top1_interval"])}
        pairs["escalated_intervals"] = tuple(tuple(one) for one in table["escalated_intervals"])
        shares = {name: tuple(table[name]) for name in ("shares", "escalated")}
        return cls(**{**table, **pairs, **shares})


@dataclass(frozen=True, kw_only=True)
class CascadeFacts:
    """What is known of a cascade besides its stages.

    Attributes:
        heldout: of the images that thresholds were fitted on: shares to expect in use, which its latency is mixed by.
        test: of images that decided nothing.
    """

    heldout: Outcome
    test: Outcome

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> CascadeFacts:
        return cls(heldout=Outcome.from_json(table["heldout"]), test=Outcome.from_json(table["test"]))
