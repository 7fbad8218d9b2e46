"""A package checked again, wherever it has been in between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from klas_zoo.errors import PackageError
from klas_zoo.exporters.contract import Answer, Artifact, Limits, Verdict, judge, of_references
from klas_zoo.exporters.manifest import GRAPH_FORMATS
from klas_zoo.exporters.model_package import is_model_package, read_model_package
from klas_zoo.exporters.package import Package, read_table
from klas_zoo.exporters.plans import RUNTIMES
from klas_zoo.exporters.precision import limits_for
from klas_zoo.exporters.verify import open_artifact
from klas_zoo.exporters.weights import check_written
from klas_zoo.profiles.devices import CPU_PROVIDER


def verify_package(folder: Path, *, provider: str = CPU_PROVIDER, threads: int | None = None) -> list[Verdict]:
    """Checks every hash, passes every graph through onnx's checker, and runs every route on the stored images.

    The supernet of a package for torch answers for each of its routes. What this machine cannot run is judged
    `built, not run`.

    Raises:
        PackageError: a file is not what it should be; the message names it.
        ExportError: a graph does not pass the checker, or does not run.
    """
    package = open_package(folder)
    manifest = package.manifest
    open_engine = _opener(package, provider, threads)
    references = package.references()
    verdicts = []
    for one in package.routes:
        path = package.weights if manifest.format == "torch" else package.engine(one)
        artifact = Artifact(route=one.name, format=manifest.format, precision=manifest.precision, path=path)
        if manifest.format in GRAPH_FORMATS:
            check_written(artifact.path)
        known = one.verification
        limits = limits_for(manifest.precision, manifest.family.weights)
        if known is not None:
            limits = Limits(
                tolerance=known.tolerance, min_agreement=known.min_agreement, min_cosine=known.min_cosine
            )
        verdicts.append(judge(artifact, open_engine, of_references(references, one.name), limits))
    return verdicts


def open_package(folder: Path) -> Package:
    """A package of any format, its files checked.

    Raises:
        PackageError: see `Package.open`.
    """
    table = read_table(folder)
    if is_model_package(table):
        return read_model_package(folder, table)
    return Package.open(folder)


def _opener(package: Package, provider: str, threads: int | None) -> Callable[[Artifact], Answer]:
    """How engines of a package are opened."""
    form = package.manifest.format
    if form in GRAPH_FORMATS:
        return partial(open_artifact, provider=provider, threads=threads)
    if form == "torch":
        from klas_zoo.exporters.torch_package import opener

        return opener(package)
    if form in RUNTIMES:
        from klas_zoo.exporters.trt_package import open_plan

        return open_plan
    raise PackageError(f"{package.folder} is a package of format {form}, which this klas-zoo does not know.")
