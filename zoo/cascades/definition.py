"""A cascade: routes one after another, each answering the images it is sure of and passing on the others.

    small ?p<0.83 → small.1-4+base.5-8        continues behind block 4 of small, whose features are there already
    small ?p<0.83 | base                      starts anew with the images

A stage that continues executes only what lies behind the features it shares with the stage before, so that in the
worst case an image costs small and base's second half, not small and base. How sure a stage is of an image is a
number from 0 to 1, see `Measure`; it is computed from logits divided by the stage's temperature. Imports nothing heavy.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, get_args

from klas_zoo.errors import UsageError
from klas_zoo.routes import Route

Measure = Literal["probability", "margin", "entropy"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
"""Of confidence: the largest probability; the difference of the two largest; 1 - entropy / ln(classes)."""
_LETTERS: Mapping[Measure, str] = {"probability": "p", "margin": "m", "entropy": "e"}
CONTINUES, ANEW = "→", "|"
_CONDITION = re.compile(r"\?(?P<measure>[pme])(?:\(T=(?P<temperature>[^)]*)\))?<(?P<threshold>\S+)")
_FORM = "write it as 'small ?p<0.83 -> small.1-4+base.5-8', or with | where the second stage starts anew"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One route of a cascade and when it answers.

    Attributes:
        route: from images to logits.
        threshold: confidence, 0..1, from which on it answers; below, the next stage does. None: it always answers.
        temperature: that its logits are divided by before confidence is computed; above 0.
        shared: how many blocks it has in common with the stage before, whose features it continues from; 0: it starts
            with the images.

    Raises:
        ValueError: a threshold, a temperature or a number of blocks that cannot be.
    """

    route: Route
    threshold: float | None = None
    temperature: float = 1.0
    shared: int = 0

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"a threshold is a confidence from 0 to 1, not {self.threshold:g}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"a temperature is above 0, not {self.temperature:g}")
        if not 0 <= self.shared < blocks_of(self.route):
            raise ValueError(
                f"{self.route} has {blocks_of(self.route)} blocks and cannot continue behind its block {self.shared}"
            )


@dataclass(frozen=True, kw_only=True)
class Cascade:
    """Stages in the order of their execution, at least two.

    `str(cascade)` is its name; `Cascade.parse` reads it.

    Raises:
        ValueError: fewer than two stages, a stage but the last without a threshold, a last one with one, or a stage
            that continues from features the stage before does not have.
    """

    stages: tuple[Stage, ...]
    measure: Measure = "probability"

    def __post_init__(self) -> None:
        if len(self.stages) < 2:
            raise ValueError("a cascade has at least two stages")
        if self.measure not in MEASURES:
            raise ValueError(f"confidence is measured by {', '.join(MEASURES)}, not {self.measure!r}")
        if self.stages[0].shared:
            raise ValueError(f"the first stage, {self.stages[0].route}, has no stage before it to continue from")
        for stage in self.stages[:-1]:
            if stage.threshold is None:
                raise ValueError(f"the stage {stage.route} is not the last one and needs a threshold")
        if self.stages[-1].threshold is not None:
            raise ValueError(f"the last stage, {self.stages[-1].route}, answers always and takes no threshold")
        for before, after in pairwise(self.stages):
            if before.route == after.route:
                raise ValueError(f"{after.route} cannot follow itself")
            common = common_blocks(before.route, after.route)
            if after.shared > common:
                raise ValueError(
                    f"{after.route} cannot continue behind block {after.shared} of {before.route}: "
                    f"they have {common or 'no'} blocks in common"
                )
            if 0 < after.shared < before.shared:
                raise ValueError(
                    f"{after.route} cannot continue behind block {after.shared}: {before.route} itself starts behind "
                    f"block {before.shared}"
                )

    @property
    def routes(self) -> tuple[Route, ...]:
        return tuple(stage.route for stage in self.stages)

    @property
    def thresholds(self) -> tuple[float, ...]:
        """Of all stages but the last."""
        return tuple(stage.threshold for stage in self.stages if stage.threshold is not None)

    @property
    def is_anchor(self) -> bool:
        """A cascade never is one; routes have the same question."""
        return False

    def __str__(self) -> str:
        parts = [str(self.stages[0].route)]
        for before, after in pairwise(self.stages):
            temperature = "" if before.temperature == 1 else f"(T={before.temperature:g})"
            parts.append(f"?{_LETTERS[self.measure]}{temperature}<{before.threshold:g}")
            parts += [CONTINUES if after.shared else ANEW, str(after.route)]
        return " ".join(parts)

    @classmethod
    def parse(
        cls, text: str, route: Callable[[str], Route], shared: Callable[[Route, Route], int] | None = None
    ) -> Cascade:
        """A cascade from its name; `->` stands for the arrow.

        Args:
            route: the route of a name.
            shared: how many blocks a stage may share with the one before; `common_blocks` where it is None.

        Raises:
            UsageError: it is no name of a cascade, or of one that cannot be; says why.
            UnknownName: by `route`.
        """
        words = text.replace("->", CONTINUES).split()
        stages: list[Stage] = []
        measures: set[str] = set()
        continues = False
        if len(words) % 3 != 1:
            raise UsageError(f"'{text}' is no cascade: {_FORM}.")
        for start in range(0, len(words), 3):
            found = route(words[start])
            count = (shared or common_blocks)(stages[-1].route, found) if continues else 0
            if continues and not count:
                raise UsageError(
                    f"'{text}' cannot be: {found} shares no blocks with {stages[-1].route}; write | for a stage that "
                    "starts anew."
                )
            threshold, temperature = None, 1.0
            if start + 1 < len(words):
                measure, threshold, temperature = _condition(words[start + 1], text)
                measures.add(measure)
                if words[start + 2] not in (CONTINUES, ANEW):
                    raise UsageError(f"'{text}' is no cascade: {_FORM}.")
                continues = words[start + 2] == CONTINUES
            with _as_usage_error(text):
                stages.append(Stage(route=found, threshold=threshold, temperature=temperature, shared=count))
        if len(measures) > 1:
            raise UsageError(f"'{text}' measures confidence in two ways: use one letter of p, m and e.")
        with _as_usage_error(text):
            return cls(stages=tuple(stages), measure=_measure(measures))

    def to_json(self) -> dict[str, Any]:
        """`{"measure": "probability", "stages": [{"route": [["small", 1, 8]], "threshold": 0.83, …}, …]}`."""
        return {
            "measure": self.measure,
            "stages": [
                {"route": stage.route.to_json(), **{k: v for k, v in vars(stage).items() if k != "route"}}
                for stage in self.stages
            ],
        }

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> Cascade:
        """
        Raises:
            KeyError, TypeError, ValueError: it is not what `to_json` gives.
        """
        return cls(
            measure=table["measure"],
            stages=tuple(
                Stage(
                    route=Route.from_json(one["route"]),
                    threshold=None if one["threshold"] is None else float(one["threshold"]),
                    temperature=float(one["temperature"]),
                    shared=int(one["shared"]),
                )
                for one in table["stages"]
            ),
        )


