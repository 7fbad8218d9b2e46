"""A family as one package of ONNX graphs that share their weights: written, verified, then named.

Everything happens in a folder beside the target, which is renamed when all of it was checked, so
that a package is complete or not there. Graphs are cut out of the supernet and torch answers the
images; engines are opened afterwards, one at a time.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor

from klas_zoo.errors import PackageError, VerificationError
from klas_zoo.exporters.contract import Artifact, Compared, Verdict, judge
from klas_zoo.exporters.manifest import FamilyFacts, FileEntry, Manifest, PackagedRoute
from klas_zoo.exporters.package import Package, write_manifest
from klas_zoo.exporters.precision import converter, limits_for
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.exporters.verify import open_artifact
from klas_zoo.exporters.weights import WeightsFile, check_written, drop_unnamed, write_graph
from klas_zoo.files import make_directory, sha256_of, sync_directory
from klas_zoo.memory import give_back, return_freed
from klas_zoo.modes import evaluating
from klas_zoo.profiles.devices import CPU_PROVIDER
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

WEIGHTS, REFERENCES = "weights.bin", "references.safetensors"
_REFERENCE_BYTES = 2_500_000  # of images a package keeps, at least 2 and at most 16 of them

Labelled = Callable[[], Iterable[tuple[Tensor, Tensor | None]]]
"""Gives batches of images (B, C, H, W) and labels (B,) if they are known; the same ones each time."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a package is made of.

    Attributes:
        routes: what is known of each route; without files and verifications.
        load: gives a supernet that has the routes it is told; called once, and let go of as soon as torch
            is not needed any more.
        provenance: what the manifest is to tell about where all this comes from.
    """

    facts: FamilyFacts
    routes: tuple[PackagedRoute, ...]
    load: Callable[[Sequence[Route]], Supernet]
    provenance: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Images:
    """Real images: `test` to compare engines with torch on, `calibration` for int8 to find its ranges on."""

    test: Labelled
    calibration: Labelled


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What torch answered: logits (N, classes) of every route, by its name, for the test images in order."""

    logits: Mapping[str, np.ndarray]
    test: Labelled

    def compared(self, route: str) -> Iterator[Compared]:
        start = 0
        for images, labels in self.test():
            stop = start + len(images)
            yield images.numpy(), self.logits[route][start:stop], None if labels is None else labels.numpy()
            start = stop


Profile = Callable[[Path], Iterable[LatencyRecord]]
"""Times an engine, once for each batch size."""
Listener = Callable[[str, str], None]
"""Told the stage and the route as each is done."""


def export_family(
    source: Source,
    out: Path,
    *,
    precision: str,
    images: Images,
    provider: str = CPU_PROVIDER,
    threads: int | None = None,
    profile: Profile | None = None,
    listener: Listener = lambda stage, route: None,
) -> tuple[Package, list[Verdict]]:
    """Writes a package of ONNX graphs, and gives it with what became of every route.

    A route whose engine is too far from torch for its precision is left out.

    Args:
        out: a folder that is not there yet, or is empty.
        precision: fp32, fp16, bf16 or int8.
        profile: times an engine. Default: what is known of the routes in fp32, which says nothing of
            other precisions.

    Raises:
        ExportError: names the stage that failed.
        VerificationError: no route passed.
        PackageError: `out` is taken.
        OSError: a file cannot be written.
    """
    with staging(out) as folder:
        answers = _write(source, folder, precision, images, listener)
        give_back()  # all weights, before onnxruntime maps those of an engine
        limits = limits_for(precision, source.facts.weights)

        open_engine = partial(open_artifact, provider=provider, threads=threads)
        verdicts = []
        for one in source.routes:
            artifact = Artifact(route=one.name, format="onnx", precision=precision, path=folder / file_of(one))
            check_written(artifact.path)
            verdicts.append(judge(artifact, open_engine, answers.compared(one.name), limits))
            return_freed()
            listener("verify", one.name)
        routes = _kept(source.routes, verdicts)
        if len(routes) < len(verdicts):
            drop_unnamed(folder / WEIGHTS, [folder / str(one.file) for one in routes])
        kept = _timed(routes, folder, precision, profile, listener)
        write_references(folder / REFERENCES, answers, [one.name for one in kept])
        write_manifest(
            folder,
            Manifest(
                format="onnx", precision=precision, family=source.facts, weights=WEIGHTS, references=REFERENCES,
                routes=kept, files=entries(folder), provenance=source.provenance,
            ),
        )  # fmt: skip
        Package.open(folder)
    return Package.open(out, content=False), verdicts


