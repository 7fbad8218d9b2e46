"""What `klas-zoo export` makes packages of: a tuned supernet of the registry, or anchors at random."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from klas_zoo.building import tuned
from klas_zoo.building.route_list import list_routes
from klas_zoo.data.loading import Split, batches, load_data
from klas_zoo.errors import NothingFits, UnknownName, UsageError
from klas_zoo.exporters.contract import Verdict
from klas_zoo.exporters.family import Images, Labelled, Listener, Profile, Source, export_family, staging
from klas_zoo.exporters.formats import DERIVED, FORMATS
from klas_zoo.exporters.manifest import FamilyFacts, PackagedRoute
from klas_zoo.families.anchors import load_family
from klas_zoo.families.specs import FamilySpec, builtin_families
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.routes import Route
from klas_zoo.selection.candidates import SelectionSettings
from klas_zoo.supernet import Supernet
from klas_zoo.units import format_latency
from klas_zoo.versions import versions

_MACS_TO_VERIFY = 1e12  # about a minute of two cores, for torch and for onnxruntime
_MOST_IMAGES = 1000
_MOST_CALIBRATION = 200


def tuned_source(spec: FamilySpec, root: Path, device: str | None) -> Source:
    """The supernet that the family's last build kept.

    Raises:
        WeightsError: there is none; the message names the command that makes one.
    """
    kept = tuned.find(root, spec.name, device)
    plain = FamilyFacts(
        name=spec.name,
        input_shape=spec.input_shape,
        num_classes=spec.num_classes,
        weights=kept.build["weights"],
        data_config=kept.data_config,
        anchors=_anchors(spec, kept.anchors),
    )

    def load(routes: Sequence[Route]) -> Supernet:
        # at random: the tuned weights take their places, and nothing is fetched
        return kept.load(load_family(spec, random_weights=True).chains)

    provenance = {**_provenance(), "build_id": kept.build_id, "build": dict(kept.build)}
    return Source(facts=plain, routes=kept.routes, load=load, provenance=provenance)


def random_source(spec: FamilySpec, seed: int, names: Sequence[str] = ()) -> Source:
    """Anchors and SN-Net's stitches with weights that nobody trained: for sizes and times.

    Args:
        names: of routes that will be asked for; where SN-Net has them not, all stitches are listed too.
    """
    listed: dict[Route, PackagedRoute] = {}
    for selector in ("snnet", "all"):
        if listed and set(names) <= {str(route) for route in listed}:
            break
        settings = SelectionSettings(selector=selector)
        for one in list_routes(spec, settings, root=Path(), stage=_no_stage, say=lambda sentence: None):
            listed[one.route] = PackagedRoute(
                route=one.route, file=None, macs=one.cost.macs, parameters=one.cost.parameters, top1=None, images=0,
                on_frontier=False, verification=None,
            )  # fmt: skip
    routes = tuple(sorted(listed.values(), key=lambda one: one.macs))
    family = load_family(spec, random_weights=True, seed=seed)
    chains = family.chains

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
    return Source(facts=facts, routes=routes, load=load, provenance=_provenance())


def choose(
    source: Source, *, names: Sequence[str] = (), frontier: bool = False, budget_ms: float | None = None
) -> Source:
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
        timed = [one for one in source.routes if one.latencies]
        if not timed:
            raise UsageError("No latency of these routes was measured: name them with --routes.")
        kept = [one for one in timed if one.latencies[0].p50_ms <= budget_ms]
        if not kept:
            fastest = min(timed, key=lambda one: one.latencies[0].p50_ms)
            raise NothingFits(
                f"No route is within {format_latency(budget_ms)}: the fastest, {fastest.name}, takes "
                f"{format_latency(fastest.latencies[0].p50_ms)}."
            )
    return replace(source, routes=tuple(kept))


def export_as(
    source: Source,
    out: Path,
    options: Mapping[str, Any],
    *,
    precision: str,
    images: Images,
    threads: int | None,
    profile: Profile | None = None,
    listener: Listener = lambda stage, route: None,
) -> list[Verdict]:
    """Writes a package of any format; `options` are `format` and those of the format.

    A format that is made of ONNX graphs is made of a package that is verified first, and gone afterwards.

    Raises:
        UsageError: there is no such format in that precision.
        ExportError, PackageError, OSError: as `export_family`.
    """
    form = options["format"]
    if form == "onnx":
        return export_family(
            source, out, precision=precision, images=images, threads=threads, profile=profile, listener=listener
        )[1]
    if form == "torch":
        from klas_zoo.exporters.torch_package import export_torch

        return export_torch(source, out, precision=precision, images=images, listener=listener)[1]
    if form not in DERIVED:
        raise UnknownName("format", form, FORMATS)
    derived = DERIVED[form]
    if precision not in derived.precisions:
        raise UsageError(f"--format {form} takes --precision {', '.join(derived.precisions)}, not {precision}.")
    derive = derived.derive()
    with staging(out) as folder, tempfile.TemporaryDirectory(dir=out.absolute().parent) as place:
        package, verdicts = export_family(
            source, Path(place) / "onnx", precision=precision, images=images, threads=threads, profile=profile,
            listener=listener,
        )  # fmt: skip
        made = derive(package, folder, options)
        listener(form, "")
    return [one for one in verdicts if one.status == "refused"] + made


def images_for(
    spec: FamilySpec, source: Source, folder: Path | None, *, count: int | None, seed: int
) -> tuple[Images, str]:
    """Real images to verify with, and what they are.

    A family without images of its own borrows those of deit-micro, scaled: differences can be
    measured on them, accuracy can not.

    Args:
        folder: as a build takes it; None: the family's sample.
        count: of test images; None: as many as take about a minute, at most 1000.
    """
    facts = source.facts
    borrowed = folder is None and spec.sample is None
    sample = builtin_families()["deit-micro"].sample if borrowed else spec.sample
    data = load_data(
        folder, sample=sample, num_classes=facts.num_classes, data_config=dict(facts.data_config), seed=seed
    )
    affordable = int(_MACS_TO_VERIFY / max(1, sum(one.macs for one in source.routes)))
    wanted = count or min(_MOST_IMAGES, max(8, affordable))
    size = 100 if max(facts.input_shape[1:]) <= 64 else 8

    def stream(split: Split, most: int) -> Labelled:
        step = max(1, len(split) // most)
        part = Split(split.source, split.indices[::step][:most], split.transform)

        def batched() -> Iterator[tuple[Tensor, Tensor | None]]:
            for images, labels in batches(part, size):
                yield images, None if borrowed else labels

        return batched

    found = Images(test=stream(data.test, wanted), calibration=stream(data.heldout, min(wanted, _MOST_CALIBRATION)))
    return found, f"{min(wanted, len(data.test))} images of {data.description}{', scaled' if borrowed else ''}"


def _anchors(spec: FamilySpec, depths: Mapping[str, int]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"name": one.name, "depth": depths[one.name], "model": one.model, "arguments": one.arguments}
        for one in spec.anchors
    )


def _provenance() -> dict[str, Any]:
    return {
        "command": shlex.join(["klas-zoo", *sys.argv[1:]]),
        "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": resolve_device("cpu").hardware,
        "versions": versions(),
    }


@contextmanager
def _no_stage(name: str, total: int, unit: str) -> Iterator[Callable[[int, str], None]]:
    yield lambda count, remark: None
