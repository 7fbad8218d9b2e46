"""The selectors there are, by name: the paper's, its rivals in the paper, and controls.

Scores of one candidate (i, j) of source f and target g; Θ and Γ are those of KLAS §3.2 and §3.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from klas_zoo.errors import UnknownName
from klas_zoo.selection.candidates import Candidate
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.scoring import SelectionProblem, Selector, Terms, by_score, gamma, value_of
from klas_zoo.selection.snnet import choose_by_windows


def _mismatch(candidate: Candidate, measured: Measurements) -> tuple[float, Terms]:
    _, terms = gamma(candidate, measured)
    return max(terms["mismatch"], 0.0), terms


def _cross_entropy(candidate: Candidate, measured: Measurements) -> tuple[float, Terms]:
    found = measured.get("probes").cross_entropy(candidate.source, candidate.i, candidate.target, candidate.j)
    return found, {"cross_entropy": found}


def _cka(candidate: Candidate, measured: Measurements) -> tuple[float, Terms]:
    alike = value_of("cka", candidate, measured)
    return 1 - alike, {"cka": alike}


def _residual(candidate: Candidate, measured: Measurements) -> tuple[float, Terms]:
    left = value_of("residual", candidate, measured)
    return left, {"residual": left}


def _direct(candidate: Candidate, measured: Measurements) -> tuple[float, Terms]:
    top1 = value_of("accuracy", candidate, measured)
    return -top1, {"top1_direct": top1}


def _output_kl(candidate: Candidate, measured: Measurements) -> tuple[float, Terms]:
    found = value_of("output_kl", candidate, measured)
    return found, {"output_kl": found}


def _draw(problem: SelectionProblem, measured: Measurements) -> list[Candidate]:
    generator = np.random.default_rng(problem.settings.seed)
    chosen: list[Candidate] = []
    for pair in problem.pairs:
        candidates = problem.candidates(pair)
        kept: set[int] = set()
        places = [(pair.index(c.source), c.bucket) for c in candidates]  # stitches up before those down
        for place in sorted(set(places)):
            inside = [index for index, one in enumerate(places) if one == place]
            count = min(problem.settings.most or 1, len(inside))
            kept.update(generator.choice(inside, count, replace=False).tolist())
        chosen += [replace(c, reason="drawn" if k in kept else "") for k, c in enumerate(candidates)]
    return chosen


def _all(problem: SelectionProblem, measured: Measurements) -> list[Candidate]:
    return [replace(c, reason="all") for pair in problem.pairs for c in problem.candidates(pair)]


def _windows(problem: SelectionProblem, measured: Measurements) -> list[Candidate]:
    return choose_by_windows(
        problem.chains, problem.pairs, problem.cost, problem.settings.buckets_each, problem.settings.direction
    )


_ALL = (
    by_score(
        "klas", "the paper's: probes' divergence over the target's capacity to absorb it",
        "Γ = Θ(P_i, P_j) / Θ(P_j, P_{j+1})", {"probes"}, gamma,
    ),
    by_score(
        "klas-latency", "klas with buckets over latency in place of multiply-adds",
        "Γ = Θ(P_i, P_j) / Θ(P_j, P_{j+1})", {"probes"}, gamma, latency=True,
    ),
    by_score("kl-only", "the numerator of Γ alone", "Θ(P_i, P_j)", {"probes"}, _mismatch),
    by_score("ce", "cross-entropy between probes", "H(P_i, P_j) = −Σ P_i log P_j", {"probes"}, _cross_entropy),
    by_score("cka", "linear centred kernel alignment of features", "1 − CKA(X_i, Y_j)", {"cka"}, _cka),
    by_score(
        "mse", "what the least-squares T leaves unexplained", "‖T x_i − y_j‖² / ‖y_j − ȳ_j‖²", {"residual"}, _residual
    ),
    by_score("direct", "accuracy right after the closed-form T; executes all", "−top-1", {"accuracy"}, _direct),
    Selector(
        name="snnet", description="SN-Net's sliding windows, paired or unpaired; needs no data",
        choose=_windows, pairs="neighbours",
    ),
    Selector(name="random", description="drawn uniformly, one per bucket", choose=_draw),
    Selector(name="all", description="every candidate of every pair; needs no data", choose=_all, pairs="every"),
    # our own: it executes every candidate, as direct matching does, but a distribution says more per image than a hit
    by_score(
        "output-kl", "divergence of the stitch's output from the target's right after the closed-form T",
        "KL(target ‖ stitch)", {"output_kl"}, _output_kl,
    ),
)  # fmt: skip


SELECTORS: Mapping[str, Selector] = {one.name: one for one in _ALL}
"""Every selector by its name, the published ones first."""


def find_selector(name: str) -> Selector:
    """A selector by its name.

    Raises:
        UnknownName: there is none of that name; the message names the nearest.
    """
    if name not in SELECTORS:
        raise UnknownName("selector", name, SELECTORS)
    return SELECTORS[name]
