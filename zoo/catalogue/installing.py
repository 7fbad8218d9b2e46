"""Packages on a target machine: checked, verified, compiled where that is needed, timed and registered.

Needs no torch for packages of ONNX graphs and for engines that are compiled already.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from klas_zoo.addresses import without_credentials
from klas_zoo.catalogue.evaluating import TestImages, evaluate_targets
from klas_zoo.catalogue.installed_cascades import installed_cascades
from klas_zoo.catalogue.registering import default_runtimes, latencies_of, now, record_of
from klas_zoo.catalogue.targets import Target, of_package
from klas_zoo.catalogue.unfinished import Measured, Unfinished
from klas_zoo.cores import physical_cores
from klas_zoo.errors import CannotRunHere, KlasZooError, UsageError, VerificationError
from klas_zoo.exporters.contract import Artifact, OpenedEngine, Verdict
from klas_zoo.exporters.graphs import deployed_bytes
from klas_zoo.exporters.manifest import Manifest, PackagedRoute
from klas_zoo.exporters.onnx_session import open_onnx
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.package_verification import verify_routes
from klas_zoo.profiles.devices import Device, resolve_device
from klas_zoo.profiles.latency import BUILD_METHOD, provider_on
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.profiles.timing import Method
from klas_zoo.progress.listeners import Advance, NullListener
from klas_zoo.registry import Registry
from klas_zoo.registry.packages import digest_of
from klas_zoo.registry.records import NOT_RUN, VERIFIED, EngineRecord, NewEngine
from klas_zoo.runtimes import RUNTIMES, runtime_named
from klas_zoo.sharing.index import LARGEST_BYTES
from klas_zoo.sharing.local import copy_package
from klas_zoo.sharing.urls import scheme_of

Listener = Callable[[str], None]
_UNKNOWN = "its accuracy is not known: pass --data DIR to measure it"
Stage = Callable[[str, int, str], AbstractContextManager[Advance]]
"""Called with a sentence about what is done next."""


@dataclass(frozen=True, kw_only=True)
class Installed:
    """What became of a package.

    Attributes:
        build_id: that it is registered as; None after a dry run.
        already: it was registered before, measured under the same conditions.
        engines: names of engines with runtime and precision: what was registered, or would be looked at.
        refused: why others were not.
    """

    family: str
    digest: str
    build_id: int | None
    already: bool
    engines: tuple[str, ...]
    refused: tuple[str, ...] = ()


def install(
    source: str | Path,
    *,
    device: str = "cpu",
    runtimes: Sequence[str] | None = None,
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    data: str | Path | None = None,
    name: str | None = None,
    version: str | None = None,
    largest_bytes: int = LARGEST_BYTES,
    dry_run: bool = False,
    verify_key: str | Path | None = None,
    registry: str | Path | None = None,
    method: Method = BUILD_METHOD,
    listener: Listener = lambda sentence: None,
    stage: Stage | None = None,
) -> Installed:
    """Brings a package's engines into this machine's registry, with latencies that were measured here.

    Engines of the same family that are current on this machine stay, but for those in the package's precision and
    format. What is registered already, with the same content and conditions, is left as it is.

    Args:
        source: the folder of a package, or a URL as `klas-zoo pull` takes it.
        device: that the engines run on and are timed on.
        runtimes: that execute them. Default: the package's own; for ONNX graphs onnxruntime, and TensorRT on an
            NVIDIA GPU where it is installed.
        batches: sizes to time them at.
        data: measure accuracies on these images instead of taking those of the package.
        name, version: of the package at a URL.
        largest_bytes: that a package at a URL may have.
        verify_key: a public key; the package has to be signed by its owner.
        dry_run: check the package's files, and change nothing.
        stage: called with a name, how many engines there are, and "engines"; gives a context with a function that takes
            how many more are done and a remark, as `klas_zoo.progress.listeners.Listener.stage` does.

    Raises:
        PackageError: the package is damaged, or of a newer version.
        CannotRunHere: no engine of it can run on this machine.
        VerificationError: no engine computes what the package's references say.
        UsageError: there is no such package or device, or no accuracy is known.
        RegistryError: the registry cannot be written. It is unchanged after each of these.
    """
    target, started, shown = resolve_device(device), now(), without_credentials(str(source))
    with _fetched(source, name, version, largest_bytes) as folder:
        if verify_key is not None:
            from klas_zoo.sharing.signatures import check_signature

            check_signature(folder, Path(verify_key))
        targets = list(of_package(folder))
        package = targets[0].package
        assert package is not None
        manifest = package.manifest
        if manifest.format in ("torch", "model-package"):  # without engines, or laid out in another way
            raise UsageError(f"{shown} is a package of format {manifest.format}: export it with --format onnx.")
        digest, chosen = digest_of(package.folder), _runtimes(manifest, runtimes, target)
        place = Registry.open(registry, create=not dry_run) if not dry_run else _opened(registry)
        known = _registered(place, manifest.family.name, target, digest, chosen, batches, threads) if place else None
        wanted = tuple(f"{one.route} ({runtime}, {one.precision})" for runtime in chosen for one in targets)
        if known is not None or dry_run or place is None:
            return Installed(
                family=manifest.family.name, digest=digest, build_id=known, already=known is not None, engines=wanted
            )
        images = None if data is None else TestImages.open(data, targets)
        engines: list[NewEngine] = []
        refused: list[str] = []
        kept_before = Unfinished(place.root, digest, _conditions(target, batches, threads, images, method))
        for runtime in chosen:
            found = _Engines(package, target, runtime, tuple(batches), threads, images, method, kept_before)
            for one in found.made(stage or NullListener().stage):
                if isinstance(one, NewEngine):
                    engines.append(one)
                else:
                    refused.append(one)
        if not any(one.status == VERIFIED for one in engines):
            raise _nothing_runs(shown, engines, refused)
        if "onnxruntime" in chosen:
            carried = installed_cascades(package, device=target, threads=threads, images=images, listener=listener)
            engines += [one for one in carried if isinstance(one, NewEngine)]
            refused += [one for one in carried if isinstance(one, str)]
        listener(f"registering {manifest.family.name}")
        current = _current(place, manifest.family.name, target)
        engines = [_with_earlier_latencies(one, current, digest) for one in engines]
        kept = [_again(one) for one in current if _stays(one, manifest, digest, engines)]
        first = engines[0]
        record = record_of(
            "install", target, f"{shown}, manifest {digest}", started, family=manifest.family.name,
            weights=manifest.family.weights, dataset=first.dataset, data_fingerprint=first.data_fingerprint,
            settings={"runtimes": list(chosen), "batches": list(batches), "threads": threads},
        )  # fmt: skip
        number = place.register(record, [*engines, *kept])
        kept_before.forget()
    return Installed(
        family=manifest.family.name, digest=digest, build_id=number, already=False,
        engines=tuple(f"{one.route} ({one.runtime}, {one.precision})" for one in engines), refused=tuple(refused),
    )  # fmt: skip


class _Engines:
    """The engines of a package in one runtime."""

    def __init__(
        self, package: Package, device: Device, runtime: str, batches: tuple[int, ...], threads: int | None,
        images: TestImages | None, method: Method, unfinished: Unfinished,
    ) -> None:  # fmt: skip
        self._unfinished = unfinished
        self._package, self._device, self._runtime = package, device, runtime
        self._batches, self._threads = batches, threads
        self._images, self._method = images, method

    def made(self, stage: Stage) -> Iterator[NewEngine | str]:
        """Each engine, or why there is none."""
        with stage(self._runtime, len(self._package.manifest.routes), "engines") as advance:
            yield from self._made(advance)

    def _made(self, advance: Advance) -> Iterator[NewEngine | str]:
        manifest = self._package.manifest
        by_name = {one.name: one for one in manifest.routes}
        unknown = [one.name for one in manifest.routes if self._images is None and _stated_top1(one, manifest) is None]
        for name in unknown:  # before anything is spent on it
            del by_name[name]
            advance(1, f"refused {name}")
            yield f"{name} ({self._runtime}, {manifest.precision}): {_UNKNOWN}"
        found = {name: self._unfinished.find(self._key(name)) for name in by_name} if not self._compiles else {}
        measured = {name: one for name, one in found.items() if one is not None}
        for name, one in measured.items():
            advance(1, "measured before")
            yield self._new_engine(by_name[name], self._artifact(by_name[name]), one)
        left = [one for name, one in by_name.items() if name not in measured]
        if not left:
            return
        advance(0, f"compiling and verifying {len(left)}" if self._compiles else f"verifying {len(left)}")
        for verdict in self._verdicts(left):
            route = by_name[verdict.artifact.route]
            about = f"{route.name} ({self._runtime}, {manifest.precision})"
            if verdict.status == "refused":
                advance(1, f"refused {route.name}")
                yield f"{about}: {verdict.reason}"
                continue
            advance(0, f"timing {route.name}")
            try:
                made: NewEngine | str = self._engine(route, verdict)
            except KlasZooError as error:
                made = f"{about}: {error}"
            advance(1, "")
            yield made

    @property
    def _compiles(self) -> bool:
        return runtime_named(self._runtime).compiles and self._package.manifest.format == "onnx"

    def _key(self, route: str) -> str:
        return f"{route} {self._runtime} {runtime_named(self._runtime).version()}"

    def _verdicts(self, routes: Sequence[PackagedRoute]) -> list[Verdict]:
        """What became of each route; engines are compiled first where the runtime needs that."""
        if self._compiles:
            return self._compiled()
        return verify_routes(self._package, [self._artifact(one) for one in routes], self._opened)

    def _artifact(self, route: PackagedRoute) -> Artifact:
        manifest = self._package.manifest
        return Artifact(
            route=route.name, format=manifest.format, precision=manifest.precision, path=self._package.engine(route)
        )

    def _opened(self, artifact: Artifact) -> OpenedEngine:
        provider = provider_on(self._runtime, self._device)
        return open_onnx(artifact, provider=provider, threads=self._threads, runtime=self._runtime)

    def _compiled(self) -> list[Verdict]:
        from klas_zoo.exporters.formats import DERIVED

        place = self._package.folder.parent / f".{self._runtime}"
        place.mkdir()
        return DERIVED[self._runtime].derive()(self._package, place, {"format": self._runtime})

    def _engine(self, route: PackagedRoute, verdict: Verdict) -> NewEngine:
        package, manifest, artifact = self._package, self._package.manifest, verdict.artifact
        ran = verdict.status == VERIFIED
        latencies: tuple[LatencyRecord, ...] = ()
        if ran:
            latencies = latencies_of(
                artifact.path, device=self._device, runtime=self._runtime, precision=manifest.precision,
                input_shape=manifest.family.input_shape, batches=self._batches, threads=self._threads,
                method=self._method,
            )  # fmt: skip
        accuracy = self._accuracy(route, artifact.path, artifact.format, ran, package)
        measured = Measured(verification=verdict.verification, latencies=latencies, accuracy=accuracy)
        if ran and not self._compiles:
            self._unfinished.keep(self._key(route.name), measured)
        return self._new_engine(route, artifact, measured, ran=ran, reason=verdict.reason)

    def _new_engine(
        self, route: PackagedRoute, artifact: Artifact, measured: Measured, *, ran: bool = True, reason: str = ""
    ) -> NewEngine:
        family, path, form = self._package.manifest.family, artifact.path, artifact.format
        accuracy: dict[str, Any] = dict(measured.accuracy)
        return NewEngine(
            family=family.name, route=route.route, device=self._device.name, format=form, runtime=self._runtime,
            precision=artifact.precision, status=VERIFIED if ran else NOT_RUN, reason=reason, macs=route.macs,
            parameters=route.parameters, input_shape=family.input_shape, num_classes=family.num_classes,
            preprocessing=dict(family.data_config), verification=measured.verification, latencies=measured.latencies,
            weights=family.weights, file=path,
            size_bytes=deployed_bytes(path) if form == "onnx" else path.stat().st_size, **accuracy,
        )  # fmt: skip

    def _accuracy(
        self, route: PackagedRoute, path: Path, form: str, ran: bool, package: Package
    ) -> dict[str, Any]:
        """Measured here on the images that were given, else what the package states."""
        manifest = package.manifest
        if self._images is not None and ran:
            (target,) = (one for one in of_package(package.folder, [route.name]))
            provider = provider_on(self._runtime, self._device)
            here: Target = replace(target, runtime=self._runtime, provider=provider, path=path, format=form)
            (found,) = evaluate_targets([here], self._images)
            return {"top1": found.top1, "top5": found.top5, "images": found.images, "dataset": found.dataset,
                    "data_fingerprint": found.data_fingerprint}  # fmt: skip
        top1 = _stated_top1(route, manifest)
        if top1 is None:
            raise UsageError(_UNKNOWN)
        fingerprint = manifest.data.get("fingerprint", "")
        source = "" if fingerprint else "its package"
        return {"top1": top1, "images": route.images, "accuracy_source": source, "data_fingerprint": fingerprint,
                "dataset": manifest.data.get("description", "unknown images")}  # fmt: skip


def _stated_top1(route: PackagedRoute, manifest: Manifest) -> float | None:
    """What a package says of an engine's accuracy, per cent."""
    seen = route.verification
    return route.top1 if seen is None or seen.top1 is None or manifest.precision == "fp32" else seen.top1


