"""The main job: from a family and images to registered, verified, timed engines.

    family → probes → similarity → selection → initialise → tune → evaluate
           → export and verify → latency → register

Every arrow is a stage whose result is kept; see `klas_zoo.building.pipeline`. Running a build again goes on
where it stopped.
"""

from __future__ import annotations

import resource
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from klas_zoo.building.cache import Cache
from klas_zoo.building.energy import meter
from klas_zoo.building.engine_stages import Export, Judge, PredictAnchors, Results, Time, TimeAnchors
from klas_zoo.building.engines import RouteResult
from klas_zoo.building.ground import Ground
from klas_zoo.building.manifest import manifest
from klas_zoo.building.pipeline import Outcome, Runner, StageRecord
from klas_zoo.building.registry_stages import Keep, Register
from klas_zoo.building.selection_stages import LearnProbes, Measure, Select
from klas_zoo.building.settings import BuildSettings, plain
from klas_zoo.building.tuning_stages import Evaluate, Initialise, Stitched, Tune
from klas_zoo.costs.counting import route_costs
from klas_zoo.costs.predicted import PredictedCosts
from klas_zoo.data.loading import Data
from klas_zoo.families.anchors import Family
from klas_zoo.processes.signals import Signals
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.profiles.devices import Device
from klas_zoo.progress.listeners import Listener, Nobody
from klas_zoo.registry import Registry
from klas_zoo.registry.records import BuildRecord
from klas_zoo.routes import Seam
from klas_zoo.selection import Selection
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.pairs import stitchable_pairs
from klas_zoo.selection.selectors import find_selector
from klas_zoo.versions import versions

_WAITING = "Results that nobody needs are being deleted (klas-zoo registry gc); waiting for that."


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """What a build found and registered; `seconds` per pass, memory in bytes."""

    family: Family
    data: Data
    settings: BuildSettings
    measurements: Measurements
    selection: Selection
    unexplained: dict[Seam, float]
    results: tuple[RouteResult, ...]
    record: BuildRecord
    build_id: int
    stages: tuple[StageRecord, ...]
    peak_memory_bytes: int
    costs: PredictedCosts | None = None

    @property
    def anchors(self) -> tuple[RouteResult, ...]:
        return tuple(result for result in self.results if result.route.is_anchor)

    @property
    def seconds(self) -> dict[str, float]:
        """Of every pass, whenever it was made."""
        return {name: seconds for stage in self.stages for name, seconds in stage.passes.items()}


@dataclass(frozen=True, kw_only=True)
class _Line:
    """The outcomes of a build's stages; engines are the first process's business alone."""

    anchors_ms: Outcome[dict[str, float]] | None
    measured: Outcome[Measurements]
    selection: Outcome[Selection]
    stitched: Outcome[Stitched]
    timed: Outcome[Results] | None = None
    registered: Outcome[int] | None = None

    @property
    def measurements(self) -> Measurements:
        timed = self.anchors_ms.value if self.anchors_ms else None
        return replace(self.measured.value, latency_ms=timed)


