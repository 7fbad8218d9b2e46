"""Cascades of registered networks that were never built together, and cascades as engines of the registry.

Packages of several families are joined into one (`klas_zoo.exporters.joined_package`), of which cascades are fitted as
of any other. What is registered is that package with its cascades, as a family of its own: it stays what it was fitted
on when one of its networks is added or built again. Needs no torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klas_zoo.catalogue.cascade_reports import CascadeReport
from klas_zoo.catalogue.cascading import fit_cascades
from klas_zoo.catalogue.registering import now, record_of
from klas_zoo.errors import NothingFits, RegistryError, UnknownName, UsageError
from klas_zoo.exporters.checking import open_package
from klas_zoo.exporters.joined_package import Part, join_packages
from klas_zoo.exporters.manifest import MANIFEST
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import read_cascades
from klas_zoo.families.specs import NAME, builtin_families
from klas_zoo.profiles.devices import Device, resolve_device
from klas_zoo.registry import Registry
from klas_zoo.registry.cascades import new_cascade
from klas_zoo.registry.loaded import prepared
from klas_zoo.registry.records import VERIFIED, EngineRecord
from klas_zoo.runtimes import CPU_PROVIDER


@dataclass(frozen=True, kw_only=True)
class RegisteredCascades:
    """What `fit_registered` found, and what of it is registered.

    Attributes:
        reports: static routes and cascades, the fastest by mean first.
        build_id: in the registry; None where nothing was registered.
        notes: sentences about what is registered.
    """

    reports: list[CascadeReport]
    build_id: int | None = None
    notes: tuple[str, ...] = ()


def fit_registered(
    targets: Sequence[str | Path],
    *,
    register: str | None = None,
    registry: str | Path | None = None,
    precision: str | None = None,
    data: str | Path | None = None,
    test: str | Path | None = None,
    out: str | Path | None = None,
    routes: Sequence[str] = (),
    provider: str = CPU_PROVIDER,
    threads: int | None = None,
    **options: Any,
) -> RegisteredCascades:
    """`fit_cascades` for the routes of several packages and registered families together, and registers what it finds.

    Args:
        targets: folders of packages of ONNX graphs, and names of families in the registry: of `klas-zoo add`, `build`
            or `install`. One package is used as it is. Of several, anchors are called `family_anchor` where the family
            has more than one.
        register: name of the family that cascades are registered as; `test` is needed then, as nothing may be
            registered with the accuracy of images that decided.
        precision: of registered families, which may have engines of several. Default: fp32.
        routes: use these, by the names they have when joined. Default: all.
        data, test, out, options: see `fit_cascades`.

    Raises:
        UsageError: networks that cannot be stages of one cascade; says in what they differ. Or arguments that
            contradict each other.
        NothingFits: no cascade is better than a route alone, so that nothing was registered.
        KlasZooError: any other of its kinds, see `fit_cascades`. The registry is unchanged after each of them.
    """
    device, started = resolve_device("cpu" if provider == CPU_PROVIDER else "cuda"), now()
    if register is not None:
        _refuse(register, test, registry)
    with tempfile.TemporaryDirectory(prefix="klas-zoo-cascades-") as temporary:
        place = Path(temporary)
        found = _parts(targets, registry, precision or "fp32", device)
        name = register or "-".join(one.name for one in found)[:64]
        if len(found) == 1 and register is None:
            source, used = found[0].package, routes
        else:
            (place / "joined").mkdir()
            source, used = join_packages(
                found, place / "joined", name=name, routes=routes, provider=provider, threads=threads
            ), ()
        written = out if out is not None or register is None else place / "cascades"
        evaluated = [part.package.manifest.data.get("fingerprint", "") for part in found]
        reports = fit_cascades(
            source.folder, data=data, test=test, out=written, routes=used, provider=provider, threads=threads,
            test_images=evaluated if test is not None else (), **options,
        )  # fmt: skip
        if register is None or written is None:
            return RegisteredCascades(reports=reports)
        number, notes = _register(Path(written), source, device, started, [one.name for one in found], registry)
        return RegisteredCascades(reports=reports, build_id=number, notes=notes)


def _refuse(name: str, test: str | Path | None, registry: str | Path | None) -> None:
    """
    Raises:
        UsageError: cascades cannot be registered under that name, or without images that decide nothing.
    """
    if not NAME.fullmatch(name):
        raise UsageError(f"'{name}' is no name of a family: letters, digits, - and _.")
    if test is None:
        raise UsageError(
            "--register needs --test: the images that thresholds are fitted on do not say how accurate a cascade is."
        )
    with Registry.open(registry, create=True).reading() as connection:
        row = connection.execute(
            "SELECT kind FROM builds WHERE family = ? AND current AND kind <> 'cascades' LIMIT 1", (name,)
        ).fetchone()
    if row is not None or name in builtin_families():
        raise UsageError(f"{name} is a family of other engines: pass another name to --register.")


def _parts(
    targets: Sequence[str | Path], registry: str | Path | None, precision: str, device: Device
) -> list[Part]:
    """
    Raises:
        UsageError: a target is named twice, or has no ONNX engines in that precision.
        UnknownName: it is neither a folder nor a registered family.
        PackageError: a package cannot be read.
    """
    found: list[Part] = []
    for target in targets:
        package = open_package(_folder(target, registry, precision, device))
        family = package.manifest.family
        if package.manifest.format != "onnx":
            raise UsageError(
                f"{target} is a package of format {package.manifest.format}: cascades are made of ONNX graphs."
            )
        preprocess = prepared(family.data_config, family.input_shape, str(target))
        found.append(Part(name=family.name, package=package, preprocess=preprocess))
    names = [one.name for one in found]
    for one in names:
        if names.count(one) > 1:
            raise UsageError(f"{one} is named twice.")
    return found


def _folder(target: str | Path, registry: str | Path | None, precision: str, device: Device) -> Path:
    """Of a package's folder itself; any other folder in the way does not hide a registered family of its name."""
    given = Path(target)
    if len(given.parts) > 1 or (given / MANIFEST).is_file():
        return given
    try:
        return _registered(str(target), registry, precision, device)
    except (RegistryError, UnknownName):
        if given.is_dir():
            return given
        raise


