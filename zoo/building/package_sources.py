"""Where a package comes from: a tuned supernet of the registry, or anchors at random; and which of their routes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from klas_zoo.addresses import command_line
from klas_zoo.budget import Budget, Candidates
from klas_zoo.building import tuned
from klas_zoo.building.route_list import list_routes
from klas_zoo.errors import FamilyError, NothingFits, RegistryError, SelectionError, UnknownName, UsageError
from klas_zoo.exporters.family import PackageSource
from klas_zoo.exporters.manifest import FamilyFacts, PackagedRoute
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.packaged_cascades import PackagedCascades, read_cascades
from klas_zoo.families.anchors import load_family
from klas_zoo.families.specs import FamilySpec, builtin_families, find_family
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.profiles.macs import route_costs
from klas_zoo.registry import Registry
from klas_zoo.routes import Route
from klas_zoo.selection.candidates import SelectionSettings
from klas_zoo.supernet import Supernet
from klas_zoo.units import format_latency
from klas_zoo.versions import versions


def tuned_source(
    family: str, root: Path, device: str | None, *, full_provenance: bool = False, preferred: str | None = None
) -> tuple[FamilySpec, PackageSource]:
    """A family that was built, and the supernet that its last build kept.

    Args:
        family: its name or tag in the registry, or its file, which has to describe the anchors that were built.
        full_provenance: see `provenance_of`.
        preferred: the device whose build counts where there are several and `device` names none.

    Raises:
        UnknownName: neither a family that was built, nor a built-in one, nor a file.
        WeightsError: there is no such supernet; the message names the command that makes one.
        FamilyError: the file describes other anchors, or they are no models of timm.
    """
    known = builtin_families()
    given = find_family(family) if family.endswith(".toml") else known.get(family.partition("@")[0])
    if given is None:
        _refuse_unknown(family, root, known)
    name = given.name if given and given.path else family
    kept = tuned.find(root, name, device, given.argument if given else None, preferred=preferred)
    spec = kept.spec() or given
    if spec is None:
        raise FamilyError(f"The anchors of {family} are no models of timm, so that no command can make them again.")
    if given is not None:
        spec = _checked(spec, given, kept)
    plain = kept.facts or FamilyFacts(
        name=spec.name, input_shape=spec.input_shape, num_classes=spec.num_classes, weights=kept.build["weights"],
        data_config=kept.data_config, anchors=_anchors(spec, kept.anchors),
    )  # fmt: skip

    def load(routes: Sequence[Route]) -> Supernet:
        # at random: the tuned weights take their places, and nothing is fetched
        return kept.load(load_family(spec, random_weights=True).chains)

    provenance = provenance_of(dict(kept.build), kept.build_id, full=full_provenance)
    cascades = partial(_cascades_of, root, kept.build_id)
    return spec, PackageSource(
        facts=plain, routes=kept.routes, load=load, provenance=provenance, cascades=cascades
    )


def _cascades_of(root: Path, build_id: int, precision: str) -> PackagedCascades:
    """Those of a registered build in a precision.

    Raises:
        PackageError: its package cannot be read.
    """
    for one in Registry.open(root, create=False).packages(build_id):
        if (one.format, one.precision) == ("onnx", precision):
            return read_cascades(Package.open(one.path, content=False))
    return PackagedCascades()


def _refuse_unknown(family: str, root: Path, known: Iterable[str]) -> None:
    """
    Raises:
        UnknownName: no build has such a name.
    """
    with suppress(RegistryError), Registry.open(root, create=False).reading() as connection:
        built = {row["family"] for row in connection.execute("SELECT DISTINCT family FROM builds WHERE kind = 'build'")}
        if family.partition("@")[0] in built:
            return
        known = {*known, *built}
    raise UnknownName("family", family, known, "A family that was not built here is named by its .toml file.")


def _checked(built: FamilySpec, given: FamilySpec, kept: tuned.TunedSupernet) -> FamilySpec:
    """The family that was built, with the images of the one that was named.

    Raises:
        FamilyError: a file describes another one now; of a built-in family the one that was built is taken.
    """

    def anchors(spec: FamilySpec) -> list[tuple[str, str, str]]:
        return [(one.name, one.model, json.dumps(one.arguments, sort_keys=True)) for one in spec.anchors]

    here, there = ((anchors(one), tuple(one.input_shape), one.num_classes) for one in (given, built))
    if here == there:
        return replace(built, sample=given.sample)
    if given.path is None:
        return built
    now, then = (", ".join(f"{name} ({model})" for name, model, _ in one[0]) for one in (here, there))
    raise FamilyError(
        f"{given.path} was changed since build {kept.build_id}, in anchors, arguments, images or classes: it describes "
        f"{now}, and {then} were built. Build it again, or pass --family {built.name} to export what was built."
    )


def random_source(
    spec: FamilySpec, seed: int, names: Sequence[str] = (), *, full_provenance: bool = False
) -> PackageSource:
    """Anchors and SN-Net's stitches with untrained weights: for sizes and times.

    Args:
        names: of routes that will be asked for; where SN-Net has them not, all stitches are listed too. Anchors whose
            stages have one block each have no stitches of SN-Net's, and are listed alone.
    """
    family = load_family(spec, random_weights=True, seed=seed)
    chains = family.chains
    found = {Route.anchor(name, chain.depth) for name, chain in chains.items()}
    for selector in ("snnet", "all"):
        with suppress(SelectionError):  # of anchors with one block a stage there are no windows
            settings = SelectionSettings(selector=selector)
            listed = list_routes(spec, settings, root=Path(), stage=_no_stage, say=lambda sentence: None)
            found |= {one.route for one in listed}
        if set(names) <= set(map(str, found)):
            break
    cost_of = route_costs(family)
    packaged = (
        PackagedRoute(
            route=one, file=None, macs=cost_of(one).macs, parameters=cost_of(one).parameters, top1=None, images=0,
            on_frontier=False, verification=None, latencies=(),
        )
        for one in found
    )  # fmt: skip
    routes = tuple(sorted(packaged, key=lambda one: (one.macs, one.name)))

    def load(routes: Sequence[Route]) -> Supernet:
        nonlocal chains
        # handed over, so that they are gone when the supernet is
        taken, chains = chains, {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Supernet(taken, routes).eval().requires_grad_(False)

    facts = FamilyFacts(
        name=family.name, input_shape=family.input_shape, num_classes=family.num_classes, weights="random",
        data_config=family.data_config, anchors=_anchors(spec, {name: chain.depth for name, chain in chains.items()}),
    )  # fmt: skip
    del family
    return PackageSource(facts=facts, routes=routes, load=load, provenance=provenance_of(full=full_provenance))


def choose(
    source: PackageSource, *, names: Sequence[str] = (), frontier: bool = False, budget_ms: float | None = None
) -> PackageSource:
    """Only some routes of a source: those named, those on the frontier, or those within a budget.

    Args:
        budget_ms: of the median latency that the build measured, at its first batch size.

    Raises:
        UsageError: more than one was asked for, or what it needs is not known of these routes.
        UnknownName: there is no such route.
        NothingFits: no route is within the budget.
    """
    if sum((bool(names), frontier, budget_ms is not None)) > 1:
        raise UsageError("--routes, --frontier and --latency contradict each other: say one.")
    kept = list(source.routes)
    if names:
        by_name = {one.name: one for one in source.routes}
        for name in names:
            if name not in by_name:
                raise UnknownName("route", name, by_name)
        kept = [one for one in source.routes if one.name in names]
    if frontier:
        kept = [one for one in source.routes if one.on_frontier]
        if not kept:
            raise UsageError("Routes of random weights have no frontier: name them with --routes.")
    if budget_ms is not None:
        timed = Candidates(
            items=[one for one in source.routes if one.latencies], latency_ms=lambda one: one.latencies[0].p50_ms,
            accuracy=lambda one: one.top1 or 0.0, name=lambda one: one.name,
        )  # fmt: skip
        budget = Budget(latency_ms=budget_ms)
        kept = timed.within(budget)
        nearest = timed.nearest(budget)
        if nearest is None:
            raise UsageError("No latency of these routes was measured: name them with --routes.")
        if not kept:
            raise NothingFits(
                f"No route is within {format_latency(budget_ms)}: the fastest, {nearest.name}, takes "
                f"{format_latency(nearest.latencies[0].p50_ms)}."
            )
    return replace(source, routes=tuple(kept))


def _anchors(spec: FamilySpec, depths: Mapping[str, int]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"name": one.name, "depth": depths[one.name], "model": one.model, "arguments": one.arguments}
        for one in spec.anchors
    )


def provenance_of(build: dict[str, Any] | None = None, build_id: int | None = None, *, full: bool) -> dict[str, Any]:
    """What a package says about its making.

    Packages are published: the host, its kernel, command lines and paths of files stay in the build's own record,
    unless the provenance is to be `full`.
    """
    found: dict[str, Any] = {
        "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": resolve_device("cpu").hardware,
        "versions": versions(),
    }
    if full:
        found["command"] = command_line()
    if build is not None:
        found |= {"build_id": build_id, "build": build if full else _public(build)}
    return found


def _public(build: dict[str, Any]) -> dict[str, Any]:
    """A build's record without what tells of its machine more than the processor."""
    manifest = dict(build.get("manifest", {}))
    manifest.pop("machine", None)
    if "anchors" in manifest:
        manifest["anchors"] = {name: {"sha256": one["sha256"]} for name, one in manifest["anchors"].items()}
    return {name: value for name, value in build.items() if name != "command"} | {"manifest": manifest}


@contextmanager
def _no_stage(name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    yield lambda count, remark: None
