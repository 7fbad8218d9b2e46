"""The packages of a build: one for each precision, of all routes that are on the frontier and of the anchors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from torch import Tensor

from klas_zoo.building.context import BuildContext
from klas_zoo.building.engines import EngineResult, RouteResult
from klas_zoo.data.loading import Split, batches
from klas_zoo.errors import KlasZooError, VerificationError
from klas_zoo.exporters.contract import Artifact, Verdict
from klas_zoo.exporters.family import Exported, PackageSource, ReferenceLogits, VerificationImages, export_family
from klas_zoo.exporters.formats import DERIVED
from klas_zoo.exporters.gpu_targets import ComputeCapability
from klas_zoo.exporters.limits import images_needed, limits_for
from klas_zoo.exporters.manifest import FamilyFacts, PackagedRoute
from klas_zoo.exporters.onnx_session import verify_onnx
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.exporters.weights import deployed_bytes
from klas_zoo.profiles.catalog import find_spec
from klas_zoo.profiles.latency import provider_on
from klas_zoo.registry.records import TO_COMPILE
from klas_zoo.routes import Route
from klas_zoo.runtimes import runtime_named
from klas_zoo.supernet import Supernet
from klas_zoo.versions import versions

_CALIBRATION_IMAGES = 200
_LEAST_IMAGES = 1_000
"""To verify with, where there are so many: what an engine loses of top-1 is measured on them too."""
Made = dict[Route, tuple[EngineResult, ...]]


def packaged_route(result: RouteResult, images: int) -> PackagedRoute:
    """A route as a manifest lists it, before it has an engine."""
    return PackagedRoute(
        route=result.route, file=None, macs=result.cost.macs, parameters=result.cost.parameters, top1=result.top1,
        images=images, on_frontier=result.on_frontier, verification=None, latencies=(),
    )  # fmt: skip


def export_packages(
    context: BuildContext,
    supernet: Supernet,
    results: Iterable[RouteResult],
    folder: Path,
    *,
    on_engine: Callable[[str], None],
) -> Made:
    """Writes a package for each precision into a folder, named by it; returns the engines of every route.

    torch computes its reference logits once, for all precisions and runtimes.

    Raises:
        ExportError: the family cannot be exported, or no route passed in any precision.
        UsageError: a runtime does not run on the device.
    """
    listed = [packaged_route(one, len(context.data.test)) for one in results]
    wanted = {one.route for one in results if one.wanted}
    source = package_source(context, supernet, [one for one in listed if one.route in wanted])
    images = _images(context)
    made: Made = {}
    reference: ReferenceLogits | None = None
    exporter: RouteExporter | None = None
    refusal: VerificationError | None = None
    for precision in context.precisions:
        try:
            exported = export_family(
                source, folder / precision, precision=precision, images=images, provider=context.device.provider,
                threads=context.settings.threads, reference=reference, exporter=exporter,
                torch_device=context.device.torch_device, supernet_routes=listed if precision == "fp32" else None,
                opset=context.opset, weight_bits=context.weight_bits,
                listener=lambda stage, route: on_engine(route) if stage == "verify" else None,
            )  # fmt: skip
        except VerificationError as error:
            refusal = refusal or error
            continue
        reference, exporter = exported.reference, exported.exporter
        for runtime in context.runtimes:
            for verdict in _verdicts(context, runtime, exported, folder):
                engine = _engine(runtime, precision, verdict, folder)
                route = next(one.route for one in listed if one.name == verdict.artifact.route)
                made[route] = (*made.get(route, ()), engine)
    if not any(engine.exists for engines in made.values() for engine in engines):
        raise refusal or VerificationError("No engine was exported.")
    return made


def _verdicts(context: BuildContext, runtime: str, exported: Exported, folder: Path) -> list[Verdict]:
    """What became of every route of a package in a runtime."""
    if runtime == "onnxruntime":
        return exported.verdicts
    package = exported.package
    if runtime_named(runtime).compiles:
        return _compiled(context, runtime, exported, folder)
    provider = provider_on(runtime, context.device)
    artifacts = [
        Artifact(route=one.name, format="onnx", precision=package.manifest.precision, path=package.engine(one))
        for one in package.routes
    ]
    return verify_onnx(
        artifacts, exported.reference, context.family.weights, provider=provider, runtime=runtime,
        threads=context.settings.threads,
    )  # fmt: skip


def _compiled(context: BuildContext, runtime: str, exported: Exported, folder: Path) -> list[Verdict]:
    """Engines that are compiled for the device's GPU, here where that can be done, else on the target."""
    package = exported.package
    precision = package.manifest.precision
    form = DERIVED[runtime]
    # an fp32 engine beside one of fp16 would be compiled for nothing
    if precision not in form.precisions or (precision == "fp32" and "fp16" in context.precisions):
        return []
    options: dict[str, object] = {"format": runtime, "reference": exported.reference}
    spec = find_spec(context.device.name)
    if spec is not None and spec.compute_capability:
        options["capabilities"] = (ComputeCapability.parse(spec.compute_capability),)
    place = folder / f"{precision}-{runtime}"
    try:
        place.mkdir()
        return form.derive()(package, place, options)
    except KlasZooError as error:  # not installed, or not for this GPU on this machine
        shutil.rmtree(place)
        return [
            Verdict(
                artifact=Artifact(route=one.name, format="onnx", precision=precision, path=package.engine(one)),
                status=TO_COMPILE, verification=None, reason=str(error),
            )
            for one in package.routes
        ]  # fmt: skip


def _engine(runtime: str, precision: str, verdict: Verdict, folder: Path) -> EngineResult:
    artifact = verdict.artifact
    path = artifact.path if artifact.path.is_file() else folder / precision / artifact.path.name
    size = 0
    if path.is_file():
        size = deployed_bytes(path) if artifact.format == "onnx" else path.stat().st_size
    return EngineResult(
        format=artifact.format, runtime=runtime, precision=precision, package=path.parent.name, file=path.name,
        size_bytes=size, status=verdict.status, reason=verdict.reason, verification=verdict.verification,
    )  # fmt: skip


def package_source(context: BuildContext, supernet: Supernet, routes: Iterable[PackagedRoute]) -> PackageSource:
    """A build's family and tuned supernet, as packages are made of them."""
    family = context.family
    facts = FamilyFacts(
        name=family.name, input_shape=family.input_shape, num_classes=family.num_classes, weights=family.weights,
        data_config=family.data_config,
        anchors=tuple(family.described(name) for name in family.chains), classes=context.data.classes,
    )  # fmt: skip
    return PackageSource(
        facts=facts, routes=tuple(routes), load=lambda wanted: supernet.cpu(), provenance=provenance(context),
        data={"description": context.data.description, "fingerprint": context.data.test_fingerprint},
    )  # fmt: skip


def provenance(context: BuildContext) -> Mapping[str, object]:
    """What a package says about its making; the build's record has the rest."""
    return {"hardware": context.device.hardware, "device": context.device.name, "versions": versions()}


def _images(context: BuildContext) -> VerificationImages:
    """As many test images as the limits of the precisions need, and held-out ones for the ranges of int8."""
    weights = context.family.weights
    needed = max(images_needed(limits_for(precision, weights)) for precision in context.precisions)
    needed = max(needed, _LEAST_IMAGES)

    def stream(split: Split) -> Callable[[], Iterable[tuple[Tensor, Tensor | None]]]:
        return lambda: batches(split, context.settings.batch, workers=context.settings.workers)

    return VerificationImages(
        test=stream(context.data.test.spread(needed)),
        calibration=stream(context.data.heldout.spread(_CALIBRATION_IMAGES)),
    )
