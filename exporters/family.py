"""A family as one package of ONNX graphs that share their weights: written, verified, then named.

Everything happens in a folder beside the target, which is renamed when all of it was checked, so
that a package is complete or not there. Graphs are cut out of the supernet and torch computes its logits
first; engines are opened when the supernet is gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from klas_zoo.errors import VerificationError
from klas_zoo.exporters.contract import Artifact, Verdict
from klas_zoo.exporters.fp16_graphs import write_fp16
from klas_zoo.exporters.fp16_rounding import RoundedRun
from klas_zoo.exporters.manifest import (
    FamilyFacts,
    Manifest,
    PackagedRoute,
    StoredSupernet,
    StoredTensor,
    graph_metadata,
)
from klas_zoo.exporters.onnx_session import verify_onnx
from klas_zoo.exporters.opset import PORTABLE
from klas_zoo.exporters.package import Package, write_manifest
from klas_zoo.exporters.package_writing import entries, staging, write_references
from klas_zoo.exporters.packaged_cascades import PackagedCascades
from klas_zoo.exporters.precision import Convert, converter
from klas_zoo.exporters.reduced_precision import Half
from klas_zoo.exporters.reference_logits import Labelled, Listener, ReferenceLogits, reference_logits
from klas_zoo.exporters.stored_supernet import SUPERNET, moved, store_supernet
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.exporters.weights import WeightsFile, check_written, drop_unnamed, write_graph
from klas_zoo.memory import give_back, return_freed
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.routes import Route
from klas_zoo.runtimes import CPU_PROVIDER
from klas_zoo.supernet import Supernet

WEIGHTS, REFERENCES = "weights.bin", "references.safetensors"


@dataclass(frozen=True, kw_only=True)
class PackageSource:
    """What a package is made of.

    Attributes:
        routes: what is known of each route; without files and verifications.
        load: gives a supernet that has the routes it is given; called once, and freed as soon as torch
            is not needed any more.
        provenance: for the manifest: where all this comes from.
        data: for the manifest: description and fingerprint of the images behind the accuracies.
        cascades: those of a registered build in a precision, with the SHA-256 of its engines.
    """

    facts: FamilyFacts
    routes: tuple[PackagedRoute, ...]
    load: Callable[[Sequence[Route]], Supernet]
    provenance: Mapping[str, Any]
    data: Mapping[str, str] = field(default_factory=dict)
    cascades: Callable[[str], PackagedCascades] = lambda precision: PackagedCascades()


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A package that was written, and what became of every route.

    Attributes:
        reference, exporter: torch's logits and the translated supernet, for other precisions of the same routes.
    """

    package: Package
    verdicts: list[Verdict]
    reference: ReferenceLogits
    exporter: RouteExporter


@dataclass(frozen=True, kw_only=True)
class VerificationImages:
    """Real images: `test` to compare engines with torch on, `calibration` for int8 to find its ranges on."""

    test: Labelled
    calibration: Labelled


Profile = Callable[[Path], Iterable[LatencyRecord]]
"""Times an engine, once for each batch size."""


def export_family(
    source: PackageSource,
    out: Path,
    *,
    precision: str,
    images: VerificationImages,
    provider: str = CPU_PROVIDER,
    threads: int | None = None,
    torch_device: str = "cpu",
    reference: ReferenceLogits | None = None,
    exporter: RouteExporter | None = None,
    supernet_routes: Sequence[PackagedRoute] | None = None,
    profile: Profile | None = None,
    opset: int = PORTABLE,
    weight_bits: int = 7,
    listener: Listener = lambda stage, route: None,
) -> Exported:
    """Writes a package of ONNX graphs.

    A route whose engine is too far from torch for its precision is left out.

    Args:
        out: a folder that does not exist yet, or is empty.
        precision: fp32, fp16, bf16 or int8.
        torch_device: that torch computes its reference logits on.
        reference: of the same routes and images, where they were computed before.
        exporter: of the same supernet, where it was translated before.
        supernet_routes: store the supernet too, with these routes; fp32 only.
        weight_bits: of int8, see `converter`.
        opset: the newest whose operators the graphs may use; an exporter has its own.
        profile: times an engine. Default: the latencies of the source's routes, which are those of fp32.

    Raises:
        ExportError: names the stage that failed.
        VerificationError: no route passed.
        PackageError: `out` is taken.
        OSError: a file cannot be written.
    """
    with staging(out) as folder:
        reference, exporter, tensors, rounded = _write(
            source, folder, precision, images, reference, exporter, torch_device, supernet_routes is not None, threads,
            opset, weight_bits, listener,
        )  # fmt: skip
        give_back()  # all weights, before onnxruntime maps those of an engine
        artifacts = [_artifact(one, precision, folder) for one in source.routes]
        for artifact in artifacts:
            check_written(artifact.path)
        verdicts = verify_onnx(
            artifacts, reference, source.facts.weights, provider=provider, threads=threads, rounded=rounded,
            listener=listener,
        )  # fmt: skip
        routes = _kept(source.routes, verdicts)
        if len(routes) < len(verdicts) or any(one.fp32_residual for one in rounded.values()):
            places = {one.offset: 4 * math.prod(one.shape) for one in tensors.values()}
            offsets = drop_unnamed(folder / WEIGHTS, [folder / str(one.file) for one in routes], places)
            tensors = moved(tensors, offsets)
        kept = _timed(routes, folder, precision, profile, listener)
        write_references(folder / REFERENCES, reference, [one.name for one in kept])
        stored = None
        if supernet_routes is not None:
            stored = StoredSupernet(file=SUPERNET, tensors=tensors, routes=tuple(supernet_routes))
        write_manifest(
            folder,
            Manifest(
                format="onnx", precision=precision, family=source.facts, weights=WEIGHTS, references=REFERENCES,
                routes=kept, files=entries(folder), provenance=source.provenance, data=source.data, supernet=stored,
            ),
        )  # fmt: skip
        Package.open(folder)
    package = Package.open(out, content=False)
    return Exported(package=package, verdicts=verdicts, reference=reference, exporter=exporter)


