"""A controller under a load that rises and falls, beside routes that stay: tail latency and accuracy.

    python benchmarks/elastic_load.py PACKAGE

Requests of one image arrive at random (a Poisson process; the same arrivals for everybody) and wait for the one
before them; a latency counts from the arrival. Loads are in units of what the slowest route can serve: at 1.5 its
queue grows without end. The package is one that `klas-zoo export --format onnx` wrote of a build, so that every
route's top-1 is known.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from record import write_record

from klas_zoo.runtime import ElasticSession

PHASES = ((0.3, 10.0), (1.5, 20.0), (0.3, 20.0))
"""Load and seconds of each."""
TARGETS = 5.0
"""The target, in times of the slowest route alone."""
Run = Callable[[np.ndarray, float], str]
"""Answers images that have waited some milliseconds; gives the route it took."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    session = ElasticSession(arguments.package, threads=arguments.threads, packed="all")
    alone = session.calibrate(runs=200)
    top1 = {one.name: one.top1 for one in session.routes}
    target = TARGETS * max(alone.values())
    controller = session.controller(target)
    ladder = [name for name, _ in controller.ladder]
    arrivals = _arrivals(max(alone.values()), arguments.seed)

    def controlled(images: np.ndarray, waited_ms: float) -> str:
        name = controller.route
        session.run(images, controller=controller, waited_ms=waited_ms)
        return name

    def always(name: str) -> Run:
        def run(images: np.ndarray, waited_ms: float) -> str:
            session.run(images, route=name)
            return name

        return run

    shape = session.package.manifest.family.input_shape
    image = np.random.default_rng(arguments.seed).standard_normal((1, *shape), dtype=np.float32)
    stay = (ladder[0], ladder[len(ladder) // 2], ladder[-1])
    runs = {"controller": controlled, **{name: always(name) for name in stay}}
    found = {}
    for name, run in runs.items():
        found[name] = _served(run, arrivals, image, target, top1)
        for phase, seen in found[name].items():
            print(f"{name:<32} {phase:<12} p50 {seen['p50_ms']:9.2f} ms  p99 {seen['p99_ms']:9.2f} ms  over "
                  f"{seen['over_target']:6.1%}  top-1 {seen['top1']:.2f} %", flush=True)  # fmt: skip
    counters = vars(controller.counters())
    write_record("elastic_load", {
        "served": found, "target_ms": target, "alone_ms": alone, "ladder": ladder, "counters": counters,
        "phases": PHASES, "seed": arguments.seed, "requests": len(arrivals),
    })  # fmt: skip


def _arrivals(slowest_ms: float, seed: int) -> list[tuple[float, int]]:
    """Seconds from the start at which requests arrive, and the phase of each."""
    draw, now, start, found = np.random.default_rng(seed), 0.0, 0.0, []
    for phase, (load, seconds) in enumerate(PHASES):
        start += seconds
        while (now := now + draw.exponential(slowest_ms / 1e3 / load)) < start:
            found.append((now, phase))
        now = start
    return found


def _served(
    run: Run, arrivals: list[tuple[float, int]], image: np.ndarray, target: float, top1: dict[str, float | None]
) -> dict[str, Any]:
    """What became of all requests, by phase."""
    took: list[list[float]] = [[] for _ in PHASES]
    routes: list[Counter[str]] = [Counter() for _ in PHASES]
    started = time.perf_counter()
    for arrival, phase in arrivals:
        if (left := started + arrival - time.perf_counter()) > 0:
            time.sleep(left)
        routes[phase][run(image, max(0.0, 1e3 * (time.perf_counter() - started - arrival)))] += 1
        took[phase].append(1e3 * (time.perf_counter() - started - arrival))
    found = {}
    for phase, (load, _) in enumerate(PHASES):
        calls = sum(routes[phase].values())
        found[f"{phase + 1}: load {load}"] = {
            "requests": calls,
            "p50_ms": float(np.percentile(took[phase], 50)),
            "p99_ms": float(np.percentile(took[phase], 99)),
            "over_target": float(np.mean(np.array(took[phase]) > target)),
            "top1": sum((top1[name] or 0.0) * count for name, count in routes[phase].items()) / calls,
            "routes": dict(routes[phase].most_common()),
        }
    return found


if __name__ == "__main__":
    main()
