"""ONNX graphs of families in every precision, and what torch answers on the CPU: made while the GPU does other work.

    python -m gpu.graphs FAMILY DIR [--all] [--smallest N]

`DIR/FAMILY/PRECISION/ROUTE.onnx`, `DIR/FAMILY/reference.npz`, and `DIR/FAMILY/done.json` when everything is there.
Without `--all` a family is its smallest anchor and the middle stitch to the next one; with it, its anchors and
`STITCHES + CHECKS` stitches, those that a profile measures.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from klas_zoo.costs.profiling import all_stitches, routes_to_measure
from klas_zoo.costs.runtimes import ProfileSettings
from klas_zoo.exporters.precision import converter
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import builtin_families, find_family
from klas_zoo.profiles.runners import images_of
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

PRECISIONS = ("fp32", "fp16", "bf16")
STITCHES, CHECKS = 5, 20
QUICK_CHECKS = 3
"""Stitches that a profile is checked on when stages are only tried out: exporting is what takes time."""
BATCH = 2
# what tests take: a family's smallest anchors say the same about operators as its largest
PROFILED = "deit"


def families() -> list[str]:
    return sorted(builtin_families())


def settings(precision: str = "fp32", batches: Sequence[int] = (1,), *, quick: bool = False) -> ProfileSettings:
    checks = QUICK_CHECKS if quick else CHECKS
    return ProfileSettings(precision=precision, batches=tuple(batches), stitches=STITCHES, checks=checks)


def routes_of(family: Family, every: bool, *, quick: bool = False) -> list[Route]:
    if every:
        fitted, checks = routes_to_measure(family, settings(quick=quick))
        return [*fitted, *checks]
    name, chain = next(iter(family.chains.items()))
    stitches = all_stitches(family.chains)
    return [Route.anchor(name, chain.depth), stitches[len(stitches) // 2]]


def export(
    name: str, folder: Path, *, every: bool = False, precisions: Sequence[str] = PRECISIONS, jobs: int = 4,
    quick: bool = False,
) -> None:  # fmt: skip
    """Writes a family's graphs and references; does nothing where they are there."""
    done = folder / name / "done.json"
    if done.is_file():
        return
    started = time.perf_counter()
    torch.manual_seed(0)
    family = load_family(find_family(name), random_weights=True)
    routes = routes_of(family, every, quick=quick)
    supernet = Supernet(family.chains, routes).cpu().eval()
    _reference(family, supernet, routes, folder / name)
    exporter = RouteExporter(supernet, family.input_shape)
    translated = time.perf_counter() - started
    work = [(precision, route) for precision in precisions for route in routes]
    for precision in precisions:
        (folder / name / precision).mkdir(parents=True, exist_ok=True)
    # forked children share the translated graph; each writes its share of the files
    context = multiprocessing.get_context("fork")
    children = [
        context.Process(target=_write, args=(exporter, work[n::jobs], folder / name))
        for n in range(min(jobs, len(work)))
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    failed = sorted(path.stem for path in (folder / name).glob("*/*.failed"))
    table: dict[str, Any] = {
        "routes": [str(route) for route in routes],
        "translate_s": translated,
        "seconds": time.perf_counter() - started,
        "failed": failed,
    }
    done.write_text(json.dumps(table))


def _write(exporter: RouteExporter, work: Sequence[tuple[str, Route]], folder: Path) -> None:
    for precision, route in work:
        path = folder / precision / f"{route}.onnx"
        exporter._convert = converter(precision, list)
        try:
            exporter.export(route, path, metadata={})
        except Exception as error:
            path.with_suffix(".failed").write_text(f"{type(error).__name__}: {error}")


def _reference(family: Family, supernet: Supernet, routes: Sequence[Route], folder: Path) -> None:
    """Images and torch's fp32 logits on the CPU, by route, of the first routes."""
    folder.mkdir(parents=True, exist_ok=True)
    images = images_of(BATCH, family.input_shape)
    with torch.inference_mode():
        logits = {str(route): supernet(torch.from_numpy(images), route).numpy() for route in routes[:8]}
    np.savez(folder / "reference.npz", images=images, **logits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--all", dest="every", action="store_true")
    parser.add_argument("--quick", action="store_true", help="Fewer stitches to check a profile on.")
    parser.add_argument("--jobs", type=int, default=4)
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    given = parser.parse_args()
    torch.set_num_threads(1)
    precisions = given.precisions.split(",")
    export(given.family, given.folder, every=given.every, precisions=precisions, jobs=given.jobs, quick=given.quick)


if __name__ == "__main__":
    main()
