"""Several packages as one, so that cascades can be made of networks that were never built together. Needs no torch.

Graphs stay as they are; only the places of their weights change, which are copied into one file. So the package is
complete: it outlives the ones it was made of, and moves, installs and serves as any other. Its references are what the
engines of those packages answer, each of which was compared with its network when it was registered.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from klas_zoo.cascades.outputs import check_exits
from klas_zoo.errors import UnknownName, UsageError
from klas_zoo.exporters.decoded_images import ReferenceLogits
from klas_zoo.exporters.graphs import ALIGNMENT, check_graph, tensors_of
from klas_zoo.exporters.manifest import FamilyFacts, Manifest, PackagedRoute, graph_metadata
from klas_zoo.exporters.package import Package, write_manifest
from klas_zoo.exporters.package_writing import entries, write_references
from klas_zoo.preprocess import Preprocess
from klas_zoo.routes import Route
from klas_zoo.runtimes import open_engine
from klas_zoo.versions import versions

WEIGHTS, REFERENCES = "weights.bin", "references.safetensors"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the packages that are joined.

    Attributes:
        name: of its family; anchors are called `family_anchor` where it has several and other packages are joined.
        preprocess: what its networks take.
    """

    name: str
    package: Package
    preprocess: Preprocess


@dataclass(frozen=True, kw_only=True)
class _Joined:
    """A route of a part, under its new name."""

    part: Part
    own: PackagedRoute
    route: Route

    @property
    def name(self) -> str:
        return str(self.route)


def join_packages(
    parts: Sequence[Part], folder: Path, *, name: str, routes: Sequence[str] = (), provider: str,
    threads: int | None = None,
) -> Package:  # fmt: skip
    """Writes a package of the engines of several packages of ONNX graphs into an empty folder.

    Args:
        name: of the family that they become.
        routes: names of those to take, as they are called when joined. Default: all.

    Raises:
        UsageError: the networks take other images or know other classes, are of several precisions, or take batches
            of one size only; or two routes would have one name.
        UnknownName: there is no such route.
        DamagedPackage: the references of a package cannot be read.
        ExportError: an engine does not run here.
        OSError: a file cannot be written.
    """
    _refuse_different(parts)
    joined = sorted(_chosen(parts, routes), key=lambda one: (one.own.macs, one.name))
    facts = _facts(parts, joined, name)
    precision = parts[0].package.manifest.precision
    _write_graphs(joined, folder, facts, precision)
    reference = _references(parts, joined, provider, threads)
    write_references(folder / REFERENCES, reference, [one.name for one in joined])
    packaged = tuple(replace(one.own, route=one.route, file=f"{one.name}.onnx") for one in joined)
    data = [dict(part.package.manifest.data) for part in parts]
    about: dict[str, Any] = {
        "joined": [{"family": part.name, "package": part.package.digest} for part in parts],
        "verified_with": "the engines of the packages that were joined", "versions": versions(),
    }  # fmt: skip
    manifest = Manifest(
        format="onnx", precision=precision, family=facts, weights=WEIGHTS, references=REFERENCES, routes=packaged,
        files=entries(folder), provenance=about, data=data[0] if all(one == data[0] for one in data) else {},
    )  # fmt: skip
    write_manifest(folder, manifest)
    return Package.open(folder)


def _refuse_different(parts: Sequence[Part]) -> None:
    """
    Raises:
        UsageError: their networks cannot be stages of one cascade.
    """
    first = parts[0]
    for part in parts[1:]:
        one, other = (some.package.manifest for some in (first, part))
        if one.precision != other.precision:
            raise UsageError(
                f"{first.name} is in {one.precision} and {part.name} in {other.precision}: a package has one precision."
            )
    check_exits(
        {
            part.name: {"the number of classes": part.package.manifest.family.num_classes, **part.preprocess.to_json()}
            for part in parts
        }
    )
    named = [part for part in parts if part.package.manifest.family.classes]
    for part in named[1:]:
        classes = zip(named[0].package.manifest.family.classes, part.package.manifest.family.classes, strict=False)
        for number, (known, given) in enumerate(classes):
            check_exits({named[0].name: {f"class {number}": known}, part.name: {f"class {number}": given}})