def file_of(route: PackagedRoute) -> str:
    """The name of a route's graph."""
    return f"{route.name}.onnx"


def _write(source: Source, folder: Path, precision: str, images: Images, listener: Listener) -> Answers:
    """What torch answers; graphs and weights."""
    supernet = source.load([one.route for one in source.routes]).eval()
    give_back()
    answers = ask_torch(supernet, source.routes, images.test, listener)
    return_freed()
    _write_graphs(source, supernet, folder, precision, images, listener)
    return answers


def _write_graphs(
    source: Source, supernet: Supernet, folder: Path, precision: str, images: Images, listener: Listener
) -> None:
    facts = source.facts
    wanted = [one.route for one in source.routes]
    exporter = RouteExporter(supernet, facts.input_shape, converter(precision, images.calibration), wanted)
    listener("translate", "")
    with WeightsFile(folder / WEIGHTS) as weights:
        for one in source.routes:
            about = {"family": facts.name, "route": one.name, "weights": facts.weights, "precision": precision}
            write_graph(exporter.model(one.route), folder / file_of(one), weights, about)
            listener("export", one.name)


@torch.inference_mode()
def ask_torch(
    supernet: Supernet, routes: Iterable[PackagedRoute], test: Labelled, listener: Listener
) -> Answers:
    """The logits of every route; what routes begin with alike is computed once.

    Raises:
        VerificationError: there are no images.
    """
    wanted = [one.route for one in routes]
    found: dict[str, list[np.ndarray]] = {str(route): [] for route in wanted}
    with evaluating(supernet):
        for images, _ in test():
            for route, logits in supernet.forward_all(images, wanted):
                found[str(route)].append(logits.float().numpy())
            listener("torch", "")
    if not all(found.values()):
        raise VerificationError("There are no images to verify with: say --data DIR.")
    return Answers(logits={name: np.concatenate(parts) for name, parts in found.items()}, test=test)


def _kept(routes: Iterable[PackagedRoute], verdicts: list[Verdict]) -> tuple[PackagedRoute, ...]:
    """The routes that may be in the package; the graphs of the others are removed."""
    kept = []
    for one, verdict in zip(routes, verdicts, strict=True):
        if verdict.status == "refused":
            verdict.artifact.path.unlink()
        else:
            kept.append(replace(one, file=verdict.artifact.path.name, verification=verdict.verification))
    if not kept:
        first = verdicts[0]
        raise VerificationError(f"No route may be packaged; the first, {first.artifact.route}: {first.reason}")
    return tuple(kept)


def _timed(
    routes: Sequence[PackagedRoute], folder: Path, precision: str, profile: Profile | None, listener: Listener
) -> tuple[PackagedRoute, ...]:
    if profile is None:
        return tuple(one if precision == "fp32" else replace(one, latencies=()) for one in routes)
    timed = []
    for one in routes:
        found: tuple[LatencyRecord, ...] = ()
        if one.verification is not None and one.file is not None:
            found = tuple(replace(record, precision=precision) for record in profile(folder / one.file))
        timed.append(replace(one, latencies=found))
        listener("time", one.name)
    return tuple(timed)


def write_references(file: Path, answers: Answers, routes: Iterable[str]) -> None:
    """Keeps the first few images and what torch answered."""
    images = np.concatenate([part.numpy() for part, _ in answers.test()])
    count = min(len(images), 16, max(2, _REFERENCE_BYTES // images[0].nbytes))
    tensors = {f"logits/{name}": np.ascontiguousarray(answers.logits[name][:count]) for name in routes}
    # not save_file, which keeps the file from everybody but its owner
    file.write_bytes(save({"images": np.ascontiguousarray(images[:count]), **tensors}))


def entries(folder: Path) -> dict[str, FileEntry]:
    """Size and SHA-256 of every file, each synced to the disk."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        found[path.name] = FileEntry(size_bytes=path.stat().st_size, sha256=sha256_of(path))
    return found


@contextmanager
def staging(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the body is done, and is gone when it raises.

    Raises:
        PackageError: something stands at `out`.
    """
    out = out.absolute()
    if os.path.lexists(out) and not (out.is_dir() and not out.is_symlink() and not any(out.iterdir())):
        raise PackageError(f"{out} is there already and is no empty folder: name another --out.")
    make_directory(out.parent)
    folder = out.with_name(f".{out.name}.{os.urandom(4).hex()}.part")
    folder.mkdir()
    try:
        yield folder
        sync_directory(folder)
        folder.replace(out)  # an empty folder may be replaced
        sync_directory(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
