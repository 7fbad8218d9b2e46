"""Selectors: ways to choose among the same candidates, behind one interface.

A selector says what has to be measured and turns candidates into marked candidates; it runs no
network. Most of them only score: their stitches come from `keep_best`, the bucket rule of KLAS
§3.4, so that they differ in nothing but the score.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from klas_zoo.chains import Chain
from klas_zoo.errors import SelectionError
from klas_zoo.routes import Seam
from klas_zoo.selection.candidates import Candidate, CostFunction, Pair, SelectionSettings, candidates_of
from klas_zoo.selection.measurements import Measurements, Need

# Θ between neighbouring blocks below this, in nats, is noise of the estimate, not capacity
LEAST_CAPACITY = 1e-4

Terms = Mapping[str, float]
Score = Callable[[Candidate, Measurements], tuple[float, Terms]]


@dataclass(frozen=True, kw_only=True)
class SelectionProblem:
    """What a selector chooses from: `pairs` of the `chains`, at a `cost`."""

    chains: dict[str, Chain]
    pairs: tuple[Pair, ...]
    cost: CostFunction
    settings: SelectionSettings

    def candidates(self, pair: Pair) -> list[Candidate]:
        return candidates_of(self.chains, pair, self.cost, self.settings.buckets_each, self.settings.direction)


@dataclass(frozen=True, kw_only=True)
class Selector:
    """One way to choose.

    Attributes:
        formula: the score in one line, lower is better; empty where a rule needs none.
        needs: fields of Measurements; besides them, those that `pairs` takes.
        choose: candidates of all pairs, marked with score and reason. Pure.
        pairs: which anchors are stitched unless the user says so: `nearest` by their outputs' Θ (needs
            `outputs`), `neighbours` in cost, or `every` pair that has a seam.
        cost: what buckets are cut over.
    """

    name: str
    description: str
    choose: Callable[[SelectionProblem, Measurements], list[Candidate]]
    formula: str = ""
    needs: frozenset[Need] = frozenset()
    pairs: Literal["nearest", "neighbours", "every"] = "nearest"
    cost: Literal["macs", "latency"] = "macs"

    def asks_for(self, settings: SelectionSettings) -> frozenset[Need]:
        """Everything that has to be measured, that which chooses pairs included."""
        to_pair: set[Need] = {"outputs"} if self.pairs == "nearest" and settings.pairs is None else set()
        to_price: set[Need] = {"latency_ms"} if self.cost == "latency" else set()
        return self.needs | to_pair | to_price


def by_score(
    name: str, description: str, formula: str, needs: set[Need], score: Score, *, latency: bool = False
) -> Selector:
    """A selector that keeps the lowest scores of each bucket."""

    def choose(problem: SelectionProblem, measured: Measurements) -> list[Candidate]:
        chosen: list[Candidate] = []
        for pair in problem.pairs:
            scored = [_scored(one, *score(one, measured)) for one in problem.candidates(pair)]
            chosen += keep_best(scored, problem.settings)
        return chosen

    return Selector(
        name=name, description=description, formula=formula, needs=frozenset(needs), choose=choose,
        cost="latency" if latency else "macs",
    )  # fmt: skip


def _scored(candidate: Candidate, score: float, terms: Terms) -> Candidate:
    if not np.isfinite(score):
        raise SelectionError(f"The score of {candidate.route} is not finite: {dict(terms)}.")
    return replace(candidate, score=score, terms=terms)


def keep_best(candidates: Sequence[Candidate], settings: SelectionSettings) -> list[Candidate]:
    """Marks what each bucket of one pair and direction keeps: within τ of its lowest score, or the best so many.

    The margin is τ times the size of the lowest score, so that scores may be negative.
    """
    buckets: dict[tuple[str, int], list[Candidate]] = {}
    for one in candidates:
        buckets.setdefault((one.source, one.bucket), []).append(one)
    reasons: dict[Seam, str] = {}
    for inside in buckets.values():
        ranked = sorted(inside, key=_score)
        best = _score(ranked[0])
        if settings.most is not None:
            kept = ranked[: settings.most]
            reasons |= {c.seam: "best" if c is ranked[0] else "kept" for c in kept}
        else:
            within = best + settings.tolerance * abs(best)
            kept = [c for c in ranked if _score(c) <= within]
            reasons |= {c.seam: "best" if _score(c) == best else "tied" for c in kept}
    marked = [replace(c, reason=reasons.get(c.seam, "")) for c in candidates]
    return marked if settings.most is not None else cover_targets(marked)


def cover_targets(candidates: list[Candidate]) -> list[Candidate]:
    """Every target block that can be entered gets at least one stitch: its candidate of lowest score."""
    entered = {(c.target, c.j) for c in candidates if c.reason}
    result = list(candidates)
    for block in {(c.target, c.j) for c in candidates} - entered:
        best = min((c for c in candidates if (c.target, c.j) == block), key=_score)
        result[candidates.index(best)] = replace(best, reason="covers")
    return result


def _score(candidate: Candidate) -> float:
    assert candidate.score is not None
    return candidate.score


def gamma(candidate: Candidate, measured: Measurements) -> tuple[float, dict[str, float]]:
    """Γ of one stitch (KLAS Eq. 2), with a guard against a target block that changes nothing."""
    similar = measured.get("probes")
    mismatch = similar.theta(candidate.source, candidate.i, candidate.target, candidate.j)
    capacity = similar.theta(candidate.target, candidate.j, candidate.target, candidate.j + 1)
    score = max(mismatch, 0.0) / max(capacity, LEAST_CAPACITY)
    return score, {"mismatch": mismatch, "capacity": capacity}


def value_of(need: Need, candidate: Candidate, measured: Measurements) -> float:
    """A seam's value.

    Raises:
        SelectionError: it was not measured for this seam.
    """
    values = measured.get(need)
    if candidate.seam not in values:
        raise SelectionError(f"The measurement '{need}' has no value for {candidate.route}: measure this pair first.")
    return float(values[candidate.seam])
