"""Latencies in onnxruntime and torch, by the clock of the host and of the device."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpu.visit import BATCHES, Visit, medians, ready_first, timed_session


def family_latency(visit: Visit) -> None:
    """(e) A stitch of every family in onnxruntime, fp32 and fp16: what the roofline is compared with."""
    from klas_zoo.runtimes import CUDA_PROVIDER, open_engine

    rows = visit.rows("latency-families")

    def one(path: Path, shape: tuple[int, ...]) -> Mapping[str, Any]:
        with open_engine(path, provider=CUDA_PROVIDER) as session:
            return {str(batch): timed_session(visit, session, shape, batch) for batch in BATCHES}

    for family in ready_first(visit):
        folder = visit.wait_for(family)
        shape = np.load(folder / "reference.npz")["images"].shape[1:]
        route = json.loads((folder / "done.json").read_text())["routes"][1]
        if family != visit.profiled:
            for precision in ("fp32", "fp16"):
                path = folder / precision / f"{route}.onnx"
                rows.do(f"{family} {precision} {route}", partial(one, path, shape))


TORCH_MODES = (("eager", "fp32"), ("eager", "fp16"), ("cuda-graph", "fp32"), ("cuda-graph", "fp16"), ("eager", "bf16"))


COMPILED_MODES = (("compile", "fp16"), ("compile", "fp32"))


_OPTIONS: Mapping[str, Mapping[str, str]] = {
    "eager": {}, "cuda-graph": {"cuda_graph": "1"}, "compile": {"compile": "1"},
}  # fmt: skip


def torch_latency(visit: Visit) -> None:
    """(c) Anchors in torch: eager and as a CUDA graph; host's clock from numpy to numpy, and the device's."""
    _torch_latency(visit, "latency-torch", TORCH_MODES)


def compiled_latency(visit: Visit) -> None:
    """(c) The same compiled; compiling takes most of the time, so this can run before for torch's own cache."""
    if not visit.measured:
        visit.rows("latency-compiled").add("all", {"skipped": "the fake driver cannot load generated kernels"})
        return
    _torch_latency(visit, "latency-compiled", COMPILED_MODES)


def _torch_latency(visit: Visit, name: str, modes: Sequence[tuple[str, str]]) -> None:
    import torch

    from klas_zoo.families.anchors import load_family
    from klas_zoo.families.specs import find_family
    from klas_zoo.profiles.runners import SessionRunner, images_of
    from klas_zoo.profiles.timing import time_in_turn
    from klas_zoo.routes import Route
    from klas_zoo.runtimes import open_engine
    from klas_zoo.supernet import Supernet

    rows = visit.rows(name)
    family = load_family(find_family(visit.profiled), random_weights=True)
    anchors = {name: Route.anchor(name, chain.depth) for name, chain in family.chains.items()}
    supernet = Supernet(family.chains, list(anchors.values())).cpu().eval()

    def one(mode: str, precision: str, anchor: str, batch: int) -> Mapping[str, Any]:
        torch.compiler.reset()
        network = supernet.network(anchors[anchor])
        options = {"precision": precision, **_OPTIONS[mode]}
        with open_engine(network, runtime="torch", provider="cuda", options=options) as session:
            runner = SessionRunner(session, images_of(batch, family.input_shape), device_clock=True)
            return medians(time_in_turn({"one": runner}, visit.method())["one"])

    for mode, precision in modes:
        for batch in BATCHES:
            for anchor in anchors:
                key = f"torch {mode} {precision} {anchor} batch {batch}"
                rows.do(key, partial(one, mode, precision, anchor, batch))


def onnx_latency(visit: Visit) -> None:
    """(c) The same anchors in onnxruntime; the plain loop over numpy images that a latency in `pick` has to match."""
    from klas_zoo.profiles.runners import images_of
    from klas_zoo.runtimes import CUDA_PROVIDER, open_engine

    rows = visit.rows("latency-onnxruntime")
    folder = visit.wait_for(visit.profiled)
    done = json.loads((folder / "done.json").read_text())
    shape = np.load(folder / "reference.npz")["images"].shape[1:]
    anchors = [name for name in done["routes"] if "." not in name and "+" not in name]

    def one(precision: str, options: Mapping[str, str], anchor: str, batches: Sequence[int]) -> Mapping[str, Any]:
        path = folder / precision / f"{anchor}.onnx"
        with open_engine(path, provider=CUDA_PROVIDER, options=options) as session:
            found = {}
            for batch in batches:
                found[str(batch)] = timed_session(visit, session, shape, batch)
                found[str(batch)]["plain_loop_p50_ms"] = _plain_loop(session, images_of(batch, shape), visit.quick)
            return found

    for label, precision, options, batches in _ONNX_CASES:
        for anchor in anchors:
            rows.do(f"onnxruntime {label} {precision} {anchor}", partial(one, precision, options, anchor, batches))


_GRAPH: Mapping[str, str] = {"enable_cuda_graph": "1"}


_ONNX_CASES: tuple[tuple[str, str, Mapping[str, str], tuple[int, ...]], ...] = (
    ("plain", "fp32", {}, BATCHES), ("plain", "fp16", {}, BATCHES), ("cuda-graph", "fp16", _GRAPH, BATCHES),
    ("cuda-graph", "fp32", _GRAPH, (1, 8)), ("tf32", "fp32", {"use_tf32": "1"}, (8,)),
)  # fmt: skip


def _plain_loop(session: Any, images: np.ndarray, quick: bool) -> float:
    """Median milliseconds of a caller's own loop over numpy images, with nothing of this project in it."""
    raw, times = session.raw, []
    given = images.astype(np.float16) if "float16" in raw.get_inputs()[0].type else images
    name = raw.get_inputs()[0].name
    for _ in range(4 if quick else 60):
        before = time.perf_counter()
        if session._graphs is None:
            raw.run(None, {name: given})
        else:  # a captured graph has its own input: onnxruntime's plain call does not replay it
            session.run(images)
        times.append(1e3 * (time.perf_counter() - before))
    return float(np.median(times[len(times) // 4 :]))
