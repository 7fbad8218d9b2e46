"""A profile: what the routes of one family cost on one device, with one runtime, precision and batch size.

Networks that were measured, and a model of the rest: the milliseconds of every part of every anchor
and of a seam, whose sum along a route is its latency. docs/profiles.md describes the file. Imports
nothing heavy, because `pick` reads profiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Annotated, Literal

from msgspec import Meta

from klas_zoo.reading import Count, Positive, Text
from klas_zoo.routes import Route, Seam

SCHEMA_VERSION = 2
NOISY_VARIATION = 0.05
"""Coefficient of variation above which a measurement is called noisy."""
LONGEST_MS, SHORTEST_MS = 1e7, 1e-4
"""Beyond these a latency is a mistake."""
_MUCH_MORE, _SAME = 1.5, 1.05  # multiply-adds and milliseconds of two anchors, as ratios
Ms = Annotated[float, Meta(ge=0, le=LONGEST_MS)]
MeasuredMs = Annotated[float, Meta(ge=SHORTEST_MS, le=LONGEST_MS)]
Percent = Annotated[float, Meta(ge=0, le=1e6)]
LatencyOrigin = Literal["measured", "interpolated", "roofline"]


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of all runs of one network, milliseconds per batch; outliers are among them."""

    runs: Positive
    min_ms: MeasuredMs
    p50_ms: MeasuredMs
    p90_ms: MeasuredMs
    p95_ms: MeasuredMs
    p99_ms: MeasuredMs
    coefficient_of_variation: Annotated[float, Meta(ge=0, le=1000)]

    def __post_init__(self) -> None:
        for before, after in pairwise(("min_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms")):
            if getattr(self, before) > getattr(self, after):
                raise ValueError(f"{after} is {getattr(self, after):g}, less than {before}, {getattr(self, before):g}")


@dataclass(frozen=True, kw_only=True)
class MeasuredNetwork:
    """One network as it was measured.

    Attributes:
        macs: multiply-adds for one image.
        parameters: how many numbers its weights are.
        latency: by the profile's clock, which is the host's: from images to logits in the host's memory.
        device: by the device's own clock, input and output in its memory; None on a CPU.
    """

    route: Route
    macs: Positive
    parameters: Count
    latency: Statistics
    device: Statistics | None = None

    @property
    def noisy(self) -> bool:
        return self.latency.coefficient_of_variation > NOISY_VARIATION


@dataclass(frozen=True, kw_only=True)
class AnchorModel:
    """What the parts of one anchor cost: milliseconds of a batch, multiply-adds of an image.

    Attributes:
        vectors, widths: of the features after the stem and after every block, n + 1 of each.
    """

    stem_ms: Ms
    block_ms: tuple[Ms, ...]
    head_ms: Ms
    stem_macs: Count
    block_macs: tuple[Count, ...]
    head_macs: Count
    vectors: tuple[Positive, ...]
    widths: tuple[Positive, ...]

    def __post_init__(self) -> None:
        blocks = len(self.block_ms)
        for name, count in (("block_macs", blocks), ("vectors", blocks + 1), ("widths", blocks + 1)):
            if len(getattr(self, name)) != count:
                raise ValueError(f"{name} has {len(getattr(self, name))} numbers, {count} are needed")


@dataclass(frozen=True, kw_only=True)
class PredictionError:
    """How far predictions were off where they could be checked, per cent of what was measured.

    `method` says in a clause what was checked against what.
    """

    checked: Count
    median_percent: Percent
    p90_percent: Percent
    largest_percent: Percent
    method: Text


@dataclass(frozen=True, kw_only=True)
class LatencyModel:
    """Latency of any route as a sum over its parts and seams.

    Attributes:
        seam_ms: what every seam costs whatever its size.
        seam_ms_per_gmac: on top of it, by the anchor after the seam.
    """

    anchors: Mapping[str, AnchorModel]
    seam_ms: Ms
    seam_ms_per_gmac: Mapping[str, Ms]
    error: PredictionError

    def __post_init__(self) -> None:
        if odd := sorted(self.anchors.keys() ^ self.seam_ms_per_gmac.keys()):
            raise ValueError(f"anchors and seam_ms_per_gmac do not name the same anchors: only one has {odd[0]}")

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

    @property
    def hidden_by_the_floor(self) -> tuple[str, str] | None:
        """Two anchors that the model cannot tell apart although one does much more; the first such neighbours.

        So it is where every operator takes as long as the smallest kernel does: an order by such latencies is that of
        the numbers of operators.
        """
        rows = sorted(
            (self.macs(route), self.predict_ms(route), name)
            for name, one in self.anchors.items()
            for route in (Route.anchor(name, len(one.block_ms)),)
        )
        for (less, faster, small), (more, slower, large) in pairwise(rows):
            if more > _MUCH_MORE * less and slower < _SAME * faster:
                return small, large
        return None

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
        clock: of the networks' `latency` and of the model. `device` in profiles of GPUs by klas-zoo 0.1, in which the
            host's times left out copies.
        options: the runtime's options that differ from this project's defaults, such as CUDA graphs.
        method: warm-up, number of runs and rounds, seeds.
        conditions: what the machine did meanwhile: clocks, temperature, throttle reasons, load.
        failure: why there are no networks, such as a batch that does not fit into memory.
        warnings: what makes the numbers doubtful, a sentence each.
    """

    family: Text
    family_sha256: Text
    input_shape: Annotated[tuple[Positive, ...], Meta(min_length=3, max_length=3)]
    device: Text
    hardware: Text
    kind: Literal["cpu", "gpu"]
    compute_capability: Text | None
    runtime: Text
    runtime_version: Text
    provider: Text
    precision: str
    batch: Positive
    threads: Count
    origin: Literal["measured", "roofline"]
    measured_at: str
    networks: tuple[MeasuredNetwork, ...] = ()
    model: LatencyModel | None = None
    clock: Literal["host", "device"] = "host"
    options: Mapping[str, str] = field(default_factory=dict)
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
