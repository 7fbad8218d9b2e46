"""Measuring a profile: a family's anchors and a few telling stitches, timed in turn on this machine.

Random weights do: latency does not depend on their values.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from klas_zoo.chains import Chain, can_stitch
from klas_zoo.costs.runtimes import ProfileSettings, check_settings, runner_of, runtime_options
from klas_zoo.exporters.precision import converter
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.families.anchors import Family
from klas_zoo.hardware import free_memory_bytes, physical_cores
from klas_zoo.profiles import runners
from klas_zoo.profiles.catalog import BYTES_OF
from klas_zoo.profiles.devices import Device, cuda_uuid
from klas_zoo.profiles.interpolation import choose_stitches, errors_percent, fit, summarise
from klas_zoo.profiles.latency import provider_on
from klas_zoo.profiles.profile import LatencyModel, MeasuredNetwork, Profile
from klas_zoo.profiles.runners import OutOfMemory
from klas_zoo.profiles.shapes import Counted, count, route_cost_of, shapes_of
from klas_zoo.profiles.telemetry import Telemetry
from klas_zoo.profiles.timing import Times, doubts, statistics_of, time_in_turn
from klas_zoo.progress.listeners import Listener
from klas_zoo.routes import Route
from klas_zoo.runtimes import runtime_named
from klas_zoo.supernet import Supernet
from klas_zoo.versions import versions

_CALIBRATION_IMAGES = 4
# between its products, an engine in int8 holds fp32
_BYTES_HELD: Mapping[str, int] = {**BYTES_OF, "int8": BYTES_OF["fp32"]}


def profile_family(
    family: Family,
    device: Device,
    settings: ProfileSettings,
    *,
    listener: Listener,
    routes: tuple[Sequence[Route], Sequence[Route]] | None = None,
    graphs: Mapping[Route, Path] | None = None,
    on_profile: Callable[[Profile], object] = lambda found: None,
) -> list[Profile]:
    """Measures a family on a device of this machine: one profile for each batch size.

    A batch that does not fit into memory gives a profile without networks that says so.

    Args:
        routes: those to fit a model to and those to check it on. Default: `routes_to_measure`.
        graphs: ONNX files of all of them in the precision of `settings`, where they were exported before.
        on_profile: called with each profile as soon as it is measured, so that a later failure cannot lose it.

    Raises:
        UsageError: see `check_settings`.
        ExportError: a network cannot be turned into an engine, or does not run.
    """
    check_settings(settings, device.kind)
    counted = count(family.chains, family.input_shape)
    fitted, checks = routes or routes_to_measure(family, settings, counted)
    session = _Session(family=family, device=device, settings=settings, counted=counted, listener=listener)
    with nullcontext(graphs) if graphs is not None else session.networks([*fitted, *checks]) as networks:
        found = []
        for batch in settings.batches:
            found.append(session.profile(networks, batch, frozenset(checks)))
            on_profile(found[-1])
        return found


def routes_to_measure(
    family: Family, settings: ProfileSettings, counted: Counted | None = None
) -> tuple[list[Route], list[Route]]:
    """The routes that a model is fitted to, anchors first, and those that it is only checked on."""
    counted = counted or count(family.chains, family.input_shape)
    stitches = all_stitches(family.chains)
    anchors = [Route.anchor(name, chain.depth) for name, chain in family.chains.items()]
    shapes = shapes_of(counted, batch=settings.batches[0], bytes_each=_BYTES_HELD[settings.precision])
    chosen = choose_stitches(shapes, stitches, settings.stitches)
    others = [route for route in stitches if route not in chosen]
    checks = random.Random(settings.seed).sample(others, min(settings.checks, len(others)))
    return [*anchors, *chosen], checks


def all_stitches(chains: Mapping[str, Chain]) -> list[Route]:
    """Every stitch between anchors that are neighbours in cost; of any two where neighbours have no seam."""
    names = list(chains)
    ordered = [(s, t) for a, s in enumerate(names) for t in names[a + 1 :]]
    neighbours = [pair for pair in pairwise(names) if _seams(chains, *pair)]
    return [route for pair in (neighbours or ordered) for route in _seams(chains, *pair)]


def _seams(chains: Mapping[str, Chain], source: str, target: str) -> list[Route]:
    before, after = chains[source], chains[target]
    return [
        Route.stitch(source, i, target, j, after.depth)
        for i in range(1, before.depth + 1)
        for j in range(after.depth)
        if can_stitch(before, i, after, j)
    ]


@dataclass(frozen=True, kw_only=True)
class _Session:
    """One call of `profile_family`."""

    family: Family
    device: Device
    settings: ProfileSettings
    counted: Counted
    listener: Listener

    @contextmanager
    def networks(self, routes: Sequence[Route]) -> Iterator[dict[Route, Path | nn.Module]]:
        """Every route as a file or a module, for as long as the block lasts."""
        # runners move and round what they are given, and these modules are the caller's
        supernet = Supernet(copy.deepcopy(self.family.chains), routes).cpu().eval()
        if self.settings.runtime == "torch":
            yield {route: supernet.network(route) for route in routes}
            return
        with tempfile.TemporaryDirectory(prefix="klas-zoo-") as folder:
            files = {route: Path(folder) / f"{route}.onnx" for route in routes}
            with self.listener.stage("export", len(routes), "networks") as advance:
                convert = converter(self.settings.precision, self._calibration)
                exporter = RouteExporter(supernet, self.family.input_shape, convert)
                for route, file in files.items():
                    exporter.export(route, file, metadata={})
                    advance(1, str(route))
            yield dict(files)

    def _calibration(self) -> Iterator[tuple[torch.Tensor, None]]:
        """Made up: what ranges int8 finds on them decides what it answers, not how long that takes."""
        yield torch.from_numpy(runners.images_of(_CALIBRATION_IMAGES, self.family.input_shape)), None

    def profile(self, networks: Mapping[Route, Path | nn.Module], batch: int, checks: frozenset[Route]) -> Profile:
        """Times all networks at one batch size."""
        telemetry = Telemetry(cuda_uuid()) if self.device.kind == "cuda" else None
        load, started, failure = os.getloadavg()[0], time.perf_counter(), ""
        try:
            self._refuse_more_than_memory(batch)
            times = self._time(networks, batch, telemetry)
        except OutOfMemory as error:
            failure = str(error)
        if failure:
            self.listener.say(f"Batch {batch}: {failure}")
            gc.collect()  # the error held the networks; the next batch needs their memory
            if self.device.kind == "cuda":
                torch.cuda.empty_cache()
            return self._record(batch, failure=failure)
        conditions: dict[str, object] = {
            "load_before": load,
            "load_after": os.getloadavg()[0],
            "seconds": round(time.perf_counter() - started, 1),
        }
        warnings = doubts({str(route): found.host_ms for route, found in times.items()}, self.settings.method.rounds)
        if telemetry is not None:
            conditions |= telemetry.conditions()
            warnings += telemetry.warnings()
        found = tuple(self._network(route, seen) for route, seen in times.items())
        model = self._model(batch, {one.route: one.latency.p50_ms for one in found}, checks)
        return self._record(
            batch, networks=found, model=model, conditions=conditions, warnings=tuple(warnings)
        )

    def _time(
        self, networks: Mapping[Route, Path | nn.Module], batch: int, telemetry: Telemetry | None
    ) -> dict[Route, Times]:
        images = runners.images_of(batch, self.family.input_shape)
        with self._threads():
            live = {
                route: runner_of(network, images, self.settings, self.device) for route, network in networks.items()
            }
            total = len(live) * self.settings.method.rounds
            with self.listener.stage(f"batch {batch}", total, "bursts") as advance:

                def after(route: Route) -> None:
                    advance(1, str(route))

                with telemetry.watching() if telemetry else nullcontext():
                    return time_in_turn(live, self.settings.method, on_burst=after)

    def _refuse_more_than_memory(self, batch: int) -> None:
        """On a CPU the system would not refuse, but kill."""
        if self.device.kind != "cpu":
            return
        each, traffic = _BYTES_HELD[self.settings.precision], self.counted.traffic.values()
        peak = max(part.peak_activation_bytes(batch, each) for one in traffic for part in one.parts)
        free = free_memory_bytes()
        if free is not None and peak > free:
            raise OutOfMemory(
                f"a batch of {batch} needs {peak / 1e9:.1f} GB for its activations, and {free / 1e9:.1f} GB are free"
            )

    def _network(self, route: Route, times: Times) -> MeasuredNetwork:
        cost = route_cost_of(self.counted, route)
        return MeasuredNetwork(
            route=route,
            macs=cost.macs,
            parameters=cost.parameters,
            latency=statistics_of(times.host_ms),
            device=None if times.device_ms is None else statistics_of(times.device_ms),
        )

    def _model(self, batch: int, medians: Mapping[Route, float], checks: frozenset[Route]) -> LatencyModel:
        shapes = shapes_of(self.counted, batch=batch, bytes_each=_BYTES_HELD[self.settings.precision])
        model = fit(shapes, {route: ms for route, ms in medians.items() if route not in checks})
        if not checks:
            return model
        errors = errors_percent(model, {route: medians[route] for route in checks})
        return replace(model, error=summarise(list(errors.values()), "measured stitches that the fit has not seen"))

    def _record(self, batch: int, **found: object) -> Profile:
        settings, gpu = self.settings, self.device.kind == "cuda"
        method: dict[str, object] = {**asdict(settings.method), "seed": settings.seed}
        method["order"] = "in turn, there and back"
        if settings.precision == "int8":
            method["calibrated_on"] = f"{_CALIBRATION_IMAGES} made-up images"
        facts: dict[str, object] = {
            "family": self.family.name,
            "family_sha256": self.counted.sha256,
            "input_shape": tuple(self.family.input_shape),
            "device": settings.name or (self.device.name),
            "hardware": self.device.hardware,
            "kind": "gpu" if gpu else "cpu",
            "compute_capability": ".".join(map(str, torch.cuda.get_device_capability())) if gpu else None,
            "runtime": settings.runtime,
            "runtime_version": runtime_named(settings.runtime).version(),
            "provider": provider_on(settings.runtime, self.device),
            "precision": settings.precision,
            "batch": batch,
            "threads": 0 if gpu else settings.threads or physical_cores(),
            "origin": "measured",
            "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "clock": "host",
            "options": runtime_options(settings),
            "method": method,
            "versions": versions(),
        }
        return Profile(**{**facts, **found})  # type: ignore[arg-type]

    @contextmanager
    def _threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.settings.threads or physical_cores())
        try:
            yield
        finally:
            torch.set_num_threads(before)