def _conditions(
    device: Device, batches: Sequence[int], threads: int | None, images: TestImages | None, method: Method
) -> dict[str, Any]:
    """What decides a measurement, besides the engine and its runtime."""
    return {
        "hardware": device.hardware, "device": device.name, "provider": device.provider, "batches": list(batches),
        "threads": threads or physical_cores(), "images": images.data_fingerprint if images else "", "method": method,
    }  # fmt: skip


@contextmanager
def _fetched(source: str | Path, name: str | None, version: str | None, largest_bytes: int) -> Iterator[Path]:
    """A copy of the package that nothing else writes to."""
    with tempfile.TemporaryDirectory(prefix="klas-zoo-install-") as temporary:
        folder = Path(temporary) / "package"
        if scheme_of(str(source)):
            from klas_zoo.sharing.pull import pull

            pull(str(source), folder, name=name, version=version, largest_bytes=largest_bytes)
        else:
            copy_package(Path(source), folder)  # checked where it is copied to: nothing in between can change it
        yield folder


def _opened(registry: str | Path | None) -> Registry | None:
    try:
        return Registry.open(registry, create=False)
    except KlasZooError:  # a dry run makes none
        return None


def _runtimes(manifest: Manifest, wanted: Sequence[str] | None, device: Device) -> tuple[str, ...]:
    if manifest.format != "onnx":
        if wanted and tuple(wanted) != (manifest.format,):
            raise UsageError(f"Engines of {manifest.format} run in {manifest.format} only, not in {', '.join(wanted)}.")
        if manifest.format in RUNTIMES:
            provider_on(manifest.format, device)
        return (manifest.format,)
    chosen = tuple(dict.fromkeys(wanted or default_runtimes(device)))
    for runtime in chosen:
        provider_on(runtime, device)  # refuses what does not run there
        runtime_named(runtime).version()  # and what is not installed
    return chosen