def _chosen(parts: Sequence[Part], wanted: Sequence[str]) -> Iterable[_Joined]:
    known: dict[str, _Joined] = {}
    for part in parts:
        for own in part.package.routes:
            one = _Joined(part=part, own=own, route=_renamed(own.route, part, alone=len(parts) == 1))
            if own.verification is None:
                raise UsageError(f"The engine {own.name} of {part.name} was not verified yet: install its package.")
            if one.name in known:
                raise UsageError(
                    f"{known[one.name].part.name} and {part.name} both have a route {one.name}: add one of them under "
                    "another name."
                )
            known[one.name] = one
    for name in wanted:
        if name not in known:
            raise UnknownName("route", name, known)
    return [one for one in known.values() if not wanted or one.name in wanted]


def _renamed(route: Route, part: Part, *, alone: bool) -> Route:
    return Route(tuple(replace(one, anchor=_anchor(one.anchor, part, alone=alone)) for one in route.segments))


def _anchor(anchor: str, part: Part, *, alone: bool) -> str:
    return anchor if alone or anchor == part.name else f"{part.name}_{anchor}"


def _facts(parts: Sequence[Part], joined: Sequence[_Joined], name: str) -> FamilyFacts:
    used = {segment.anchor for one in joined for segment in one.route.segments}
    anchors = [
        {**one, "name": _anchor(one["name"], part, alone=len(parts) == 1)}
        for part in parts
        for one in part.package.manifest.family.anchors
    ]
    families = [part.package.manifest.family for part in parts]
    random = any(one.weights == "random" for one in families)
    return FamilyFacts(
        name=name, input_shape=families[0].input_shape, num_classes=families[0].num_classes,
        weights="random" if random else "pretrained", data_config=parts[0].preprocess.to_json(),
        anchors=tuple(one for one in anchors if one["name"] in used),
        classes=next((one.classes for one in families if one.classes), ()),
    )  # fmt: skip


def _write_graphs(joined: Sequence[_Joined], folder: Path, facts: FamilyFacts, precision: str) -> None:
    """The graphs, and a copy of every weight that they read, each at the start of a page."""
    places: dict[tuple[Path, str], int] = {}
    with (folder / WEIGHTS).open("xb") as weights:
        for one in joined:
            model = onnx.load(str(one.part.package.engine(one.own)), load_external_data=False)
            source = one.part.package.weights
            for tensor in tensors_of(model):
                if tensor.data_location == TensorProto.EXTERNAL:
                    place = {entry.key: entry.value for entry in tensor.external_data}
                    key = source, place.get("offset", "0")
                    if key not in places:
                        weights.write(bytes(-weights.tell() % ALIGNMENT))
                        places[key] = weights.tell()
                        _copy(source, int(key[1]), int(place["length"]), weights)
                    _move(tensor, places[key], place["length"])
            own = {entry.key: entry.value for entry in model.metadata_props}
            helper.set_model_props(model, {**own, **graph_metadata(facts, one.name, precision)})
            (folder / f"{one.name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    for one in joined:
        check_graph(folder / f"{one.name}.onnx", folder / WEIGHTS)


def _copy(source: Path, offset: int, length: int, target: Any) -> None:
    with source.open("rb") as file:
        file.seek(offset)
        target.write(file.read(length))


def _move(tensor: TensorProto, offset: int, length: str) -> None:
    del tensor.external_data[:]
    for key, value in (("location", WEIGHTS), ("offset", str(offset)), ("length", length)):
        tensor.external_data.add(key=key, value=value)


def _references(
    parts: Sequence[Part], joined: Sequence[_Joined], provider: str, threads: int | None
) -> ReferenceLogits:
    """What the engines answer to the reference images of all parts, taken in turn."""
    stored = [part.package.references().images for part in parts]
    images = {
        one[number].tobytes(): one[number]
        for number in range(max(map(len, stored)))
        for one in stored
        if number < len(one)
    }
    every = np.stack(list(images.values()))
    logits: dict[str, np.ndarray] = {}
    for one in joined:
        with open_engine(one.part.package.engine(one.own), provider=provider, threads=threads) as session:
            if session.smallest_batch > 1 or session.largest_batch is not None:
                raise UsageError(
                    f"{one.name} takes batches of {session.smallest_batch} only, and a cascade passes on any number of "
                    "images: export it for batches of any size."
                )
            logits[one.name] = session.run(every)
    return ReferenceLogits.of_arrays(every, logits)