def _registered(family: str, registry: str | Path | None, precision: str, device: Device) -> Path:
    """The folder of the newest package of a registered family that onnxruntime runs here."""
    engines = Registry.open(registry, create=False).engines()
    known = {one.family for one in engines}
    if family not in known:
        raise UnknownName("family", family, known, "A target is the folder of a package, or a registered family.")
    usable = [one for one in engines if one.family == family and _usable(one, device)]
    chosen = [one for one in usable if one.precision == precision]
    if not chosen:
        others = ", ".join(sorted({one.precision for one in usable})) or "no precision"
        raise UsageError(
            f"{family} has no engines in {precision} that onnxruntime runs on {device.name}, only in {others}."
        )
    return max(chosen, key=lambda one: one.build_id).path.parent


def _usable(one: EngineRecord, device: Device) -> bool:
    plain = (one.format, one.runtime, one.status) == ("onnx", "onnxruntime", VERIFIED)
    return plain and one.cascade is None and bool(one.package) and one.device == device.name


def _register(
    folder: Path, joined: Package, device: Device, started: str, names: Sequence[str], registry: str | Path | None
) -> tuple[int, tuple[str, ...]]:
    """The cascades of a package as engines of the family that it names; the number of the build, and notes."""
    package = Package.open(folder, content=False)
    carried, family = read_cascades(package), package.manifest.family
    if not carried.cascades:
        raise NothingFits(
            f"No cascade of {', '.join(names)} is better than one of their routes alone: nothing was registered."
        )
    about = {"dataset": carried.data["description"], "data_fingerprint": carried.data["fingerprint"]}
    engines = [
        new_cascade(one, package.manifest, folder, device=device.name, **about) for one in carried.cascades
    ]
    record = record_of(
        "cascades", device, f"cascades of {', '.join(names)}", started, family=family.name, weights=family.weights,
        settings={"stages": [one.name for one in joined.routes]}, **about,
    )  # fmt: skip
    number = Registry.open(registry, create=True).register(record, engines)
    if joined.manifest.data.get("fingerprint") == about["data_fingerprint"]:
        return number, ()
    note = (
        f"{', '.join(names)} were not all evaluated on the images of --test, so that klas-zoo pick cannot compare "
        "these cascades with all of them."
    )
    return number, (note,)
