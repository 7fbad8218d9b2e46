"""The main job: from a family and images to registered, verified, timed engines.

    family → probes → similarity → selection → initialise → tune → evaluate
           → export and verify → latency → cascades → register

Every arrow is a stage whose result is cached; see `klas_zoo.building.pipeline`. Running a build again resumes
where it stopped.
"""

from __future__ import annotations

import copy
import resource
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from klas_zoo.addresses import command_line
from klas_zoo.building.cache import Cache
from klas_zoo.building.cascade_stage import FitCascades, may_fit
from klas_zoo.building.context import BuildContext
from klas_zoo.building.engine_stages import Export, FrontierStage, PredictAnchors, Results, Time, TimeAnchors
from klas_zoo.building.engines import RouteResult
from klas_zoo.building.manifest import manifest
from klas_zoo.building.pipeline import Outcome, Runner, StageRecord
from klas_zoo.building.registry_stages import Register
from klas_zoo.building.selection_stages import LearnProbes, Measure, Select
from klas_zoo.building.settings import BuildSettings, plain
from klas_zoo.building.shipped_stages import Shipped, ShippedRoutes
from klas_zoo.building.tuning_stages import (
    Accuracies,
    Evaluate,
    Initialise,
    Stitched,
    Tune,
)
from klas_zoo.costs.predictions import PredictedCosts
from klas_zoo.data.loading import Data
from klas_zoo.families.anchors import Family
from klas_zoo.processes.signals import Signals
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.macs import route_costs
from klas_zoo.profiles.telemetry import energy_meter
from klas_zoo.progress.listeners import Listener, NullListener
from klas_zoo.registry import Registry
from klas_zoo.registry.records import BuildRecord
from klas_zoo.routes import Seam
from klas_zoo.selection import Selection
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.pairs import stitchable_pairs
from klas_zoo.selection.selectors import find_selector
from klas_zoo.supernet import Supernet
from klas_zoo.versions import versions

