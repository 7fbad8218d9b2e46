"""Engines that are named on the command line: of a package, a file, or the registry; and how each is opened."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from klas_zoo.cascades.definition import Cascade
from klas_zoo.errors import PackageError, UnknownName, UsageError
from klas_zoo.exporters.cascade_session import CascadeSession
from klas_zoo.exporters.contract import Artifact, OpenedEngine
from klas_zoo.exporters.manifest import GRAPH_FORMATS, MANIFEST
from klas_zoo.exporters.onnx_files import stated_preprocessing
from klas_zoo.exporters.onnx_session import allowed_sizes
from klas_zoo.exporters.package import Package
from klas_zoo.extras import explained
from klas_zoo.preprocess import Preprocess
from klas_zoo.registry import Registry
from klas_zoo.registry.loaded import prepared
from klas_zoo.registry.records import VERIFIED, EngineRecord
from klas_zoo.registry.store import check_file
from klas_zoo.runtimes import CPU_PROVIDER, open_engine

_SUFFIXES = {".onnx": "onnx", ".engine": "tensorrt", ".plan": "tensorrt"}


@dataclass(frozen=True, kw_only=True)
class Target:
    """An engine that can be run here.

    Attributes:
        name: for messages.
        format: `onnx`, `tensorrt`, `tensorrt-rtx`, or `torch` for a route of a torch package.
        provider: of the runtime; None: the one it uses by default.
        package: that holds it; None for a file on its own.
        cascade: of the routes of the package whose file `path` is; None for an engine of one route.
    """

    name: str
    family: str
    route: str
    path: Path
    format: str
    runtime: str
    precision: str
    num_classes: int
    preprocess: Preprocess
    provider: str | None = None
    threads: int | None = None
    package: Package | None = None
    cascade: Cascade | None = None

    @contextmanager
    def opened(self) -> Iterator[OpenedEngine]:
        """The engine, closed at the end.

        Raises:
            CannotRunHere: it was built for hardware or a version that is not here.
            ExportError: the runtime cannot load it.
            KlasZooError: the runtime is not installed, or does not start.
        """
        if self.cascade is not None:
            with CascadeSession(
                self.cascade, self.path.parent, provider=self.provider or CPU_PROVIDER, threads=self.threads
            ) as cascade:
                yield OpenedEngine(outputs=cascade.run)
            return
        if self.format == "torch":
            with explained("A package of torch routes"):
                from klas_zoo.exporters.torch_package import opener

            assert self.package is not None
            yield opener(self.package)(
                Artifact(route=self.route, format=self.format, precision=self.precision, path=self.path)
            )
            return
        with open_engine(self.path, runtime=self.runtime, provider=self.provider, threads=self.threads) as session:
            sizes = allowed_sizes(session.smallest_batch, session.largest_batch, usual=64)
            yield OpenedEngine(outputs=session.run, batch_sizes=sizes)


def targets_of(
    target: str | Path,
    *,
    registry: str | Path | None = None,
    family: str | None = None,
    device: str | None = None,
    routes: Sequence[str] = (),
    runtime: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    preprocess: Preprocess | None = None,
) -> list[Target]:
    """The engines that a user names; see `klas_zoo.catalogue.evaluating.evaluate`.

    Raises:
        UsageError: there are none of that name, or it is not known how their images are prepared.
        PackageError, RegistryError: the package or the registry cannot be read.
    """
    path = Path(target)
    if path.is_dir():
        found = list(of_package(path, routes))
    elif path.is_file():
        found = [_of_file(path, preprocess)]
    else:
        found = _registered(str(target), registry, family, device)
    wanted = (("runtime", runtime), ("provider", provider))
    set_here: dict[str, Any] = {name: value for name, value in wanted if value is not None}
    return [replace(one, threads=threads or one.threads, **set_here) for one in found]


def of_package(folder: Path, routes: Sequence[str] = ()) -> Iterator[Target]:
    """Every engine of a package, or those of some routes; the package's files are checked.

    Raises:
        UnknownName: it has no such route.
        PackageError: it cannot be read.
    """
    from klas_zoo.exporters.checking import open_package

    package = open_package(folder)
    known = {one.name for one in package.routes}
    for name in routes:
        if name not in known:
            raise UnknownName("route", name, known)
    manifest = package.manifest
    for one in package.routes:
        if routes and one.name not in routes:
            continue
        if one.file is None and manifest.format != "torch":
            raise PackageError(f"{folder} has no engine for {one.name}.")
        path = package.weights if one.file is None else package.engine(one)
        yield Target(
            name=f"{one.name} of {folder}", family=manifest.family.name, route=one.name, path=path,
            format="onnx" if manifest.format in GRAPH_FORMATS else manifest.format,
            runtime="onnxruntime" if manifest.format in GRAPH_FORMATS else manifest.format,
            precision=manifest.precision, num_classes=manifest.family.num_classes,
            preprocess=prepared(manifest.family.data_config, manifest.family.input_shape, str(folder)),
            package=package,
        )  # fmt: skip


def _of_file(path: Path, preprocess: Preprocess | None) -> Target:
    """An engine's file: of the package whose folder it lies in, or on its own."""
    if (path.parent / MANIFEST).is_file():
        for one in of_package(path.parent):
            if one.path.name == path.name and preprocess is None:
                return one
    form = _SUFFIXES.get(path.suffix.lower())
    if form == "onnx" and preprocess is None and (stated := stated_preprocessing(path)):
        preprocess = prepared(stated, tuple(stated.get("input_size", ())), str(path))
    if form is None:
        raise UsageError(f"{path} is no engine: its name ends in none of {', '.join(_SUFFIXES)}.")
    runtime = "onnxruntime" if form == "onnx" else form
    with open_engine(path, runtime=runtime) as session:
        shape = session.input_shape
        if preprocess is None:
            raise UsageError(
                f"{path} is not part of a package, so that it is not known how its images are prepared: pass --mean "
                "and --std (and --interpolation, --crop-pct), or evaluate the package."
            )
        size = tuple(one or two for one, two in zip(shape, preprocess.input_size, strict=True))
        sized = replace(preprocess, input_size=cast(tuple[int, int, int], size))
        zeros = np.zeros((max(1, session.smallest_batch), *size), np.float32)
        classes = session.run(zeros).shape[-1]
    return Target(
        name=str(path), family="", route=path.stem, path=path, format=form, runtime=runtime, precision="unknown",
        num_classes=classes, preprocess=sized,
    )  # fmt: skip


