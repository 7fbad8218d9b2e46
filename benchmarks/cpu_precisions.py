#!/usr/bin/env python3
"""Precisions and runtimes on this machine's processor, all engines of a network in one interleaved run.

    benchmarks/cpu_precisions.py --models deit_tiny_patch16_224,resnet50 --seconds 30     # timm's, random weights
    benchmarks/cpu_precisions.py --agreement                       # of deit-micro's anchors, on its real test images

Latencies are ratios to onnxruntime in fp32: every round runs each engine once, and the table has the median and the
quartiles of the rounds' ratios, so that a machine that is busy with something else slows down all alike.
Writes results/cpu-precisions.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from record import read_record, write_record

from klas_zoo.data.arrays import open_sample
from klas_zoo.exporters.int8 import Scheme, quantised
from klas_zoo.exporters.to_onnx import export
from klas_zoo.families.anchors import load_family
from klas_zoo.families.specs import builtin_families
from klas_zoo.preprocess import Preprocess
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.runtimes import open_engine

SCHEMES = {
    "int8, 7 bits": Scheme(),
    "int8, 8 bits": Scheme(weight_bits=8),
    "int8, 8 bits, signed": Scheme(weight_bits=8, signed=True),
}
MODELS = "deit_tiny_patch16_224,deit_small_patch16_224,deit_base_patch16_224,resnet50"
BF16 = {"INFERENCE_PRECISION_HINT": "bf16"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=MODELS)
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--agreement", action="store_true")
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    names = ["tiny", "small", "base"] if chosen.agreement else chosen.models.split(",")
    title = f"cpu-{'agreement' if chosen.agreement else 'precisions'}"
    before = read_record(title)  # of other networks, where it is of the same processor
    found = before["networks"] if before.get("hardware") == resolve_device("cpu").hardware else {}
    for name in names:
        found[name] = agreement(name, chosen.threads) if chosen.agreement else latencies(name, chosen)
        for row, values in found[name].items():
            print(f"{name:28} {row:34} {json.dumps(values)}", flush=True)
        write_record(title, {"networks": found})


def latencies(name: str, chosen: argparse.Namespace) -> dict[str, Any]:
    import timm

    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    shape = model.default_cfg["input_size"]
    images = real_images(shape, 40)
    with tempfile.TemporaryDirectory() as folder:
        graphs = variants(model, shape, images[:8], Path(folder))
        sessions = dict(opened(graphs, chosen.threads))
        return raced(sessions, images[:1], chosen.seconds)


def agreement(name: str, threads: int) -> dict[str, Any]:
    """Equal top classes and top-1 of every engine of an embedded network."""
    spec = builtin_families()["deit-micro"]
    family = load_family(spec)
    assert spec.sample is not None
    source = open_sample(spec.sample)[1]
    facts = json.loads(json.dumps(dict(family.data_config)))
    preprocess = Preprocess.from_json({**facts, "input_size": family.input_shape})
    images = np.stack([preprocess(source.image(number)) for number in range(len(source.labels))])
    held = open_sample(spec.sample)[0]
    calibration = np.stack([preprocess(held.image(number)) for number in range(200)])
    chain = family.chains[name].eval()
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        graphs = variants(chain, family.input_shape, calibration, Path(folder))
        expected = None
        for row, session in opened(graphs, threads):
            top = np.concatenate([session.run(images[at : at + 100]).argmax(1) for at in range(0, len(images), 100)])
            expected = top if expected is None else expected
            found[row] = {
                "images": len(images), "equal": round(float((top == expected).mean()), 5),
                "top1": round(100 * float((top == np.asarray(source.labels)).mean()), 3),
            }  # fmt: skip
    return found


def real_images(shape: Sequence[int], count: int) -> np.ndarray:
    """Of CIFAR-10, scaled."""
    sample = builtin_families()["deit-micro"].sample
    assert sample is not None
    source = open_sample(sample)[1]
    preprocess = Preprocess.from_json(
        {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic", "crop_pct": 1.0,
         "input_size": tuple(shape)}
    )  # fmt: skip
    return np.stack([preprocess(source.image(number)) for number in range(count)])


def variants(
    module: torch.nn.Module, shape: Sequence[int], calibration: np.ndarray, folder: Path
) -> dict[str, Path]:
    """One graph for each precision."""
    whole = folder / "fp32.onnx"
    export(module, tuple(shape), whole, metadata={})  # type: ignore[arg-type]
    graphs = {"fp32": whole}
    fused = folder / "fused.onnx"
    export(module, tuple(shape), fused, metadata={}, opset=23)  # type: ignore[arg-type]
    if any(node.op_type == "Attention" for node in onnx.load(fused).graph.node):
        graphs["fp32, Attention"] = fused

    def batches() -> Iterator[tuple[torch.Tensor, None]]:
        for start in range(0, len(calibration), 8):
            yield torch.from_numpy(calibration[start : start + 8]), None

    for number, (row, scheme) in enumerate(SCHEMES.items()):
        typed = ir.from_proto(onnx.shape_inference.infer_shapes(onnx.load(whole)))
        model = partial(quantised, calibration=batches, scheme=scheme)(typed, row)
        graphs[row] = folder / f"int8-{number}.onnx"
        ir.save(model, graphs[row])
    return graphs


def opened(graphs: dict[str, Path], threads: int) -> Iterator[tuple[str, Any]]:
    for row, graph in graphs.items():
        yield f"onnxruntime {row}", open_engine(graph, threads=threads)
    for row, graph in graphs.items():
        if "Attention" not in row:
            yield f"openvino {row}", open_engine(graph, runtime="openvino", threads=threads)
    yield "openvino bf16", open_engine(graphs["fp32"], runtime="openvino", threads=threads, options=BF16)


def raced(sessions: dict[str, Any], images: np.ndarray, seconds: float) -> dict[str, Any]:
    """Every engine once in each round."""
    for session in sessions.values():
        for _ in range(3):
            session.run(images)
    times: dict[str, list[float]] = {row: [] for row in sessions}
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(next(iter(times.values()))) < 20:
        for row, session in sessions.items():
            start = time.perf_counter()
            session.run(images)
            times[row].append(1000 * (time.perf_counter() - start))
    first = np.asarray(times["onnxruntime fp32"])
    found = {}
    for row, values in times.items():
        quartiles = np.percentile(first / np.asarray(values), (25, 50, 75))
        found[row] = {
            "rounds": len(values), "median_ms": round(float(np.median(values)), 3),
            "times_as_fast": [round(float(one), 3) for one in quartiles],
        }  # fmt: skip
    return found


if __name__ == "__main__":
    main()