def _registered(
    registry: Registry, family: str, device: Device, digest: str, runtimes: Sequence[str], batches: Sequence[int],
    threads: int | None,
) -> int | None:  # fmt: skip
    """The current build that has this package, measured under the conditions that were asked for."""
    number = registry.current_build(family, device.name, device.hardware)
    if number is None or digest not in {one.digest for one in registry.packages(number)}:
        return None
    engines = [one for one in _current(registry, family, device) if one.package == digest]
    measured = {
        (latency.runtime, latency.batch)
        for one in engines
        for latency in one.latencies
        if latency.hardware == device.hardware
        and latency.runtime_version == runtime_named(latency.runtime).version()
        and threads in (None, latency.threads)
    }
    complete = all((runtime, batch) in measured for runtime in runtimes for batch in batches)
    return number if complete else None


def _current(registry: Registry, family: str, device: Device) -> list[EngineRecord]:
    """The current engines of a family on this machine."""
    number = registry.current_build(family, device.name, device.hardware)
    return [one for one in registry.engines(family, device.name) if one.build_id == number]


def _stays(engine: EngineRecord, manifest: Manifest, digest: str, installed: Sequence[NewEngine]) -> bool:
    """Whether a current engine is registered once more beside those of a package, instead of being replaced."""
    if not engine.package or engine.weights != manifest.family.weights:
        return False  # of a registry before packages, or of other weights
    if engine.package == digest:
        return engine.runtime not in {one.runtime for one in installed}
    return (engine.precision, engine.format) not in {(one.precision, one.format) for one in installed}


def _with_earlier_latencies(engine: NewEngine, current: Sequence[EngineRecord], digest: str) -> NewEngine:
    """With what the same engine was measured at before under other conditions, such as another batch size."""
    known = {one.conditions for one in engine.latencies}
    earlier = (
        latency
        for one in current
        if (one.package, one.path.name, one.runtime, one.route)
        == (digest, engine.file.name, engine.runtime, engine.route)
        for latency in one.latencies
        if latency.conditions not in known
    )
    return replace(engine, latencies=(*engine.latencies, *earlier))


def _again(engine: EngineRecord) -> NewEngine:
    """A registered engine as a new build registers it once more."""
    own = {name: getattr(engine, name) for name in NewEngine.__dataclass_fields__ if name not in ("file", "size_bytes")}
    return NewEngine(**own, file=engine.path, size_bytes=engine.size_bytes)


def _nothing_runs(source: object, engines: Sequence[NewEngine], refused: Sequence[str]) -> KlasZooError:
    not_run = [one for one in engines if one.status == NOT_RUN]
    if not_run:
        return CannotRunHere(f"No engine of {source} can run here: {not_run[0].reason}")
    return VerificationError(f"No engine of {source} was installed; the first, {refused[0]}")
