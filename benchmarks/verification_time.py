"""What verifying costs beside running the engines: `packages.py verify` runs this.

Engines are the anchors Ti and S of DeiT and stitches between them, at random weights; images are JPEG files of
ImageNet's usual size, made for this. One thread, and processor time, which other programs hardly change:

    decode     the images, once
    torch      the reference logits of all routes, with shared prefixes
    verify     opening every engine, running it over all images, comparing its logits
    engines    running the same engines over the same batches, and nothing else

`engines_at_once` is wall time, and needs a quiet machine: engines that run at once with one thread each, beside one
engine after the other with all threads.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from klas_zoo.exporters.package import Package

_PIXELS = (375, 500)  # the most frequent size in ImageNet
_IMAGES_TO_TIME = 32  # of which an engine's own time for an image is the mean
_ROUNDS = 4
T = TypeVar("T")


def routes(count: int, listed: list[dict[str, Any]]) -> list[str]:
    """The anchors Ti and S, and stitches between them, evenly spread."""
    between = [one["route"] for one in listed if one["route"].startswith("tiny.") and "+small." in one["route"]]
    return ["tiny", "small", *(between[n * len(between) // (count - 2)] for n in range(count - 2))]


def make_jpegs(folder: Path, count: int) -> Path:
    """Images of smooth noise, so that their files have the size of photographs': train/ and val/ of two classes."""
    for split, images in (("train", 16), ("val", count)):
        for number in range(images):
            file = folder / split / ("n01440764", "n01443537")[number % 2] / f"{number:05}.jpg"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                coarse = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
                picture = Image.fromarray(coarse).resize(_PIXELS[::-1], Image.Resampling.BICUBIC)
                picture.save(file, quality=90)
    return folder


def measure(package: Package, data: Path, count: int) -> dict[str, Any]:
    """In a process of its own: processor seconds of every part, for `count` images."""
    import torch

    from klas_zoo.building.exporting import images_for
    from klas_zoo.building.package_sources import choose, random_source
    from klas_zoo.exporters.contract import Artifact
    from klas_zoo.exporters.limits import limits_for
    from klas_zoo.exporters.onnx_session import open_onnx
    from klas_zoo.exporters.reference_logits import reference_logits
    from klas_zoo.exporters.verification import verify_engines
    from klas_zoo.families.specs import find_family
    from klas_zoo.runtimes import CPU_PROVIDER

    torch.set_num_threads(1)
    spec, names = find_family("deit"), [one.name for one in package.routes]
    source = choose(random_source(spec, 0, names), names=names)
    images, _ = images_for(spec, source, data, precision="fp32", count=count, seed=0)
    _, decode_s = _timed(lambda: [None for _ in images.test()])
    wanted = [one.route for one in source.routes]
    reference, torch_s = _timed(partial(reference_logits, source.load(wanted), wanted, images.test))
    open_engine = partial(open_onnx, provider=CPU_PROVIDER, threads=1)
    verify_s, engines_s = [], []
    for one in package.routes:
        artifact = Artifact(route=one.name, format="onnx", precision="fp32", path=package.engine(one))
        limits = lambda one: limits_for(one.precision, "random")  # noqa: E731
        (verdict,), taken = _timed(partial(verify_engines, [artifact], open_engine, reference, limits))
        if verdict.status != "verified":
            raise SystemExit(verdict.reason)
        verify_s.append(taken)
        engines_s.append(_alone(open_engine(artifact).outputs, reference.images, count))
    engines, whole = sum(engines_s), decode_s + sum(verify_s)
    return {
        "engines": len(package.routes),
        "images": count,
        "decode_s": decode_s,
        "torch_s": torch_s - decode_s,
        "verify_s": sum(verify_s),
        "engines_s": engines,
        "ms_per_image_and_engine": 1e3 * engines / count / len(package.routes),
        "decoding_and_verifying_over_engines": whole / engines,
        "worst_engine_verifying_over_running": max(v / e for v, e in zip(verify_s, engines_s, strict=True)),
        "torch_over_engines": (torch_s - decode_s) / engines,
        "all_over_engines": (torch_s + sum(verify_s)) / engines,
        "load_average": os.getloadavg()[0],
    }


def at_once(package: Package, threads: int) -> dict[str, Any]:
    """Wall seconds for the same engines and images: all threads in one engine, or an engine in each thread."""
    from klas_zoo.exporters.contract import Artifact
    from klas_zoo.exporters.limits import VerificationLimits
    from klas_zoo.exporters.onnx_session import open_onnx
    from klas_zoo.exporters.reference_logits import ReferenceLogits
    from klas_zoo.exporters.verification import verify_engines
    from klas_zoo.runtimes import CPU_PROVIDER

    family = package.manifest.family
    images = np.random.default_rng(0).standard_normal((24, *family.input_shape), dtype=np.float32)
    chosen = package.routes[:: max(1, len(package.routes) // 4)][:4]
    artifacts = [
        Artifact(route=one.name, format="onnx", precision="fp32", path=package.engine(one)) for one in chosen
    ]
    logits = np.zeros((len(images), family.num_classes), np.float32)
    reference = ReferenceLogits.of_arrays(images, {one.name: logits for one in chosen})

    def run(engines: int) -> float:
        started = time.perf_counter()
        verify_engines(
            artifacts, partial(open_onnx, provider=CPU_PROVIDER, threads=threads // engines), reference,
            lambda one: VerificationLimits(relative=0.0), parallel=engines,
        )  # fmt: skip
        return time.perf_counter() - started

    run(1)
    turns = [(run(1), run(threads)) for _ in range(_ROUNDS)]
    one_by_one, together = np.median(turns, axis=0)
    return {
        "threads": threads,
        "one_by_one_s": one_by_one,
        "at_once_s": together,
        "at_once_over_one_by_one": float(np.median([b / a for a, b in turns])),
        "load_average": os.getloadavg()[0],
    }


def _alone(outputs: Callable[[np.ndarray], np.ndarray], images: Any, count: int) -> float:
    """Processor seconds of an engine for `count` images in batches of 8, from its time for some."""
    batches = [images.read(start, start + 8) for start in range(0, min(_IMAGES_TO_TIME, count), 8)]
    outputs(batches[0])
    return _timed(lambda: [outputs(batch) for batch in batches])[1] * count / sum(map(len, batches))


def _timed(run: Callable[[], T]) -> tuple[T, float]:
    """What it returns, and processor seconds."""
    started = time.process_time()
    found = run()
    return found, time.process_time() - started


def arguments_for(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=300, help="verify: how many")
    parser.add_argument("--engines", type=int, default=20, help="verify: how many, with the anchors Ti and S")
