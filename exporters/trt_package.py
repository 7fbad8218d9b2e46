"""A family package as TensorRT engines: one a route, beside what torch answers to the stored images.

An engine holds its weights, so that routes do not share them; `strip` leaves them out and keeps the
graphs and their one weights file in the package, from which an engine is filled when it is opened.
An engine that cannot run on this machine is marked `built, not run`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from klas_zoo.errors import VerificationError
from klas_zoo.exporters.contract import Artifact, OpenedEngine, Verdict
from klas_zoo.exporters.gpu_targets import ComputeCapability, present_capability
from klas_zoo.exporters.manifest import PackagedRoute
from klas_zoo.exporters.package import Package, write_manifest
from klas_zoo.exporters.package_verification import verify_routes
from klas_zoo.exporters.package_writing import entries
from klas_zoo.exporters.to_tensorrt import PlanSettings, build_plan
from klas_zoo.runtimes import VERIFIED, open_engine
from klas_zoo.runtimes.plans import read_record, record_path, write_record


def derive(package: Package, folder: Path, options: Mapping[str, Any]) -> list[Verdict]:
    """Fills `folder` with engines and their manifest.

    Args:
        options: `format` is the library; `capabilities`, `profiles`, `strip` and `timing_cache` are
            those of `PlanSettings`, and may be left out; `reference` is what engines are compared with,
            by default the images and logits that the package stores.

    Raises:
        ExportError: an engine cannot be built; names the stage that failed.
        VerificationError: no engine passed.
        UsageError: the library cannot build for that GPU.
        KlasZooError: the library is not installed.
    """
    given = {name: options[name] for name in ("capabilities", "profiles", "strip", "timing_cache") if name in options}
    manifest = package.manifest
    settings = PlanSettings(runtime=options["format"], precision=manifest.precision, **given)
    shutil.copyfile(package.folder / manifest.references, folder / manifest.references)
    if settings.strip:
        for name in (manifest.weights, *(one.file for one in package.routes)):
            shutil.copyfile(package.folder / str(name), folder / str(name))
    artifacts = [_engine(package, one, folder, settings) for one in package.routes]
    found = verify_routes(package, artifacts, open_plan, options.get("reference"))
    for verdict in found:
        _recorded(verdict)
    kept = tuple(
        replace(one, file=verdict.artifact.path.name, verification=verdict.verification)
        for one, verdict in zip(package.routes, found, strict=True)
        if verdict.status != "refused"
    )
    if not kept:
        raise VerificationError(f"No engine may be packaged; the first: {found[0].reason}")
    files = entries(folder)
    weights = manifest.weights if settings.strip else None
    write_manifest(folder, replace(manifest, format=settings.runtime, weights=weights, routes=kept, files=files))
    return found


def open_plan(artifact: Artifact) -> OpenedEngine:
    """An engine in the GPU's memory, to be verified with the batch size that each of its profiles is fastest at.

    Raises:
        CannotRunHere: it was built for another GPU or version than there is; says which.
        ExportError: it is damaged, or does not load.
    """
    graph = artifact.path.with_name(f"{artifact.route}.onnx")
    session = open_engine(artifact.path, runtime=artifact.format, options={"graph": str(graph)})
    profiles = read_record(artifact.path).profiles
    return OpenedEngine(outputs=session.run, batch_sizes=tuple({one.usual: None for one in profiles}))


def engine_name(route: str, capabilities: tuple[ComputeCapability, ...]) -> str:
    """`tiny.1-3+base.6-8.sm80.engine`; `sm80-sm89` where it is for both."""
    return f"{route}.{'-'.join(one.sm.lower() for one in capabilities)}.engine"


def _engine(package: Package, one: PackagedRoute, folder: Path, settings: PlanSettings) -> Artifact:
    here = present_capability()
    targets = settings.capabilities or ((here,) if here else ())
    engine = folder / engine_name(one.name, targets)
    build_plan(package.engine(one), engine, settings)
    return Artifact(
        route=one.name, format=settings.runtime, precision=package.manifest.precision, path=engine
    )


def _recorded(verdict: Verdict) -> None:
    """Writes beside an engine that it was verified; removes a refused one with its record."""
    engine = verdict.artifact.path
    if verdict.status == "verified":
        write_record(engine, replace(read_record(engine), state=VERIFIED))
    if verdict.status == "refused":
        engine.unlink()
        record_path(engine).unlink(missing_ok=True)