_WAITING = "Unused results are being deleted (klas-zoo registry gc); waiting for that."


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
    measured: Outcome[Measurements] | None
    selection: Outcome[Selection]
    stitched: Outcome[Stitched] | None
    timed: Outcome[Results] | None = None
    registered: Outcome[int] | None = None

    @property
    def measurements(self) -> Measurements:
        timed = self.anchors_ms.value if self.anchors_ms else None
        measured = self.measured.value if self.measured else Measurements()
        return replace(measured, latency_ms=timed)

    @property
    def unexplained(self) -> dict[Seam, float]:
        """Empty where the supernet came tuned."""
        return self.stitched.value.unexplained if self.stitched else {}


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
    """Stitches a family for a device and registers its engines. The family itself is not changed: a copy is tuned.

    Args:
        costs: predicted latencies on the device, for the frontier and for selectors that go by latency.
        team: the processes that do it together, each of which calls this; only the first gets the result.
        redo: the name of a stage whose cached result, and that of all stages after it, is deleted first.

    Raises:
        Interrupted: a signal came; the same call resumes, in this process or another.
        FamilyError: the family's weights were changed after it was made.
        KlasZooError: any other of its kinds; the registry stays as it was.
    """
    started = _now()
    if redo is not None:  # an unknown name is refused before any work
        plan(family, data, settings, device=device, registry=registry, listener=NullListener(), costs=costs, redo=redo)
    context = _context(family, data, settings, device, team, signals or Signals(), costs)
    cache = Cache(registry.root / "cache")
    runner = Runner(cache, listener, team=team, redo=redo, meter=energy_meter(device.torch_device))

    def record(key: str) -> BuildRecord:
        return BuildRecord(
            family=family.name, device=device.name, weights=family.weights, dataset=data.description,
            data_fingerprint=data.test_fingerprint, command=command_line(),
            settings=plain(context.settings), versions=versions(), hardware=device.hardware, started_at=started,
            finished_at=_now(), manifest=manifest(context, key, runner.records),
        )  # fmt: skip

    with cache.in_use(lambda: listener.say(_WAITING)) if team.is_main else nullcontext():
        line = _line_up(context, runner, registry, record)
        if not (line.timed and line.registered):
            return None
        build_id = line.registered.value
        return BuildResult(
            family=family, data=data, settings=context.settings, measurements=line.measurements,
            selection=line.selection.value, unexplained=line.unexplained,
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
    context = _context(family, data, settings, device, ALONE, Signals(), costs)
    runner = Runner(Cache(registry.root / "cache"), listener, dry=True, redo=redo)
    _line_up(context, runner, registry, _no_record)
    return runner.records


def _context(
    family: Family, data: Data, settings: BuildSettings, device: Device, team: Team, signals: Signals,
    costs: PredictedCosts | None,
) -> BuildContext:  # fmt: skip
    family.check_unchanged()
    settings = replace(settings, tuning=settings.tuning.on(device.torch_device))
    if any(one.device.type != device.torch_device for chain in family.chains.values() for one in chain.parameters()):
        moved = {name: copy.deepcopy(chain).to(device.torch_device) for name, chain in family.chains.items()}
        family = replace(family, chains=moved)  # modules move in place, and these are the caller's
    cost_of = route_costs(family)
    context = BuildContext(
        family=family, data=data, settings=settings, device=device, cost_of=cost_of, team=team, signals=signals,
        costs=costs,
    )
    stitchable_pairs(family.chains, context.macs, settings.selection)
    return context


def _line_up(
    context: BuildContext, runner: Runner, registry: Registry, record: Callable[[str], BuildRecord]
) -> _Line:
    do = runner.do
    if context.settings.shipped and context.family.supernet is not None:
        selection = do(ShippedRoutes(context))
        tuned: Outcome[Supernet] = do(Shipped(context, registry))
        after = do(Evaluate("evaluate tuned", context, tuned))
        line = _Line(anchors_ms=None, measured=None, selection=selection, stitched=None)
        return _finish(context, runner, registry, record, line, tuned, after, after)
    selector = find_selector(context.settings.selection.selector)
    needs = selector.asks_for(context.settings.selection)
    by_latency = PredictAnchors(context) if context.costs else TimeAnchors(context, registry)
    anchors_ms = do(by_latency) if selector.cost == "latency" else None
    probes = do(LearnProbes(context)) if "probes" in needs else None
    measured = do(Measure(context, frozenset(needs - {"latency_ms"}), probes))
    selection = do(Select(context, measured, anchors_ms))
    stitched = do(Initialise(context, selection))
    before = do(Evaluate("evaluate untuned", context, stitched))
    tuned = do(Tune(context, stitched, registry))
    after = do(Evaluate("evaluate tuned", context, tuned))
    line = _Line(anchors_ms=anchors_ms, measured=measured, selection=selection, stitched=stitched)
    return _finish(context, runner, registry, record, line, tuned, before, after)


def _finish(
    context: BuildContext, runner: Runner, registry: Registry, record: Callable[[str], BuildRecord], line: _Line,
    tuned: Outcome[Supernet], before: Outcome[Accuracies], after: Outcome[Accuracies],
) -> _Line:  # fmt: skip
    """From accuracies to registered engines: the first process's business alone."""
    do = runner.do
    if not context.team.is_main:
        return line
    runner.team = ALONE  # the others leave here
    judged = do(FrontierStage(context, before, after))
    exported = do(Export(context, tuned, judged, registry))
    timed = do(Time(context, exported, registry))
    fits = context.settings.cascades and may_fit(context)
    cascades = do(FitCascades(context, exported, timed, registry)) if fits else None
    registered = do(Register(context, tuned, exported, timed, cascades, registry, record))
    runner.finish()
    return replace(line, timed=timed, registered=registered)


def _no_record(key: str) -> BuildRecord:
    raise AssertionError("a dry run registers nothing")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
