"""Where an engine came from, for `klas-zoo show`. Imports nothing heavy."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klas_zoo.errors import DamagedRegistry, UnknownName
from klas_zoo.files import sha256_of
from klas_zoo.profiles.records import LatencyRecord, origin_of
from klas_zoo.registry import Registry, rows
from klas_zoo.registry.records import PERCENTILES, BuildRecord, EngineRecord, percentile_ms
from klas_zoo.units import format_latency, format_macs, format_size


@dataclass(frozen=True)
class Origin:
    """An engine and the build that made it."""

    engine: EngineRecord
    build: BuildRecord

    def to_json(self) -> dict[str, Any]:
        return {"engine": self.engine.to_json(), "build": asdict(self.build)}

    def lines(self) -> Iterator[str]:
        """For people."""
        engine, build = self.engine, self.build
        loud = ", RANDOM WEIGHTS" if engine.weights == "random" else ""
        yield f"{engine.route} of {engine.family} on {engine.device} ({engine.runtime}, {engine.precision}){loud}"
        yield f"  file         {engine.path}"
        yield f"  sha256       {engine.sha256}, {format_size(engine.size_bytes)} with the weights it reads"
        yield f"  format       {engine.format}{f', package {engine.package}' if engine.package else ''}"
        yield f"  accuracy     {_accuracy(engine)}"
        yield f"  cost         {format_macs(engine.macs)} MACs, {format_macs(engine.parameters)} parameters"
        for one in engine.latencies:
            yield f"  latency      {_latency(one)}"
        seen = engine.verification
        if seen is None:
            yield f"  status       {engine.status}: {engine.reason}"
        else:
            yield f"  verified     {seen.images:,} images, logits differ by at most {seen.max_abs_difference:.1e}"
        yield f"  {build.kind:12} {engine.build_id}, {build.started_at} to {build.finished_at}"
        yield f"  command      {build.command}"
        yield f"  hardware     {build.hardware}"
        yield f"  versions     {', '.join(f'{name} {version}' for name, version in build.versions.items())}"
        yield f"  data         {build.data_fingerprint}"
        try:
            with rows.readable():
                yield from _manifest_lines(dict(build.manifest))
        except rows.UnreadableRow as error:
            raise DamagedRegistry(f"The manifest of build {engine.build_id} cannot be understood: {error}.") from error


def origins(registry: Registry, wanted: str, family: str | None = None, device: str | None = None) -> list[Origin]:
    """Every registered engine of a route, or of a file with the same content.

    Raises:
        UnknownName: there is none; names the nearest route.
    """
    engines = registry.engines(family, device)
    if Path(wanted).is_file():
        sha256 = sha256_of(Path(wanted))
        found = [one for one in engines if one.sha256 == sha256]
        hint = "No registered engine has the content of that file."
    else:
        found = [one for one in engines if str(one.route) == wanted]
        hint = "klas-zoo list shows what is registered."
    if not found:
        raise UnknownName("route", wanted, {str(one.route) for one in engines}, hint)
    builds = {number: registry.build(number) for number in {one.build_id for one in found}}
    return [Origin(one, builds[one.build_id]) for one in found]


def _accuracy(engine: EngineRecord) -> str:
    top5 = "" if engine.top5 is None else f", top-5 {engine.top5:.2f} %"
    source = f"claimed by {engine.accuracy_source}" if engine.claimed else f"on {engine.images:,} images"
    return f"top-1 {engine.top1:.2f} %{top5} {source}: {engine.dataset}"


def _latency(one: LatencyRecord) -> str:
    known = {percentile: percentile_ms(one, percentile) for percentile in PERCENTILES}
    numbers = ", ".join(f"{name} {format_latency(ms)}" for name, ms in known.items() if not math.isnan(ms))
    threads = {0: "", 1: ", 1 thread"}.get(one.threads, f", {one.threads} threads")
    clock = "" if one.clock == "host" else f", {one.clock} clock"
    runtime = f"{one.runtime} {one.runtime_version}, {one.provider}{f', {one.options}' if one.options else ''}"
    measured = f"{origin_of(one)} {one.measured_at}"
    return f"batch {one.batch}: {numbers}; {measured}, {runtime}{threads}{clock}, {one.hardware}"


def _manifest_lines(manifest: dict[str, Any]) -> Iterator[str]:
    if not manifest:
        yield "  (no manifest)"
        return
    if "seeds" in manifest:
        yield f"  seeds        {', '.join(f'{name} {seed}' for name, seed in manifest['seeds'].items())}"
    for name, anchor in manifest.get("anchors", {}).items():
        yield f"  anchor       {name} {anchor['sha256']}"
    if "source" in manifest:
        yield f"  source       {manifest['source']}"
    machine = manifest["machine"]
    yield f"  machine      {machine['host']}, {machine['system']}, {machine['processes']} process(es)"
    for stage in manifest.get("stages", ()):
        joules = stage.get("energy_joules")
        energy = f", {joules / 3.6e6:.3g} kWh" if joules is not None else ""
        yield f"  stage        {stage['stage']:18} {stage['seconds']:8.1f} s{energy}  {stage['key']}"
