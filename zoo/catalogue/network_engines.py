"""Engines of one network in every precision and runtime: written, verified, evaluated and timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from klas_zoo.catalogue.evaluating import Evaluation, TestImages, evaluate_targets
from klas_zoo.catalogue.networks import Network
from klas_zoo.catalogue.registering import latencies_of
from klas_zoo.catalogue.targets import Target
from klas_zoo.errors import ExportError, UsageError, VerificationError
from klas_zoo.exporters.contract import Artifact, Verdict
from klas_zoo.exporters.decoded_images import ReferenceLogits
from klas_zoo.exporters.fp16_rounding import RoundedRun
from klas_zoo.exporters.graphs import check_graph, check_written, deployed_bytes
from klas_zoo.exporters.limits import images_needed, limits_for
from klas_zoo.exporters.manifest import FamilyFacts, Manifest, PackagedRoute, graph_metadata
from klas_zoo.exporters.onnx_files import write_network
from klas_zoo.exporters.onnx_session import verify_onnx
from klas_zoo.exporters.package import write_manifest
from klas_zoo.exporters.package_writing import entries, write_references
from klas_zoo.extras import explained
from klas_zoo.hardware import has_dot_products
from klas_zoo.profiles.devices import Device
from klas_zoo.profiles.latency import provider_on
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.profiles.runners import images_of
from klas_zoo.profiles.timing import Method
from klas_zoo.registry.records import NewEngine
from klas_zoo.routes import Route
from klas_zoo.versions import versions

WEIGHTS, REFERENCES = "weights.bin", "references.safetensors"
_SYNTHETIC_IMAGES = 16  # that engines are verified on where there are no real ones
_CALIBRATION_IMAGES = 200
Listener = Callable[[str], None]
"""Called with a sentence about what is done next."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """An accuracy that was not measured here: top-1 in per cent, and who states it."""

    top1: float
    source: str

    def __post_init__(self) -> None:
        if not (isinstance(self.top1, (int, float)) and 0 <= self.top1 <= 100):
            raise UsageError(f"A claimed top-1 is per cent, 0 to 100, not {self.top1}.")
        if not self.source.strip():
            raise UsageError("Who claims that top-1? Pass --top1-source TEXT, such as a paper or a model card.")


@dataclass(frozen=True, kw_only=True)
class NetworkEngines:
    """One network on its way into the registry."""

    network: Network
    folder: Path
    classes: tuple[str, ...]
    device: Device
    threads: int | None
    runtimes: tuple[str, ...]
    batches: tuple[int, ...]
    images: TestImages | None
    method: Method
    listener: Listener

    @property
    def route(self) -> Route:
        return Route.anchor(self.network.name, 1)

    @property
    def facts(self) -> FamilyFacts:
        network = self.network
        return FamilyFacts(
            name=network.name, input_shape=network.onnx.input_shape, num_classes=network.onnx.num_classes,
            weights=network.weights, data_config=network.preprocess.to_json(),
            anchors=({"name": network.name, "depth": 1},), classes=self.classes,
        )  # fmt: skip

    def engines(self, precisions: Sequence[str], claim: Claim | None) -> tuple[list[NewEngine], dict[str, str]]:
        """Engines of every precision and runtime, and why there is none in a precision.

        Raises:
            VerificationError: there is none at all.
        """
        found: list[NewEngine] = []
        refused: dict[str, str] = {}
        reference = self._reference(precisions)
        for precision in precisions:
            self.listener(f"exporting and verifying {self.network.name} in {precision}")
            package = self.folder / precision
            try:
                graph, rounded = self._write(package, precision, reference)
            except ExportError as error:
                refused[precision] = str(error)
                continue
            verdicts = {
                runtime: self._verdict(graph, precision, runtime, reference, rounded) for runtime in self.runtimes
            }
            passed = [runtime for runtime, one in verdicts.items() if one.status == "verified"]
            if not passed:
                refused[precision] = next(iter(verdicts.values())).reason
                continue
            accuracies = {runtime: self._accuracy(graph, precision, runtime) for runtime in passed}
            timed = {runtime: self._latencies(graph, precision, runtime) for runtime in passed}
            _finish(self, package, precision, reference, verdicts[passed[0]], accuracies[passed[0]], claim)
            found += [
                self._engine(graph, precision, runtime, verdicts[runtime], accuracies[runtime], timed[runtime], claim)
                for runtime in passed
            ]
        if not found:
            raise VerificationError(
                f"{self.network.name} was not registered, as no engine computes what {self.network.reference_name} "
                f"does: {next(iter(refused.values()))}"
            )
        return found, refused

    def _reference(self, precisions: Sequence[str]) -> ReferenceLogits:
        network = self.network
        needed = max(images_needed(limits_for(one, network.weights)) for one in precisions)
        count = min(needed, network.most_images or needed)
        size = network.onnx.batch or 8
        parts, logits, labels = [], [], []
        for images, of_images in self._batches(count, size):
            parts.append(images)
            labels.append(of_images)
            logits.append(_in_batches(network.reference, images, size))
        known = np.concatenate(labels) if self.images is not None else None
        return ReferenceLogits.of_arrays(np.concatenate(parts), {network.name: np.concatenate(logits)}, known)

    def _batches(self, count: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Evenly spread test images and their labels; random ones without."""
        if self.images is None:
            count = min(count, _SYNTHETIC_IMAGES)
            yield images_of(count, self.network.onnx.input_shape), np.zeros(count, int)
            return
        labels = self.images.source.labels
        count = min(count, len(labels))
        chosen = [number * len(labels) // count for number in range(count)]
        for start in range(0, count, 64):
            some = chosen[start : start + 64]
            yield self.images.prepared(self.network.preprocess, some), np.asarray([labels[one] for one in some])

    def _write(
        self, package: Path, precision: str, reference: ReferenceLogits
    ) -> tuple[Path, dict[str, RoundedRun]]:
        """The graph of a package, and what rounding to fp16 does to it."""
        rounded: dict[str, RoundedRun] = {}
        network, graph = self.network, package / f"{self.network.name}.onnx"
        package.mkdir()
        if precision == network.onnx.precision:
            about = graph_metadata(self.facts, str(self.route), precision)
            write_network(network.onnx, graph, package / WEIGHTS, about)
        else:
            with explained(f"Converting a graph to {precision}"):
                rounded = self._convert(package, graph, precision, reference)
        check_written(graph)
        check_graph(graph, package / WEIGHTS)
        return graph, rounded

    def _convert(
        self, package: Path, graph: Path, precision: str, reference: ReferenceLogits
    ) -> dict[str, RoundedRun]:
        import onnx
        import onnx_ir as ir
        import torch

        from klas_zoo.exporters.fp16_graphs import write_fp16
        from klas_zoo.exporters.precision import Convert, converter
        from klas_zoo.exporters.reduced_precision import Half
        from klas_zoo.exporters.weights import WeightsFile, drop_unnamed, write_graph

        def calibration() -> Iterator[tuple[Any, Any]]:
            for images, labels in self._batches(_CALIBRATION_IMAGES, 8):
                yield torch.from_numpy(images), torch.from_numpy(labels)

        # converters look at the types of values, which a file need not hold
        typed = ir.from_proto(onnx.shape_inference.infer_shapes(self.network.onnx.model))
        here = self.device.kind == "cpu" and self.device.here and has_dot_products()
        convert = converter(precision, calibration, 8 if here else 7)
        about = graph_metadata(self.facts, str(self.route), precision)
        with WeightsFile(package / WEIGHTS) as weights:

            def write(convert: Convert) -> None:
                model = convert(typed.clone(), self.network.name)
                write_graph(model, graph, weights, about)
                weights.flush()

            if not isinstance(convert, Half) or precision != "fp16":
                write(convert)
                return {}
            artifact = Artifact(route=self.network.name, format="onnx", precision=precision, path=graph)
            run = write_fp16(artifact, write, convert, reference, self.network.weights, threads=self.threads)
        if run.fp32_residual:
            drop_unnamed(package / WEIGHTS, [graph])
        return {self.network.name: run}

    def _verdict(
        self, graph: Path, precision: str, runtime: str, reference: ReferenceLogits, rounded: Mapping[str, RoundedRun]
    ) -> Verdict:
        artifact = Artifact(route=self.network.name, format="onnx", precision=precision, path=graph)
        provider = provider_on(runtime, self.device)
        (found,) = verify_onnx(
            [artifact], reference, self.network.weights, provider=provider, threads=self.threads, runtime=runtime,
            rounded=rounded,
        )  # fmt: skip
        return found

    def _accuracy(self, graph: Path, precision: str, runtime: str) -> Evaluation | None:
        if self.images is None:
            return None
        self.listener(f"evaluating {self.network.name} in {precision} ({runtime})")
        target = Target(
            name=f"{self.network.name} ({runtime}, {precision})", family=self.network.name, route=str(self.route),
            path=graph, format="onnx", runtime=runtime, precision=precision, threads=self.threads,
            provider=provider_on(runtime, self.device), num_classes=self.network.onnx.num_classes,
            preprocess=self.network.preprocess,
        )  # fmt: skip
        (found,) = evaluate_targets([target], self.images)
        return found

    def _latencies(self, graph: Path, precision: str, runtime: str) -> tuple[LatencyRecord, ...]:
        self.listener(f"timing {self.network.name} in {precision} ({runtime})")
        return latencies_of(
            graph, device=self.device, runtime=runtime, precision=precision,
            input_shape=self.network.onnx.input_shape, batches=self.batches, threads=self.threads, method=self.method,
        )  # fmt: skip

    def _engine(
        self, graph: Path, precision: str, runtime: str, verdict: Verdict, seen: Evaluation | None,
        latencies: tuple[LatencyRecord, ...], claim: Claim | None,
    ) -> NewEngine:  # fmt: skip
        network = self.network
        accuracy: dict[str, Any]
        if seen is not None:
            accuracy = {
                "top1": seen.top1, "top5": seen.top5, "images": seen.images, "dataset": seen.dataset,
                "data_fingerprint": seen.data_fingerprint,
            }  # fmt: skip
        else:
            assert claim is not None  # without images an accuracy is claimed
            accuracy = {
                "top1": claim.top1, "images": 0, "accuracy_source": claim.source, "dataset": "unknown images",
                "data_fingerprint": "",
            }  # fmt: skip
        return NewEngine(
            family=network.name, route=self.route, device=self.device.name, runtime=runtime, precision=precision,
            macs=network.onnx.macs, parameters=network.onnx.parameters, input_shape=network.onnx.input_shape,
            num_classes=network.onnx.num_classes, preprocessing=network.preprocess.to_json(),
            verification=verdict.verification, latencies=latencies, weights=network.weights, file=graph,
            size_bytes=deployed_bytes(graph), **accuracy,
        )  # fmt: skip


def _finish(
    work: NetworkEngines, package: Path, precision: str, reference: ReferenceLogits, verdict: Verdict,
    seen: Evaluation | None, claim: Claim | None,
) -> None:  # fmt: skip
    """Writes the references and the manifest of a package, which make it one."""
    network = work.network
    write_references(package / REFERENCES, reference, [network.name])
    route = PackagedRoute(
        route=work.route, file=f"{network.name}.onnx", macs=network.onnx.macs, parameters=network.onnx.parameters,
        top1=seen.top1 if seen else None, images=seen.images if seen else 0, on_frontier=True,
        verification=verdict.verification, latencies=(),
    )  # fmt: skip
    about: dict[str, Any] = {"source": network.source, "verified_with": network.reference_name, "versions": versions()}
    if claim is not None:
        about |= {"claimed_top1": claim.top1, "claimed_by": claim.source}
    write_manifest(
        package,
        Manifest(
            format="onnx", precision=precision, family=work.facts, weights=WEIGHTS, references=REFERENCES,
            routes=(route,), files=entries(package), provenance=about,
            data={"description": seen.dataset, "fingerprint": seen.data_fingerprint} if seen else {},
        ),
    )  # fmt: skip


def _in_batches(logits: Callable[[np.ndarray], np.ndarray], images: np.ndarray, size: int) -> np.ndarray:
    """Logits of all images, asked for in batches of one size; the last one repeats its last image."""
    found = []
    for start in range(0, len(images), size):
        part = images[start : start + size]
        padded = np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
        found.append(logits(padded)[: len(part)])
    return np.concatenate(found)
