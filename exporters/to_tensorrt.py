"""ONNX graphs as TensorRT engines, by one path for TensorRT 10 and 11 and TensorRT for RTX.

Networks are strongly typed: every tensor has the type the graph gives it, and precision is the
exporter's choice, not the builder's. TensorRT 11 knows nothing else. TF32 is switched off, or
fp32 would keep 10 of its 23 bits.

Measured with TensorRT for RTX 1.7.1 on a machine without a GPU: two builds give the same bytes;
DeiT-Ti takes 3.5 s and 28.5 MB, of which 22.8 MB are weights. Stripped and refittable engines
cannot be built there (`graph_jit.cpp: CHECK(status == CUDA_SUCCESS)`), nor fp32 ones for 7.5.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klas_zoo.errors import ExportError, UsageError
from klas_zoo.exporters.contract import stage
from klas_zoo.exporters.gpu_targets import ComputeCapability, present_capability
from klas_zoo.exporters.trt_graph import for_tensorrt
from klas_zoo.files import replacing, sha256_of
from klas_zoo.hardware import present_gpu
from klas_zoo.runtimes.plans import BatchRange, PlanRecord, write_record
from klas_zoo.runtimes.trt import Library, find_library

ONE_TO_32 = BatchRange(smallest=1, usual=8, largest=32)


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """Everything that determines an engine, besides its graph.

    Attributes:
        runtime: `tensorrt` or `tensorrt-rtx`.
        capabilities: to build for; empty: this machine's GPU.
        precision: of the graph; only written down.
        profiles: batch sizes, one optimisation profile each.
        strip: leave out weights that the graph has, to be filled in at load.
        timing_cache: file that TensorRT's measurements are kept in from build to build.
    """

    runtime: str
    capabilities: tuple[ComputeCapability, ...] = ()
    precision: str = "fp32"
    profiles: tuple[BatchRange, ...] = (ONE_TO_32,)
    strip: bool = False
    timing_cache: Path | None = None


def build_plan(graph: Path, engine: Path, settings: PlanSettings) -> PlanRecord:
    """Builds an engine and writes it, and what it is beside it. It has not been run then.

    Args:
        graph: an ONNX file, with its external data in place: images (B, C, H, W) → logits (B, classes).

    Raises:
        ExportError: names the stage that failed: parse or build.
        UsageError: the library cannot build for such a GPU.
        KlasZooError: the library is not installed.
    """
    library = find_library(settings.runtime)
    targets = _targets(library, settings.capabilities)
    builder = library.module.Builder(library.log)
    network = _parse(library, builder, graph)
    image = tuple(network.get_input(0).shape)[1:]
    config = _configuration(library, builder, settings, targets)
    for batches in settings.profiles:
        profile = builder.create_optimization_profile()
        sizes = (batches.smallest, batches.usual, batches.largest)
        profile.set_shape(network.get_input(0).name, *((size, *image) for size in sizes))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(_why_not(library, graph, settings))
    with replacing(engine) as temporary:
        temporary.write_bytes(plan)
    _keep_timings(config, settings)
    record = PlanRecord(
        runtime=settings.runtime,
        runtime_version=library.version,
        capabilities=tuple(map(str, targets)),
        precision=settings.precision,
        profiles=settings.profiles,
        input_shape=image,
        classes=int(network.get_output(0).shape[1]),
        weights="stripped" if settings.strip else "inside",
        graph_sha256=sha256_of(graph),
        sha256=sha256_of(engine),
        size_bytes=engine.stat().st_size,
        gpu=present_gpu() if settings.runtime == "tensorrt" else None,
    )
    write_record(engine, record)
    return record


def buildable(library: Library) -> list[ComputeCapability]:
    """Capabilities a library builds for on this machine."""
    if library.runtime == "tensorrt":  # measures kernels, so it builds for the GPU that is there
        present = present_capability()
        return [present] if present else []
    names = library.module.ComputeCapability.__members__
    return sorted(ComputeCapability.parse(name) for name in names if name.startswith("SM"))


def _targets(library: Library, wanted: Sequence[ComputeCapability]) -> tuple[ComputeCapability, ...]:
    if not wanted:
        present = present_capability()
        if present is None:
            raise UsageError("This machine has no GPU to build an engine for: --device a100, or any other, names one.")
        wanted = (present,)
    possible = buildable(library)
    for one in wanted:
        if one not in possible:
            builds = f"builds for {', '.join(map(str, possible))}" if possible else "builds only where its GPU is"
            raise UsageError(
                f"{library.runtime} {library.version} cannot build for compute capability {one} here: it {builds}."
            )
    return tuple(dict.fromkeys(wanted))


def _parse(library: Library, builder: Any, graph: Path) -> Any:
    trt = library.module
    # TensorRT 11 has no other networks, and may one day have no word for it
    typed = trt.NetworkDefinitionCreationFlag.__members__.get("STRONGLY_TYPED")
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, library.log)
    with stage("prepare for TensorRT", graph.name):
        content = for_tensorrt(graph)
    if not parser.parse(content, path=str(graph)):
        why = parser.get_error(0).desc() if parser.num_errors else library.complaint()
        raise ExportError(f"Cannot build an engine from {graph}: {library.runtime} failed to parse it ({why}).")
    library.complaint()
    _let_attention_fall_apart(trt, network)
    return network


def _let_attention_fall_apart(trt: Any, network: Any) -> None:
    """Where no fused kernel takes an attention's type or width, it is built from products and softmax.

    Otherwise the whole build fails: "Attention operation was not supported by a dedicated kernel".
    """
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type.name == "ATTENTION_INPUT":
            layer.__class__ = trt.IAttentionInputLayer  # how the library's Python casts a layer
            layer.attention.decomposable = True


def _configuration(
    library: Library, builder: Any, settings: PlanSettings, targets: Sequence[ComputeCapability]
) -> Any:
    trt = library.module
    config = builder.create_builder_config()
    tf32 = trt.BuilderFlag.__members__.get("TF32")
    if tf32 is not None:
        config.clear_flag(tf32)
    if settings.strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if library.runtime == "tensorrt-rtx":
        config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            config.set_compute_capability(trt.ComputeCapability.__members__[target.sm], index)
        if settings.timing_cache is not None:
            raise UsageError("tensorrt-rtx measures nothing while it builds: it takes no timing cache.")
    elif settings.timing_cache is not None:
        kept = b""
        with contextlib.suppress(FileNotFoundError):
            kept = settings.timing_cache.read_bytes()
        # measurements of another GPU or version are of no use: the library refuses them, and an empty cache takes over
        if not config.set_timing_cache(config.create_timing_cache(kept), ignore_mismatch=False):
            config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return config


def _keep_timings(config: Any, settings: PlanSettings) -> None:
    # an engine that is built is worth more than its timings: a library without any must not end the build here
    timings = config.get_timing_cache() if settings.timing_cache is not None else None
    if settings.timing_cache is not None and timings is not None:
        with replacing(settings.timing_cache) as temporary:
            temporary.write_bytes(timings.serialize())


def _why_not(library: Library, graph: Path, settings: PlanSettings) -> str:
    said = f"Cannot build an engine from {graph}: {library.runtime} failed to build it ({library.complaint()})."
    if settings.strip and present_capability() is None:
        said += " Stripped engines can be built only on a machine with a GPU."
    return said
