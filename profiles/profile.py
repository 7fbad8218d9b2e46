"""A profile: what the routes of one family cost on one device, with one runtime, precision and batch size.

Networks that were measured, and a model of the rest: the milliseconds of every part of every anchor
and of a seam, whose sum along a route is its latency. docs/profiles.md describes the file. Imports
nothing heavy, because `pick` reads profiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from klas_zoo.routes import Route, Seam

SCHEMA_VERSION = 1
NOISY_VARIATION = 0.05
"""Coefficient of variation above which a measurement is called noisy."""
LONGEST_MS, SHORTEST_MS = 1e7, 1e-4
"""Beyond these a latency is a mistake."""
Origin = Literal["measured", "interpolated", "roofline"]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of all runs of one network, milliseconds per batch; outliers are among them."""

    runs: int
    min_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    coefficient_of_variation: float


@dataclass(frozen=True, kw_only=True)
class MeasuredNetwork:
    """One network as it was measured.

    Attributes:
        macs: multiply-adds for one image.
        parameters: how many numbers its weights are.
        latency: what a caller waits for; on a GPU the device's own time.
        host: on a GPU, from the call to the answer as the host sees it; None on a CPU, where both are one.
    """

    route: Route
    macs: int
    parameters: int
    latency: Statistics
    host: Statistics | None = None

    @property
    def noisy(self) -> bool:
        return self.latency.coefficient_of_variation > NOISY_VARIATION


@dataclass(frozen=True, kw_only=True)
class AnchorModel:
    """What the parts of one anchor cost: milliseconds of a batch, multiply-adds of an image.

    Attributes:
        vectors, widths: of the features after the stem and after every block, n + 1 of each.
    """

    stem_ms: float
    block_ms: tuple[float, ...]
    head_ms: float
    stem_macs: int
    block_macs: tuple[int, ...]
    head_macs: int
    vectors: tuple[int, ...]
    widths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PredictionError:
    """How far predictions were off where they could be checked, per cent of what was measured.

    `method` says in a clause what was checked against what.
    """

    checked: int
    median_percent: float
    p90_percent: float
    largest_percent: float
    method: str


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Latency of any route as a sum over its parts and seams.

    Attributes:
        seam_ms: what every seam costs whatever its size.
        seam_ms_per_gmac: on top of it, by the anchor that goes on after the seam.
    """

    anchors: Mapping[str, AnchorModel]
    seam_ms: float
    seam_ms_per_gmac: Mapping[str, float]
    error: PredictionError

    def covers(self, route: Route) -> bool:
        """Whether the route is made of blocks that the model knows."""
        return all(
            segment.anchor in self.anchors and segment.last <= len(self.anchors[segment.anchor].block_ms)
            for segment in route.segments
        )

    def seam_macs(self, seam: Seam) -> int:
        source, target = self.anchors[seam.source], self.anchors[seam.target]
        return target.vectors[seam.j] * source.widths[seam.i] * target.widths[seam.j]

    def macs(self, route: Route) -> int:
        """Multiply-adds of one image."""
        first, last = self.anchors[route.segments[0].anchor], self.anchors[route.segments[-1].anchor]
        blocks = sum(sum(self.anchors[s.anchor].block_macs[s.first - 1 : s.last]) for s in route.segments)
        return first.stem_macs + blocks + sum(map(self.seam_macs, route.seams)) + last.head_macs

    def predict_ms(self, route: Route) -> float:
        """The median latency of a batch."""
        first, last = self.anchors[route.segments[0].anchor], self.anchors[route.segments[-1].anchor]
        blocks = sum(sum(self.anchors[s.anchor].block_ms[s.first - 1 : s.last]) for s in route.segments)
        seams = sum(
            self.seam_ms + self.seam_ms_per_gmac[seam.target] * self.seam_macs(seam) / 1e9 for seam in route.seams
        )
        return first.stem_ms + blocks + seams + last.head_ms


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One family on one device, with one runtime, precision and batch size.

    Attributes:
        family_sha256: of the anchors' architecture, see `contents.architecture_sha256`.
        hardware: for people; driver and versions are in `versions`.
        kind: `cpu` or `gpu`.
        origin: `measured`, or `roofline` where nothing was.
        options: of the runtime, such as spinning or CUDA graphs.
        method: warm-up, number of runs and rounds, seeds.
        conditions: what the machine did meanwhile: clocks, temperature, throttle reasons, load.
        failure: why there are no networks, such as a batch that does not fit into memory.
        warnings: what makes the numbers doubtful, a sentence each.
    """

    family: str
    family_sha256: str
    input_shape: tuple[int, ...]
    device: str
    hardware: str
    kind: Literal["cpu", "gpu"]
    compute_capability: str | None
    runtime: str
    runtime_version: str
    provider: str
    precision: str
    batch: int
    threads: int
    origin: Literal["measured", "roofline"]
    measured_at: str
    networks: tuple[MeasuredNetwork, ...] = ()
    model: LatencyModel | None = None
    options: Mapping[str, object] = field(default_factory=dict)
    method: Mapping[str, object] = field(default_factory=dict)
    conditions: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    failure: str = ""
    warnings: tuple[str, ...] = ()

    @property
    def noisy(self) -> bool:
        return bool(self.warnings)

    def network(self, route: Route) -> MeasuredNetwork | None:
        return next((one for one in self.networks if one.route == route), None)

    def spread(self, percentile: str) -> float | None:
        """How much longer than the median a percentile is, over all measured networks; None where none was."""
        ratios = sorted(getattr(one.latency, f"{percentile}_ms") / one.latency.p50_ms for one in self.networks)
        half = len(ratios) // 2  # not statistics.median, which is slow to import
        return (ratios[half] + ratios[~half]) / 2 if ratios else None

    def __str__(self) -> str:
        """`deit on a100 (onnxruntime, fp16, batch 8)`."""
        return f"{self.family} on {self.device} ({self.runtime}, {self.precision}, batch {self.batch})"
