"""What the check of fp16 engines costs a build on a CPU: a run with every operator rounded, beside plain verification.

    python benchmarks/fp16_check.py --graphs DIR --prepare     # exports, minutes
    python benchmarks/fp16_check.py --graphs DIR [--threads N] [--out FILE]

For each network, as an engine of random weights: seconds to run its fp16 graph with rounding on 32 images, once for
each fp16 engine of a build (`klas_zoo.exporters.fp16_rounding`), and to verify the same graph as it is on 1,000 images,
as a build does with every engine. The latter is measured on 64 images and scaled.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from klas_zoo.exporters.contract import Artifact
from klas_zoo.exporters.decoded_images import ReferenceLogits
from klas_zoo.exporters.fp16_rounding import IMAGES, rounded_run
from klas_zoo.exporters.limits import limits_for
from klas_zoo.exporters.onnx_session import verify_onnx
from klas_zoo.hardware import describe_cpu
from klas_zoo.profiles.runners import images_of
from klas_zoo.runtimes import CPU_PROVIDER
from klas_zoo.versions import versions_of

NETWORKS = (("deit-micro", "base"), ("deit", "tiny"), ("deit", "base"), ("resnet", "resnet18"), ("swin", "tiny"))
TIMED, VERIFIED_ON = 64, 1_000


def prepare(folder: Path) -> None:
    import torch

    from klas_zoo.exporters.precision import converter
    from klas_zoo.exporters.to_onnx import RouteExporter
    from klas_zoo.families.anchors import load_family
    from klas_zoo.families.specs import find_family
    from klas_zoo.routes import Route
    from klas_zoo.supernet import Supernet

    for name, anchor in NETWORKS:
        path = folder / f"{name}-{anchor}.onnx"
        if path.with_suffix(".npz").is_file():
            continue
        family = load_family(find_family(name), random_weights=True)
        route = Route.anchor(anchor, family.chains[anchor].depth)
        supernet = Supernet({anchor: family.chains[anchor]}, [route]).eval()
        exporter = RouteExporter(supernet, family.input_shape, converter("fp16", list))
        exporter.export(route, path, metadata={})
        images = images_of(TIMED, family.input_shape)
        with torch.inference_mode():
            parts = [supernet(part, route) for part in torch.from_numpy(images).split(8)]
        np.savez(path.with_suffix(".npz"), images=images, logits=torch.cat(parts).numpy())


def timed(path: Path, threads: int) -> dict[str, Any]:
    stored = np.load(path.with_suffix(".npz"))
    reference = ReferenceLogits.of_arrays(stored["images"], {path.stem: stored["logits"]})
    artifact = Artifact(route=path.stem, format="onnx", precision="fp16", path=path)
    started = time.perf_counter()
    run = rounded_run(artifact, reference, limits_for("fp16", "random"), threads=threads)
    rounded_s = time.perf_counter() - started
    started = time.perf_counter()
    verify_onnx(
        [artifact], reference, "random", provider=CPU_PROVIDER, threads=threads, rounded={path.stem: run}
    )  # fmt: skip
    plain_s = (time.perf_counter() - started) * VERIFIED_ON / TIMED
    return {"rounded_s": round(rounded_s, 2), "plain_s": round(plain_s, 2), "passed": run.passed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--graphs", type=Path, required=True)
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    given.graphs.mkdir(parents=True, exist_ok=True)
    if given.prepare:
        prepare(given.graphs)
        return
    found: dict[str, Any] = {
        "cpu": describe_cpu(), "threads": given.threads, "rounded_images": IMAGES, "verified_images": VERIFIED_ON,
        "versions": versions_of("torch", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy"),
    }  # fmt: skip
    found["networks"] = {}
    for path in sorted(given.graphs.glob("*.onnx")):
        found["networks"][path.stem] = timed(path, given.threads)
        print(path.stem, found["networks"][path.stem], flush=True)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
