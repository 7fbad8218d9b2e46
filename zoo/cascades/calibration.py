"""How sure a network is of its answers, and whether it is right as often as it says.

Temperature scaling divides logits by one number that is fitted on held-out images (Guo et al. 2017, "On Calibration of
Modern Neural Networks", arXiv:1706.04599, section 4.2). It changes no answer and no order of one network's
probabilities; it makes probabilities of several networks comparable, and thresholds mean what they say.
"""

from __future__ import annotations

import math

import numpy as np

from klas_zoo.cascades.definition import Measure

_COLDEST, _HOTTEST = 0.05, 20.0
_STEPS = 60  # of the golden section: the interval shrinks by 0.618 each time
_BINS = 15


def probabilities(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Logits (N, classes) → probabilities (N, classes), float64."""
    scaled = logits.astype(np.float64) / temperature
    powers: np.ndarray = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def confidence(logits: np.ndarray, measure: Measure, temperature: float = 1.0) -> np.ndarray:
    """Logits (N, classes) → how sure the network is of each image, (N,) float64, 0..1.

    `probability` is the largest one, `margin` the difference of the two largest (0 where there is one class only), and
    `entropy` is 1 - H / ln(classes). Logits that are not finite give 0: whoever computed them is not to be trusted.
    """
    with np.errstate(invalid="ignore"):
        shares = probabilities(logits, temperature)
        if measure == "probability":
            found = shares.max(axis=1)
        elif measure == "margin":
            two = np.sort(shares, axis=1)[:, -2:]
            found = two[:, -1] - two[:, 0]
        else:
            logs = np.log(np.maximum(shares, np.finfo(np.float64).tiny))
            found = 1 + (shares * logs).sum(axis=1) / math.log(max(2, shares.shape[1]))
    found = np.where(np.isfinite(found), found, 0.0)  # called for every image: nan_to_num takes longer than all else
    return np.minimum(np.maximum(found, 0.0), 1.0)


def fit_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature under which labels are most likely, 0.05 to 20, to three decimals.

    The mean log-likelihood is concave in the inverse temperature, so that a golden section over it finds the maximum.

    Args:
        logits: (N, classes) of held-out images.
        labels: (N,) their classes.
    """
    ratio = (math.sqrt(5) - 1) / 2
    low, high = 1 / _HOTTEST, 1 / _COLDEST
    for _ in range(_STEPS):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        if _log_loss(logits, labels, first) < _log_loss(logits, labels, second):
            high = second
        else:
            low = first
    return round(2 / (low + high), 3)


def calibration_error(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> float:
    """Expected calibration error, 0..1: the mean distance of probability and accuracy over 15 bins of equal width."""
    shares = probabilities(logits, temperature)
    sure, right = shares.max(axis=1), shares.argmax(axis=1) == labels
    bins = np.minimum((sure * _BINS).astype(int), _BINS - 1)
    return sum(
        float(abs(sure[bins == one].sum() - right[bins == one].sum())) for one in np.unique(bins)
    ) / len(labels)


def _log_loss(logits: np.ndarray, labels: np.ndarray, inverse: float) -> float:
    """Mean negative log-likelihood at an inverse temperature."""
    scaled = logits.astype(np.float64) * inverse
    top = scaled.max(axis=1)
    partition = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
    return float((partition - scaled[np.arange(len(labels)), labels]).mean())
