"""The cascades of a registered build in a package that is exported from it anew. Needs no torch.

Thresholds belong to the function of a route, not to its file: graphs that are written again, of another opset for
example, compute the same function up to rounding, and each cascade is compared with torch's answers and exits first.
Engines in int8 are other functions where they were calibrated on other images, so there the files have to be equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from klas_zoo.errors import KlasZooError
from klas_zoo.exporters.cascade_fitting import time_paths, verify_cascade, weights_of
from klas_zoo.exporters.contract import Artifact, Verdict
from klas_zoo.exporters.package import Package, write_manifest
from klas_zoo.exporters.packaged_cascades import (
    CASCADES,
    PackagedCascade,
    PackagedCascades,
    engines_of,
    write_cascades,
)
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.runtimes import CPU_PROVIDER, VERIFIED


def carry_cascades(
    package: Package, given: PackagedCascades, *, threads: int | None, timed: bool = False
) -> tuple[Package, list[Verdict]]:
    """Writes cascades into a package of ONNX graphs, where it has all of their routes.

    Args:
        given: cascades of another package of the same routes in the same precision, with the SHA-256 of its engines.
        timed: time them on this machine instead of keeping their latencies.

    Returns:
        The package with those that passed, and what became of each.

    Raises:
        DamagedPackage: the references of the package cannot be read.
        ExportError: an engine does not run here.
        OSError: a file cannot be written.
    """
    known = {one.name for one in package.routes}
    chosen = [one for one in given.cascades if {str(route) for route in one.cascade.routes} <= known]
    verdicts = [_verdict(package, one, given, threads) for one in chosen]
    kept = list(_kept(package, chosen, verdicts))
    if timed and kept:
        times = time_paths(
            package, [one.cascade for one in kept], device=resolve_device("cpu"), provider=CPU_PROVIDER, threads=threads
        )
        kept = [
            replace(one, latencies=(times.latency(one.cascade, one.facts.heldout.shares, "cpu"),)) for one in kept
        ]
    if not kept:
        return package, verdicts
    carried = replace(given, cascades=tuple(kept))
    write_manifest(package.folder, write_cascades(package.folder, package.manifest, carried))
    return Package.open(package.folder, content=False), verdicts


def _verdict(package: Package, one: PackagedCascade, given: PackagedCascades, threads: int | None) -> Verdict:
    precision = package.manifest.precision
    artifact = Artifact(route=one.name, format="onnx", precision=precision, path=package.folder / CASCADES)
    own = engines_of(package.manifest)
    for route in map(str, one.cascade.routes):
        if precision == "int8" and own[route] != given.engines.get(route):
            reason = f"Its thresholds were fitted on another int8 engine of {route}: fit them with klas-zoo cascades."
            return Verdict(artifact=artifact, status="refused", verification=None, reason=reason)
    try:
        found = verify_cascade(package, one.cascade, provider=CPU_PROVIDER, threads=threads)
    except KlasZooError as error:
        return Verdict(artifact=artifact, status="refused", verification=None, reason=str(error))
    return Verdict(artifact=artifact, status=VERIFIED, verification=found)


def _kept(package: Package, chosen: list[PackagedCascade], verdicts: list[Verdict]) -> Iterator[PackagedCascade]:
    for one, verdict in zip(chosen, verdicts, strict=True):
        if verdict.verification is not None:
            parameters, size = weights_of(package, one.cascade)
            yield replace(one, verification=verdict.verification, parameters=parameters, size_bytes=size)
