"""A package checked again, wherever it has been in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from klas_zoo.errors import PackageError
from klas_zoo.exporters.contract import Answer, Artifact, Limits, Verdict, judge, of_references
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.plans import RUNTIMES
from klas_zoo.exporters.precision import limits_for
from klas_zoo.exporters.verify import open_artifact
from klas_zoo.exporters.weights import check_written
from klas_zoo.profiles.devices import CPU_PROVIDER


def verify_package(folder: Path, *, provider: str = CPU_PROVIDER, threads: int | None = None) -> list[Verdict]:
    """Checks every hash, passes every graph through onnx's checker, and runs every route on the stored images.

    Engines that this machine cannot run are judged `built, not run`.

    Raises:
        PackageError: a file is not what it should be; the message names it.
        ExportError: a graph does not pass the checker, or does not run.
    """
    package = Package.open(folder)
    manifest = package.manifest
    open_engine: Callable[[Artifact], Answer]
    if manifest.format == "onnx":
        open_engine = partial(open_artifact, provider=provider, threads=threads)
    elif manifest.format in RUNTIMES:
        from klas_zoo.exporters.trt_package import open_plan as open_engine
    else:
        raise PackageError(f"{folder} is a package of format {manifest.format}, which is not verified this way.")
    references = package.references()
    verdicts = []
    for one in package.routes:
        artifact = Artifact(
            route=one.name, format=manifest.format, precision=manifest.precision, path=package.engine(one)
        )
        if manifest.format == "onnx":
            check_written(artifact.path)
        known = one.verification
        limits = limits_for(manifest.precision, manifest.family.weights)
        if known is not None:
            limits = Limits(
                tolerance=known.tolerance, min_agreement=known.min_agreement, min_cosine=known.min_cosine
            )
        verdicts.append(judge(artifact, open_engine, of_references(references, one.name), limits))
    return verdicts
