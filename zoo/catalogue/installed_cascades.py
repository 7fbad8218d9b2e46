"""The cascades that a package brings to a target machine: verified and timed there. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from klas_zoo.cascades.fitting import outcome
from klas_zoo.catalogue.evaluating import TestImages
from klas_zoo.catalogue.targets import of_package
from klas_zoo.errors import KlasZooError
from klas_zoo.exporters.cascade_fitting import outputs_of, time_paths, verify_cascade
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import PackagedCascade, read_cascades
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.latency import provider_on
from klas_zoo.registry.cascades import new_cascade
from klas_zoo.registry.records import NewEngine

_BATCH = 64


def installed_cascades(
    package: Package, *, device: Device, threads: int | None, images: TestImages | None,
    listener: Callable[[str], None],
) -> list[NewEngine | str]:  # fmt: skip
    """Each cascade of a package as an engine to register, or why it is none.

    Thresholds and the shares of images stay those of the images they were fitted on; latencies are measured here.

    Args:
        images: measure top-1 on these instead of taking that of the package.

    Raises:
        DamagedPackage: the package's file of cascades, or its references, cannot be read.
    """
    carried = read_cascades(package)
    if not carried.cascades:
        return []
    listener(f"verifying and timing {len(carried.cascades)} cascades in onnxruntime")
    how: dict[str, Any] = {"provider": provider_on("onnxruntime", device), "threads": threads}
    verified: list[PackagedCascade] = []
    found: list[NewEngine | str] = []
    for one in carried.cascades:
        try:
            verified.append(replace(one, verification=verify_cascade(package, one.cascade, **how)))
        except KlasZooError as error:
            found.append(f"{one.name}: {error}")
    if not verified:
        return found
    times = time_paths(package, [one.cascade for one in verified], device=device, **how)
    timed = [
        replace(one, latencies=(times.latency(one.cascade, one.facts.heldout.shares, device.name),)) for one in verified
    ]
    accuracy: dict[str, Any] = {
        "dataset": carried.data.get("description", "unknown images"),
        "data_fingerprint": carried.data.get("fingerprint", ""),
        "accuracy_source": "" if carried.data.get("fingerprint") else "its package",
    }
    if images is not None:
        timed = _evaluated(package, timed, images, how)
        accuracy = {"dataset": images.description, "data_fingerprint": images.data_fingerprint}
    return found + [new_cascade(one, package.manifest, package.folder, device=device.name, **accuracy) for one in timed]


def _evaluated(
    package: Package, cascades: list[PackagedCascade], images: TestImages, how: dict[str, Any]
) -> list[PackagedCascade]:
    """With what becomes of these images."""
    routes = list(dict.fromkeys(str(route) for one in cascades for route in one.cascade.routes))
    (target,) = of_package(package.folder, routes[:1])
    seen = outputs_of(package, routes, lambda: images.labelled(target.preprocess, _BATCH), **how)
    return [replace(one, facts=replace(one.facts, test=outcome(one.cascade, seen))) for one in cascades]
