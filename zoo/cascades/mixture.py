"""The latency of a cascade: each image takes one path, so that latencies are those of all paths, mixed by their shares.

Where more than one image in a hundred goes on, the 99th percentile is a long path's, whatever the mean says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class MixedLatency:
    """Milliseconds of one image.

    Attributes:
        worst_ms: 99th percentile of the longest path, on which every stage is executed.
        paths_ms: the median of each path, shortest first.
    """

    mean_ms: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    worst_ms: float
    paths_ms: tuple[float, ...]

    @classmethod
    def of(cls, paths_ms: Sequence[np.ndarray], shares: Sequence[float]) -> MixedLatency:
        """The mixture of measured paths.

        Args:
            paths_ms: of each path every run, (runs,); shortest path first.
            shares: of the images that take each path; they sum up to 1.

        Raises:
            ValueError: another number of shares than paths, or they do not sum up to 1.
        """
        if len(paths_ms) != len(shares) or abs(sum(shares) - 1) > 1e-6:
            raise ValueError(f"{len(paths_ms)} shares that sum up to 1 are needed, not {tuple(shares)}")
        runs = np.concatenate(paths_ms)
        weights = np.concatenate([np.full(len(p), s / len(p)) for p, s in zip(paths_ms, shares, strict=True)])
        order = np.argsort(runs, kind="stable")
        reached = np.cumsum(weights[order])

        def percentile(share: float) -> float:
            return float(runs[order][min(int(np.searchsorted(reached, share - 1e-12)), len(runs) - 1)])

        return cls(
            mean_ms=float((runs * weights).sum()), p50_ms=percentile(0.5), p90_ms=percentile(0.9),
            p99_ms=percentile(0.99), worst_ms=float(np.percentile(paths_ms[-1], 99)),
            paths_ms=tuple(float(np.median(one)) for one in paths_ms),
        )  # fmt: skip