def build(
    family: Family,
    data: Data,
    settings: BuildSettings,
    *,
    device: Device,
    registry: Registry,
    listener: Listener,
    costs: PredictedCosts | None = None,
    team: Team = ALONE,
    signals: Signals | None = None,
    redo: str | None = None,
) -> BuildResult | None:
    """Stitches a family for a device and registers its engines. The family's weights are tuned in place.

    Args:
        costs: predicted latencies on the device, for the frontier and for selectors that go by latency.
        team: the processes that do it together, each of which calls this; only the first gets the result.
        redo: the name of a stage whose kept result, and that of all after it, is thrown away first.

    Raises:
        Interrupted: a signal came; the same call goes on from there.
        KlasZooError: any other of its kinds; the registry stays as it was.
    """
    started = _now()
    if redo is not None:  # a name nobody knows is said before any work
        plan(family, data, settings, device=device, registry=registry, listener=Nobody(), costs=costs, redo=redo)
    ground = _ground(family, data, settings, device, team, signals or Signals(), costs)
    cache = Cache(registry.root / "cache")
    runner = Runner(cache, listener, team=team, redo=redo, meter=meter(device.torch_device))

    def record(key: str) -> BuildRecord:
        return BuildRecord(
            family=family.name, device=device.name, weights=family.weights, dataset=data.description,
            data_fingerprint=data.test_fingerprint, command=shlex.join(["klas-zoo", *sys.argv[1:]]),
            settings=plain(ground.settings), versions=versions(), hardware=device.hardware, started_at=started,
            finished_at=_now(), manifest=manifest(ground, key, runner.records),
        )  # fmt: skip

    with cache.in_use(lambda: listener.say(_WAITING)) if team.leads else nullcontext():
        line = _line_up(ground, runner, registry, record)
        if not (line.timed and line.registered):
            return None
        build_id = line.registered.value
        return BuildResult(
            family=family, data=data, settings=ground.settings, measurements=line.measurements,
            selection=line.selection.value, unexplained=line.stitched.value.unexplained,
            results=tuple(line.timed.value), costs=costs, record=registry.build(build_id), build_id=build_id,
            stages=tuple(runner.records), peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )  # fmt: skip


def plan(
    family: Family,
    data: Data,
    settings: BuildSettings,
    *,
    device: Device,
    registry: Registry,
    listener: Listener,
    costs: PredictedCosts | None = None,
    redo: str | None = None,
) -> list[StageRecord]:
    """What `build` would do: every stage, with its key where that is known, and whether its result is kept.

    Raises:
        KlasZooError: the build would refuse before its first stage.
    """
    ground = _ground(family, data, settings, device, ALONE, Signals(), costs)
    runner = Runner(Cache(registry.root / "cache"), listener, dry=True, redo=redo)
    _line_up(ground, runner, registry, _no_record)
    return runner.records


def _ground(
    family: Family, data: Data, settings: BuildSettings, device: Device, team: Team, signals: Signals,
    costs: PredictedCosts | None,
) -> Ground:  # fmt: skip
    settings = replace(settings, tuning=settings.tuning.on(device.torch_device))
    cost_of = route_costs(family)
    ground = Ground(
        family=family, data=data, settings=settings, device=device, cost_of=cost_of, team=team, signals=signals,
        costs=costs,
    )
    stitchable_pairs(family.chains, ground.macs, settings.selection)
    for chain in family.chains.values():
        chain.to(device.torch_device)
    return ground


def _line_up(
    ground: Ground, runner: Runner, registry: Registry, record: Callable[[str], BuildRecord]
) -> _Line:
    do = runner.do
    selector = find_selector(ground.settings.selection.selector)
    needs = selector.asks_for(ground.settings.selection)
    by_latency = PredictAnchors(ground) if ground.costs else TimeAnchors(ground, registry)
    anchors_ms = do(by_latency) if selector.cost == "latency" else None
    probes = do(LearnProbes(ground)) if needs & {"probes", "calibrated"} else None
    measured = do(Measure(ground, frozenset(needs - {"latency_ms"}), probes))
    selection = do(Select(ground, measured, anchors_ms))
    stitched = do(Initialise(ground, selection))
    before = do(Evaluate("evaluate untuned", ground, stitched))
    tuned = do(Tune(ground, stitched))
    after = do(Evaluate("evaluate tuned", ground, tuned))
    line = _Line(anchors_ms=anchors_ms, measured=measured, selection=selection, stitched=stitched)
    if not ground.team.leads:
        return line
    runner.team = ALONE  # the others leave here
    judged = do(Judge(ground, before, after))
    exported = do(Export(ground, tuned, judged))
    timed = do(Time(ground, exported, registry))
    registered = do(Register(ground, exported, timed, registry, record))
    do(Keep(ground, tuned, timed, registered, registry))
    runner.finish()
    return replace(line, timed=timed, registered=registered)


def _no_record(key: str) -> BuildRecord:
    raise AssertionError("a dry run registers nothing")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
