"""Packages of any format opened and verified again, wherever they have been in between."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from klas_zoo.errors import PackageError, VerificationError
from klas_zoo.exporters.contract import Artifact, OpenEngine, Verdict
from klas_zoo.exporters.graphs import check_written
from klas_zoo.exporters.hub_cache import without_links
from klas_zoo.exporters.manifest import GRAPH_FORMATS, MANIFEST
from klas_zoo.exporters.onnx_session import open_onnx
from klas_zoo.exporters.package import Package, read_table
from klas_zoo.exporters.package_verification import verify_routes
from klas_zoo.exporters.triton_repository import check_repository, is_repository
from klas_zoo.extras import explained
from klas_zoo.runtimes import CPU_PROVIDER, VERIFIED
from klas_zoo.runtimes.plans import TENSORRT_RUNTIMES


@dataclass(frozen=True, kw_only=True)
class PackageReport:
    """What was found of a package.

    Attributes:
        verdicts: one of every route.
        unconfirmed: routes that the package records as verified, and that cannot be run here.
        extra_files: what lies in its folder and is not part of it.
    """

    verdicts: tuple[Verdict, ...]
    unconfirmed: tuple[str, ...]
    extra_files: tuple[str, ...]

    @property
    def refused(self) -> tuple[Verdict, ...]:
        return tuple(one for one in self.verdicts if one.status == "refused")

    def summary(self) -> str:
        """A sentence: how many routes are verified, not runnable here, and failed."""
        verified = sum(one.status == VERIFIED for one in self.verdicts)
        left = len(self.verdicts) - verified - len(self.refused)
        return f"{verified} verified, {left} not runnable here, {len(self.refused)} failed."

    def check(self, folder: Path) -> None:
        """
        Raises:
            VerificationError: a route failed, or is recorded as verified and cannot be verified here.
        """
        if self.refused:
            first = self.refused[0]
            raise VerificationError(f"{folder}: {first.artifact.route} failed to verify. {first.reason}")
        if self.unconfirmed:
            names = ", ".join(self.unconfirmed[:3]) + (" …" if len(self.unconfirmed) > 3 else "")
            reason = next(one.reason for one in self.verdicts if one.artifact.route == self.unconfirmed[0])
            raise VerificationError(
                f"{folder}: {names} cannot be verified on this machine, although the package records "
                f"{'it' if len(self.unconfirmed) == 1 else 'them'} as verified: {reason.rstrip('.')}. "
                "Run klas-zoo verify where these engines run."
            )


def verify_package(folder: Path, *, provider: str = CPU_PROVIDER, threads: int | None = None) -> list[Verdict]:
    """The verdicts of `report`."""
    return list(report(folder, provider=provider, threads=threads).verdicts)


def report(
    folder: Path, *, provider: str = CPU_PROVIDER, threads: int | None = None, allow_edited_config: bool = False
) -> PackageReport:
    """Checks every hash, passes every graph through onnx's checker, and runs every route on the stored images.

    The supernet of a package for torch computes each of its routes. An engine that this machine cannot
    run is `built, not run`. Of a repository for Triton, everything that is served is compared with what was exported,
    then the package in it is checked.

    Args:
        allow_edited_config: of a repository, take every config.pbtxt as it is.

    Raises:
        PackageError: a file is not what it should be; the message names it.
        ExportError: a graph does not pass the checker.
    """
    folder = without_links(folder)
    if is_repository(folder):
        check_repository(folder, allow_edited_config=allow_edited_config)
        folder = folder / "family"
    package = open_package(folder)
    manifest = package.manifest
    open_engine = _opener(package, provider, threads)
    artifacts = []
    for one in package.routes:
        path = package.weights if manifest.format == "torch" else package.engine(one)
        artifacts.append(
            Artifact(route=one.name, format=manifest.format, precision=manifest.precision, path=path)
        )
        if manifest.format in GRAPH_FORMATS:
            check_written(path)
    verdicts = verify_routes(package, artifacts, open_engine)
    recorded = {one.name for one in package.routes if one.status == VERIFIED}
    unproven = [one.artifact.route for one in verdicts if one.status not in (VERIFIED, "refused")]
    return PackageReport(
        verdicts=tuple(verdicts),
        unconfirmed=tuple(name for name in unproven if name in recorded),
        extra_files=tuple(_extra_files(folder, package)),
    )


def _extra_files(folder: Path, package: Package) -> list[str]:
    """In the folder of the package, and in the one of its files where that is another."""
    found = package.extra_files()
    if folder.resolve() != package.folder.resolve():  # a model package
        place = package.folder.relative_to(folder)
        inside = {MANIFEST, *map(str, (place, *place.parents))}
        others = (path.relative_to(folder) for path in folder.rglob("*"))
        found = [str(place / name) for name in found]
        found += [str(path) for path in others if place not in path.parents and str(path) not in inside]
    return sorted(found)


def open_package(folder: Path) -> Package:
    """A package of any format, its files checked.

    Raises:
        PackageError: see `Package.open`.
    """
    folder = without_links(folder)
    table, digest = read_table(folder)
    if isinstance(table, dict) and "components" in table:
        with explained("A package for onnxruntime's ModelPackage"):
            from klas_zoo.exporters.model_package import read_model_package

        return read_model_package(folder, table, digest)
    return Package.open(folder)


def _opener(package: Package, provider: str, threads: int | None) -> OpenEngine:
    """How engines of a package are opened."""
    form = package.manifest.format
    if form in GRAPH_FORMATS:
        return partial(open_onnx, provider=provider, threads=threads)
    if form == "torch":
        with explained("A package of torch routes"):
            from klas_zoo.exporters.torch_package import opener

        return opener(package)
    if form in TENSORRT_RUNTIMES:
        from klas_zoo.exporters.trt_package import open_plan

        return open_plan
    raise PackageError(f"{package.folder} is a package of format {form}, which this klas-zoo does not know.")
