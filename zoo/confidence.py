"""Confidence bounds of shares that were counted on n images. Imports nothing heavy.

All bounds are one-sided: a bound at level 0.99 is wrong in at most (exact ones) or in about (score
ones) 1 of 100 samples. The two bounds of a two-sided 95 % interval are those at level 0.975.

* A single share: Clopper and Pearson (1934), Biometrika 26, 404-413. Exact: it inverts the binomial
  distribution itself, so that its level holds for every n, also where no image failed.
* A difference of two shares of the same images: Tango (1998), Statistics in Medicine 17, 891-908.
  It inverts the score test of a paired difference, in which images that both classify alike drop out.
"""

from __future__ import annotations

import math

_HALVINGS = 60  # of [-1, 1]: beyond float64


def upper_share(successes: int, trials: int, level: float) -> float:
    """The largest share, 0..1, that `successes` of `trials` are compatible with.

    It is the p at which P(X ≤ successes) = 1 - level, X ~ Bin(trials, p); 1 where all succeeded.
    """
    return 1.0 - lower_share(trials - successes, trials, level)


def lower_share(successes: int, trials: int, level: float) -> float:
    """The smallest share, 0..1, that `successes` of `trials` are compatible with.

    It is the p at which P(X ≥ successes) = 1 - level, X ~ Bin(trials, p); 0 where none succeeded.

    Raises:
        ValueError: not 0 ≤ successes ≤ trials, no trials, or a level outside of (0, 1).
    """
    if not 0 <= successes <= trials or trials < 1 or not 0 < level < 1:
        raise ValueError(f"no share: {successes} of {trials} at level {level}")
    if successes == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if at_least(successes, trials, middle) < 1 - level:
            low = middle
        else:
            high = middle
    return low


def share_interval(successes: int, trials: int, level: float) -> tuple[float, float]:
    """The two-sided confidence interval of a share, 0..1; see `lower_share` for what is raised."""
    one_sided = (1 + level) / 2
    return lower_share(successes, trials, one_sided), upper_share(successes, trials, one_sided)


def at_least(successes: int, trials: int, share: float) -> float:
    """P(X ≥ successes) for X ~ Bin(trials, share)."""
    if successes <= 0:
        return 1.0
    if share <= 0.0:
        return 0.0
    if share >= 1.0:
        return 1.0
    # the tail without the mean of the distribution is short, and free of cancellation
    if successes > trials * share:
        return _sum(range(successes, trials + 1), trials, share)
    return 1.0 - _sum(range(successes - 1, -1, -1), trials, share)


def lower_paired_difference(only_first: int, only_second: int, trials: int, level: float) -> float:
    """The smallest difference of two shares, -1..1, that counts of pairs are compatible with.

    Args:
        only_first, only_second: trials in which the first succeeded and the second did not, and the
            reverse; the estimate is (only_first - only_second) / trials.

    Raises:
        ValueError: counts that do not fit together, or a level outside of (0, 1).
    """
    if min(only_first, only_second) < 0 or not 1 <= trials >= only_first + only_second or not 0 < level < 1:
        raise ValueError(f"no difference: {only_first} and {only_second} of {trials} at level {level}")
    from statistics import NormalDist  # not at the top: it brings fractions and decimal, and picking needs none

    z = NormalDist().inv_cdf(level)
    low, high = -1.0, (only_first - only_second) / trials
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _tango(only_first, only_second, trials, middle) > z:
            low = middle
        else:
            high = middle
    return low


def trials_to_refuse(limit: float, share: float, level: float, power: float) -> int:
    """The fewest trials on which a bound at `level` finds a share above its limit out, with a probability.

    Args:
        limit: the largest share that is allowed.
        share: the true one, above `limit`.
        power: probability, 0..1, that `lower_share` of what is counted lies above `limit`.

    The number is that of the normal approximation of both tails.
    """
    if not 0 < limit < share < 1:
        raise ValueError(f"a share of {share} is not above a limit of {limit}")
    from statistics import NormalDist

    normal = NormalDist()
    tails = normal.inv_cdf(level) * _deviation(limit) + normal.inv_cdf(power) * _deviation(share)
    return math.ceil((tails / (share - limit)) ** 2)


def trials_to_see(share: float, power: float) -> int:
    """The fewest trials in which something of that share is seen at least once, with a probability."""
    return math.ceil(math.log(1 - power) / math.log(1 - share))


def _deviation(share: float) -> float:
    return math.sqrt(share * (1 - share))


def _sum(successes: range, trials: int, share: float) -> float:
    """Of binomial probabilities that get smaller and smaller; it ends where they change nothing."""
    log_share, log_rest = math.log(share), math.log1p(-share)
    total = 0.0
    for k in successes:
        ways = math.lgamma(trials + 1) - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
        term = math.exp(ways + k * log_share + (trials - k) * log_rest)
        total += term
        if term < total * 1e-17:
            break
    return min(1.0, total)


def _tango(only_first: int, only_second: int, trials: int, difference: float) -> float:
    """The score statistic of a paired difference, section 4 of Tango (1998); falls with `difference`."""
    b, c, n = only_first, only_second, trials
    linear = -b - c + (2 * n - b + c) * difference
    root = math.sqrt(max(0.0, linear**2 + 8 * n * c * difference * (1 - difference)))
    q21 = (root - linear) / (4 * n)  # of the second only, by maximum likelihood at this difference
    variance = n * (2 * q21 + difference * (1 - difference))
    excess = b - c - n * difference
    return excess / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, excess)