def file_of(route: PackagedRoute) -> str:
    """The name of a route's graph."""
    return f"{route.name}.onnx"


def _write(
    source: PackageSource, folder: Path, precision: str, images: VerificationImages,
    reference: ReferenceLogits | None, exporter: RouteExporter | None, torch_device: str, with_supernet: bool,
    threads: int | None, opset: int, weight_bits: int, listener: Listener,
) -> tuple[ReferenceLogits, RouteExporter, dict[str, StoredTensor], dict[str, RoundedRun]]:  # fmt: skip
    """The reference logits; graphs and weights; where the supernet's tensors are among them; what fp16 does."""
    routes = [one.route for one in source.routes]
    supernet = source.load(routes).eval()
    give_back()
    if reference is None:
        reference = reference_logits(
            supernet, routes, images.test, device=torch_device, folder=folder.parent, listener=listener
        )
        return_freed()
    facts = source.facts
    exporter = exporter or RouteExporter(supernet, facts.input_shape, routes=routes, opset=opset)
    convert = converter(precision, images.calibration, weight_bits)
    listener("translate", "")
    rounded: dict[str, RoundedRun] = {}
    with WeightsFile(folder / WEIGHTS) as weights:
        for one in source.routes:
            artifact = _artifact(one, precision, folder)
            about = graph_metadata(facts, one.name, precision)
            about |= {"weight_bits": str(weight_bits)} if precision == "int8" else {}

            def write(convert: Convert, route: Route = one.route, about: dict[str, str] = about) -> None:
                write_graph(exporter.model(route, convert), folder / f"{route}.onnx", weights, about)
                weights.flush()

            if isinstance(convert, Half) and precision == "fp16":
                rounded[one.name] = write_fp16(artifact, write, convert, reference, facts.weights, threads=threads)
            else:
                write(convert)
            listener("export", one.name)
        tensors = store_supernet(supernet, weights, folder) if with_supernet else {}
    return reference, exporter, tensors, rounded


def _artifact(one: PackagedRoute, precision: str, folder: Path) -> Artifact:
    return Artifact(route=one.name, format="onnx", precision=precision, path=folder / file_of(one))


def _kept(routes: Iterable[PackagedRoute], verdicts: list[Verdict]) -> tuple[PackagedRoute, ...]:
    """The routes that may be in the package; the graphs of the others are removed."""
    kept = []
    for one, verdict in zip(routes, verdicts, strict=True):
        if verdict.status == "refused":
            verdict.artifact.path.unlink()
        else:
            kept.append(replace(one, file=verdict.artifact.path.name, verification=verdict.verification))
    if not kept:
        first = verdicts[0]
        raise VerificationError(f"No route may be packaged; the first, {first.artifact.route}: {first.reason}")
    return tuple(kept)


def _timed(
    routes: Sequence[PackagedRoute], folder: Path, precision: str, profile: Profile | None, listener: Listener
) -> tuple[PackagedRoute, ...]:
    if profile is None:
        return tuple(one if precision == "fp32" else replace(one, latencies=()) for one in routes)
    timed = []
    for one in routes:
        found: tuple[LatencyRecord, ...] = ()
        if one.verification is not None and one.file is not None:
            found = tuple(replace(record, precision=precision) for record in profile(folder / one.file))
        timed.append(replace(one, latencies=found))
        listener("time", one.name)
    return tuple(timed)
