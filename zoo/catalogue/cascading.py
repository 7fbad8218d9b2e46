"""Cascades of a package's engines: fitted on labelled images, timed here, and chosen within limits. Needs no torch.

Half of the images, drawn at random, decide temperatures, thresholds and which cascades are worth having; the other half
says how accurate they are, or images of another set do.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np

from klas_zoo.cascades.calibration import calibration_error
from klas_zoo.cascades.costs import Costs
from klas_zoo.cascades.definition import Cascade, Stage
from klas_zoo.cascades.fitting import FittedCascade, outcome, outcome_of, refuse_too_few
from klas_zoo.cascades.mixture import MixedLatency
from klas_zoo.cascades.outputs import RouteOutputs
from klas_zoo.cascades.search import Found, SearchSettings
from klas_zoo.catalogue.cascade_reports import CascadeReport as CascadeReport
from klas_zoo.catalogue.cascade_reports import Limits as Limits
from klas_zoo.catalogue.evaluating import TestImages
from klas_zoo.catalogue.targets import Target, of_package
from klas_zoo.errors import PackageError, UsageError
from klas_zoo.exporters.cascade_fitting import (
    PathTimes,
    find_cascades,
    outputs_of,
    packaged,
    time_paths,
    verify_cascade,
)
from klas_zoo.exporters.cascade_if import refuse_unlike, write_one_graph
from klas_zoo.exporters.manifest import FileEntry
from klas_zoo.exporters.package import Package, write_manifest
from klas_zoo.exporters.package_writing import staging
from klas_zoo.exporters.packaged_cascades import CASCADES, PackagedCascades, write_cascades
from klas_zoo.files import sha256_of
from klas_zoo.profiles.devices import Device, resolve_device
from klas_zoo.routes import Route
from klas_zoo.runtimes import CPU_PROVIDER

_BATCH = 64
Listener = Callable[[str, int, int], None]
"""Called with what is done, and how much of how much."""


def fit_cascades(
    package: str | Path,
    *,
    data: str | Path | None = None,
    test: str | Path | None = None,
    out: str | Path | None = None,
    graphs: bool = False,
    routes: Sequence[str] = (),
    settings: SearchSettings | None = None,
    provider: str = CPU_PROVIDER,
    threads: int | None = None,
    classes: Sequence[str] | None = None,
    seed: int = 0,
    test_images: Sequence[str] = (),
    listener: Listener = lambda what, done, total: None,
) -> list[CascadeReport]:
    """Static routes of a package and cascades of them, timed here one image at a time; the fastest by mean first.

    Args:
        package: the folder of a package of ONNX graphs.
        data: labelled images that no network has learned from, as `klas_zoo.evaluate` takes them. None: the test
            images that the family embeds.
        test: labelled images that say how accurate cascades are; all of `data` then decide. None: half of `data`.
        out: a new folder for a copy of the package that carries the cascades, as `cascades.json`.
        graphs: with `out`, also write each cascade of two stages as one ONNX graph with `If` for one image at a time,
            `cascade-1.onnx` and so on in the order of `cascades.json`.
        routes: use these. Default: all.
        settings: what is tried, see `SearchSettings`; by default six cascades are kept on each frontier.
        seed: of the drawing of the images that decide.
        test_images: fingerprints of images that must not decide, as accuracies were measured on them.

    Raises:
        UsageError: fewer than two routes, no images, images that must not decide, or with `graphs` routes of which no
            one graph can be made.
        DataError: too few images to fit a threshold on those that decide; says how many are needed.
        PackageError: it is no package of ONNX graphs, or something stands at `out`.
        ExportError: an engine does not run here.
    """
    targets = list(of_package(Path(package), routes))
    found = targets[0].package
    assert found is not None
    if found.manifest.format != "onnx":
        raise PackageError(
            f"{package} is a package of format {found.manifest.format}: cascades are made of ONNX graphs, so export "
            "with --format onnx."
        )
    if len(targets) < 2:
        raise UsageError("A cascade needs two routes: the package or --route names only one.")
    device = resolve_device("cpu" if provider == CPU_PROVIDER else "cuda")
    images = TestImages.open(data, targets, classes)
    others = None if test is None else TestImages.open(test, targets, classes)
    if others is not None and others.data_fingerprint == images.data_fingerprint:
        raise UsageError("The images that decide and those that say how accurate cascades are have to be different.")
    if images.data_fingerprint in test_images:
        raise UsageError(
            f"{images.description}: accuracies were measured on these images, so that they must not decide thresholds. "
            "Pass other labelled images as --data."
        )
    refuse_too_few(len(images.source.labels) // (1 if others else 2))
    if graphs:
        refuse_unlike(found)
    with ExitStack() as stack:
        folder = None if out is None else stack.enter_context(staging(Path(out)))
        heldout, seen, about = _outputs(found, targets, images, others, seed, provider, threads, listener)
        chosen, costs = find_cascades(found, heldout, settings or SearchSettings(most=6))
        statics, times = _timed(found, chosen, list(heldout.logits), device, provider, threads, listener)
        if folder is not None:
            made = [
                packaged(found, one, outcome(one.cascade, seen),
                         verify_cascade(found, one.cascade, provider=provider, threads=threads),
                         times.latency(one.cascade, one.heldout.shares, device.name))
                for one in chosen.cascades
            ]  # fmt: skip
            _write(found, PackagedCascades(cascades=tuple(made), data=about), folder, graphs, threads)
    reports = [_static(route, times.runs[one][0], seen, costs) for route, one in statics.items()]
    reports += [_report(one, times.runs[one.cascade], seen) for one in chosen.cascades]
    return sorted(reports, key=lambda one: one.latency.mean_ms)


def _outputs(
    package: Package, targets: Sequence[Target], images: TestImages, others: TestImages | None, seed: int,
    provider: str, threads: int | None, listener: Listener,
) -> tuple[RouteOutputs, RouteOutputs, dict[str, str]]:  # fmt: skip
    """Of the images that decide, of those that say how accurate cascades are, and what the latter are."""

    def logits(some: TestImages) -> RouteOutputs:
        total, done = len(targets) * len(some.source.labels), iter(range(1, 10**9))
        return outputs_of(
            package, [one.route for one in targets], lambda: some.labelled(targets[0].preprocess, _BATCH),
            provider=provider, threads=threads,
            on_images=lambda count: listener("images", min(total, _BATCH * next(done)), total),
        )  # fmt: skip

    found = logits(images)
    if others is not None:
        return found, logits(others), {"description": others.description, "fingerprint": others.data_fingerprint}
    numbers = np.random.default_rng(seed).permutation(len(found))
    half = len(numbers) // 2
    about = {
        "description": f"half of {images.description}", "fingerprint": f"{images.data_fingerprint} half {seed}"
    }  # fmt: skip
    return found.some(np.sort(numbers[:half])), found.some(np.sort(numbers[half:])), about


def _write(package: Package, found: PackagedCascades, folder: Path, graphs: bool, threads: int | None) -> None:
    """A copy of a package with these cascades; links of files would be changed with the original."""
    for name in package.manifest.files:
        if name != CASCADES:
            shutil.copyfile(package.folder / name, folder / name)
    manifest = write_cascades(folder, package.manifest, found)
    for number, one in enumerate(found.cascades, start=1):
        if graphs and len(one.cascade.stages) == 2:
            path = write_one_graph(package, one.cascade, folder, f"cascade-{number}.onnx", threads)
            entry = FileEntry(size_bytes=path.stat().st_size, sha256=sha256_of(path))
            manifest = replace(manifest, files={**manifest.files, path.name: entry})
    write_manifest(folder, manifest)


def _timed(
    package: Package, found: Found, routes: Sequence[Route], device: Device, provider: str, threads: int | None,
    listener: Listener,
) -> tuple[dict[Route, Cascade], PathTimes]:  # fmt: skip
    """Cascades whose first stages are the static routes, and the times of all paths."""
    # a static route is the first stage of any cascade that starts with it
    statics = {
        route: Cascade(stages=(Stage(route=route, threshold=0.0), Stage(route=other)))
        for route, other in zip(routes, (*routes[1:], routes[0]), strict=True)
    }
    cascades = [one.cascade for one in found.cascades]
    times = time_paths(
        package, [*statics.values(), *cascades], device=device, provider=provider, threads=threads,
        on_burst=lambda done, total: listener("latencies", done, total),
    )  # fmt: skip
    return statics, times


def _static(route: Route, times: np.ndarray, test: RouteOutputs, costs: Costs) -> CascadeReport:
    right = int((test.logits[route].argmax(1) == test.labels).sum())
    macs = costs.routes[route]
    return CascadeReport(
        name=str(route), cascade=None, test=outcome_of(np.zeros(len(test), np.int64), right, 1), expected=(),
        latency=MixedLatency.of([times], [1.0]), mean_macs=macs, worst_macs=macs,
    )  # fmt: skip


def _report(one: FittedCascade, paths: Sequence[np.ndarray], test: RouteOutputs) -> CascadeReport:
    first = one.cascade.stages[0]
    logits = test.logits[first.route]
    return CascadeReport(
        name=str(one.cascade), cascade=one.cascade, test=outcome(one.cascade, test),
        expected=one.heldout.escalated_intervals, latency=MixedLatency.of(paths, one.heldout.shares),
        mean_macs=one.mean_cost, worst_macs=one.cost.worst,
        calibration_before=calibration_error(logits, test.labels),
        calibration_after=calibration_error(logits, test.labels, first.temperature),
    )  # fmt: skip