def _registered(
    route: str, registry: str | Path | None, family: str | None, device: str | None
) -> list[Target]:
    engines = Registry.open(registry, create=False).engines(family, device)
    found = [one for one in engines if str(one.route) == route and one.status == VERIFIED]
    if not found:
        known = {str(one.route) for one in engines if one.status == VERIFIED}
        raise UnknownName("route", route, known, "A target is a package's folder, a file, or a registered route.")
    return [_of_record(one) for one in found]


def _of_record(engine: EngineRecord) -> Target:
    check_file(engine, content=True)
    name = f"{engine.route} of {engine.family} ({engine.runtime}, {engine.precision})"
    latency = engine.latencies[0] if engine.latencies else None
    as_evaluated = prepared(engine.preprocessing, engine.input_shape, name)
    target = Target(
        name=name, family=engine.family, route=str(engine.route), path=engine.path, format=engine.format,
        runtime=engine.runtime, precision=engine.precision, num_classes=engine.num_classes, preprocess=as_evaluated,
        provider=latency.provider if latency else None,
        cascade=engine.route if isinstance(engine.route, Cascade) else None,
    )  # fmt: skip
    if not engine.num_classes:  # registered before it was recorded
        with target.opened() as opened:
            one = np.zeros((next(iter(opened.batch_sizes), 1), *engine.input_shape), np.float32)
            target = replace(target, num_classes=opened.outputs(one).shape[-1])
    return target
