"""Bounds against published values, against exact distributions, and against simulated samples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from klas_zoo.confidence import (
    at_least,
    lower_paired_difference,
    lower_share,
    trials_to_refuse,
    trials_to_see,
    upper_share,
)

TWO_SIDED = 0.975  # of each bound of a 95 % interval


@pytest.mark.parametrize(
    ("successes", "trials", "lower", "upper"),
    [
        # Newcombe (1998), Statistics in Medicine 17, 857-872, Table I, method 5 (Clopper and Pearson)
        (81, 263, 0.2527, 0.3676),
        (15, 148, 0.0578, 0.1617),
        (0, 20, 0.0, 0.1684),
        (1, 29, 0.0009, 0.1776),
        # Fagerland, Lydersen and Laake, Statistical Analysis of Contingency Tables (2017), in their package
        (13, 16, 0.5435, 0.9595),
        (10, 10, 0.6915, 1.0),
        (0, 10, 0.0, 0.3085),
    ],
)
def test_bounds_of_a_share_are_those_published(successes: int, trials: int, lower: float, upper: float) -> None:
    assert lower_share(successes, trials, TWO_SIDED) == pytest.approx(lower, abs=5e-5)
    assert upper_share(successes, trials, TWO_SIDED) == pytest.approx(upper, abs=5e-5)


@pytest.mark.parametrize("trials", [1, 7, 299, 50_000])
def test_where_all_succeed_the_lower_bound_has_a_closed_form(trials: int) -> None:
    assert lower_share(trials, trials, 0.99) == pytest.approx(0.01 ** (1 / trials), rel=1e-12)
    assert upper_share(0, trials, 0.99) == pytest.approx(1 - 0.01 ** (1 / trials), rel=1e-9)
    assert upper_share(trials, trials, 0.99) == 1.0


@pytest.mark.parametrize("share", [0.001, 0.3, 0.5, 0.97])
def test_binomial_tails_are_those_of_the_sum_of_all_terms(share: float) -> None:
    trials = 40
    terms = [math.comb(trials, k) * share**k * (1 - share) ** (trials - k) for k in range(trials + 1)]
    for successes in range(trials + 1):
        assert at_least(successes, trials, share) == pytest.approx(math.fsum(terms[successes:]), rel=1e-9, abs=1e-14)


def test_a_bound_of_many_trials_is_exact_on_both_sides_of_the_mean() -> None:
    for successes in (3, 700, 49_000, 49_999):
        bound = lower_share(successes, 50_000, 0.99)
        assert bound < successes / 50_000
        assert at_least(successes, 50_000, bound) == pytest.approx(0.01, rel=1e-6)


def test_the_upper_bound_lies_below_the_true_share_in_at_most_one_of_a_hundred_samples() -> None:
    generator = np.random.default_rng(0)
    for trials, share in ((100, 0.95), (656, 0.99), (1000, 0.999)):
        drawn = np.bincount(generator.binomial(trials, share, 100_000), minlength=trials + 1)
        wrong = sum(int(n) for k, n in enumerate(drawn) if n and upper_share(k, trials, 0.99) < share)
        assert wrong <= 1_100  # 1,000 and three standard deviations


@pytest.mark.parametrize(
    ("only_first", "only_second", "trials", "lower", "upper"),
    [(6, 16, 161, -0.1240, -0.0054)],  # Cavo et al. (2012), as Fagerland, Lydersen and Laake (2017) give it
)
def test_bounds_of_a_paired_difference_are_those_published(
    only_first: int, only_second: int, trials: int, lower: float, upper: float
) -> None:
    assert lower_paired_difference(only_first, only_second, trials, TWO_SIDED) == pytest.approx(lower, abs=5e-5)
    assert -lower_paired_difference(only_second, only_first, trials, TWO_SIDED) == pytest.approx(upper, abs=5e-5)


def test_the_bound_of_a_paired_difference_solves_the_score_equation_found_by_search() -> None:
    b, c, n = 9, 4, 300
    bound = lower_paired_difference(b, c, n, TWO_SIDED)
    # the likelihood at this difference, maximised over the other parameter by brute force
    q = np.linspace(1e-9, (1 - bound) / 2 - 1e-9, 2_000_001)
    likelihood = b * np.log(np.maximum(q + bound, 1e-300)) + c * np.log(q) + (n - b - c) * np.log1p(-2 * q - bound)
    best = q[likelihood.argmax()]
    score = (b - c - n * bound) / math.sqrt(n * (2 * best + bound * (1 - bound)))
    assert score == pytest.approx(1.959964, abs=1e-3)


def test_a_loss_at_its_limit_is_called_larger_in_about_one_of_a_hundred_samples() -> None:
    generator = np.random.default_rng(0)
    for trials, wrong, right in ((656, 0.015, 0.005), (3334, 0.004, 0.002)):
        drawn = generator.multinomial(trials, [wrong, right, 1 - wrong - right], 10_000)[:, :2]
        pairs, counts = np.unique(drawn, axis=0, return_counts=True)
        larger = [lower_paired_difference(int(b), int(c), trials, 0.99) > wrong - right for b, c in pairs]
        assert 0.003 < counts[larger].sum() / 10_000 < 0.018


def test_no_discordant_pairs_are_compatible_with_no_difference() -> None:
    assert lower_paired_difference(0, 0, 1000, 0.99) < 0 < lower_paired_difference(20, 0, 1000, 0.99)
    assert lower_paired_difference(0, 1000, 1000, 0.99) == -1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: lower_share(5, 4, 0.9),
        lambda: lower_share(-1, 4, 0.9),
        lambda: upper_share(0, 0, 0.9),
        lambda: lower_share(1, 4, 1.0),
        lambda: lower_paired_difference(3, 2, 4, 0.9),
        lambda: lower_paired_difference(0, 0, 0, 0.9),
        lambda: trials_to_refuse(0.2, 0.1, 0.9, 0.9),
    ],
)
def test_counts_that_do_not_fit_together_are_errors(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"share|difference"):
        call()


@pytest.mark.parametrize(("limit", "share"), [(0.01, 0.03), (0.05, 0.15), (0.1, 0.3), (0.002, 0.006)])
def test_as_many_trials_as_are_asked_for_find_a_share_above_its_limit(limit: float, share: float) -> None:
    trials = trials_to_refuse(limit, share, 0.99, 0.95)
    drawn = np.random.default_rng(0).binomial(trials, share, 20_000)
    refused = {k: lower_share(int(k), trials, 0.99) > limit for k in np.unique(drawn)}
    power = np.mean([refused[k] for k in drawn])
    assert 0.90 < power < 0.98  # the number is that of a normal approximation


def test_something_of_a_share_is_seen_in_so_many_trials() -> None:
    assert trials_to_see(0.01, 0.95) == 299
    assert 0.99**299 <= 0.05 < 0.99**298