@dataclass(frozen=True, kw_only=True)
class CascadeCost:
    """What an image costs, by the stage that answers it, in any unit: multiply-adds or milliseconds.

    Attributes:
        paths: up to and including each stage, first to last; they increase.
    """

    paths: tuple[float, ...]

    @property
    def best(self) -> float:
        """The first stage answers."""
        return self.paths[0]

    @property
    def worst(self) -> float:
        """Every stage is executed."""
        return self.paths[-1]

    def mean(self, shares: Sequence[float]) -> float:
        """The mean over images.

        Args:
            shares: of the images that each stage answers; they sum up to 1.

        Raises:
            ValueError: they do not, or there are more or fewer than stages.
        """
        if len(shares) != len(self.paths) or not all(0 <= s <= 1 for s in shares) or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"{len(self.paths)} shares that sum up to 1 are needed, not {tuple(shares)}")
        return sum(share * path for share, path in zip(shares, self.paths, strict=True))


def blocks_of(route: Route) -> int:
    """How many blocks a route executes."""
    return sum(segment.last - segment.first + 1 for segment in route.segments)


def common_blocks(first: Route, second: Route) -> int:
    """How many blocks two routes begin with alike, stitching layers between them included."""
    count = 0
    for one, other in zip(_run(first), _run(second), strict=False):
        if one != other:
            break
        count += 1
    return count


def _run(route: Route) -> list[tuple[str, int, int]]:
    """Every block in order: its anchor, its number, and the segment it is in, which a seam precedes."""
    return [
        (segment.anchor, block, number)
        for number, segment in enumerate(route.segments)
        for block in range(segment.first, segment.last + 1)
    ]


def _condition(word: str, text: str) -> tuple[str, float, float]:
    found = _CONDITION.fullmatch(word)
    try:
        if found is None:
            raise ValueError(word)
        return found["measure"], float(found["threshold"]), float(found["temperature"] or 1)
    except ValueError as error:
        raise UsageError(f"'{text}' is no cascade: '{word}' is no condition; {_FORM}.") from error


def _measure(letters: set[str]) -> Measure:
    return next((measure for measure, letter in _LETTERS.items() if {letter} == letters), "probability")


class _as_usage_error:  # noqa: N801  a context manager
    """Turns the ValueError of a record into a UsageError about the cascade."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError):
            raise UsageError(f"'{self._text}' cannot be: {error}.") from error
