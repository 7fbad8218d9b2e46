"""The best within a budget: one rule for picks, elastic sessions, packages and controllers. Imports nothing heavy.

The most accurate wins; of equals the faster, then the smaller, then the first by name, so that the choice is the
same each time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from klas_zoo.frontier import frontier
from klas_zoo.units import format_latency, format_size

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Upper and lower bounds, each included; None means unbounded.

    Attributes:
        latency_ms: the longest latency, milliseconds per batch.
        also: further bounds of other statistics of the latency by their names, such as `mean`, milliseconds.
        min_accuracy: the lowest top-1, per cent.
        max_size_bytes: the largest deployed size.
    """

    latency_ms: float
    min_accuracy: float | None = None
    max_size_bytes: int | None = None
    also: Mapping[str, float] = field(default_factory=dict)

    def misses(
        self, latency_ms: float, accuracy: float, size_bytes: int = 0, also: Callable[[str], float] = lambda name: 0.0
    ) -> dict[str, float]:
        """By how much, relative to the bound, each missed bound is missed; empty where all hold.

        A latency that is unknown, NaN or infinite, misses its bound.

        Args:
            also: milliseconds of the other statistics by their names.
        """
        bounds = [("latency", latency_ms - self.latency_ms, self.latency_ms)]
        bounds += [(name, also(name) - bound, bound) for name, bound in self.also.items()]
        if self.min_accuracy is not None:
            bounds.append(("accuracy", self.min_accuracy - accuracy, self.min_accuracy))
        if self.max_size_bytes is not None:
            bounds.append(("size", float(size_bytes - self.max_size_bytes), self.max_size_bytes))
        return {
            name: math.inf if math.isnan(miss) else miss / bound if bound > 0 else math.inf
            for name, miss, bound in bounds
            if not miss <= 0
        }

    def describe(self, percentile: str, batch: int) -> str:
        """`within 5.00 ms (p50, batch 1), at least 80 % accurate`."""
        text = f"within {format_latency(self.latency_ms)} ({percentile}, batch {batch})"
        text += "".join(f", within {format_latency(bound)} ({name})" for name, bound in self.also.items())
        if self.min_accuracy is not None:
            text += f", at least {self.min_accuracy:g} % accurate"
        if self.max_size_bytes is not None:
            text += f", at most {format_size(self.max_size_bytes)}"
        return text


@dataclass(frozen=True, kw_only=True)
class Candidates(Generic[Item]):
    """What is chosen from, and how its items are read.

    Attributes:
        latency_ms: of an item; NaN or infinite where unknown.
        accuracy: top-1, or what stands for it.
        size_bytes, name: break ties.
        also: another statistic of an item's latency by its name, milliseconds.
    """

    items: Iterable[Item]
    latency_ms: Callable[[Item], float]
    accuracy: Callable[[Item], float]
    size_bytes: Callable[[Item], int] = lambda item: 0
    name: Callable[[Item], str] = str
    also: Callable[[Item, str], float] = lambda item, name: 0.0

    def within(self, budget: Budget) -> list[Item]:
        """The items that keep every bound."""
        return [item for item in self.items if not self.misses(item, budget)]

    def misses(self, item: Item, budget: Budget) -> dict[str, float]:
        """`Budget.misses` of an item."""
        return budget.misses(
            self.latency_ms(item), self.accuracy(item), self.size_bytes(item), lambda name: self.also(item, name)
        )

    def best(self, budget: Budget) -> Item | None:
        """The best item within a budget; None where no item keeps every bound."""
        return min(self.within(budget), key=self.preference, default=None)

    def nearest(self, budget: Budget) -> Item | None:
        """The item with the smallest sum of relative misses; None where there is no item."""
        return min(
            self.items, key=lambda one: (sum(self.misses(one, budget).values()), self.preference(one)), default=None
        )

    def frontier(self) -> list[Item]:
        """The items that no faster one is as accurate as, from fast to slow; those of unknown latency are left out."""
        known = (item for item in self.items if math.isfinite(self.latency_ms(item)))
        return frontier(sorted(known, key=self.preference), self.latency_ms, self.accuracy)

    def preference(self, item: Item) -> tuple[float, float, int, str]:
        """Sorts the better item first."""
        return -self.accuracy(item), self.latency_ms(item), self.size_bytes(item), self.name(item)
