"""How good profiles are: interpolation, agreement with other ways of timing, repeatability, and the time they take.

    python benchmarks/profiling.py export --family deit              # engines, once, into --folder
    python benchmarks/profiling.py interpolation --family deit --batch 1
    python benchmarks/profiling.py agreement --family deit
    python benchmarks/profiling.py profile --family deit             # `klas-zoo profile` as a process; run it twice

Each command measures for a few minutes and adds its part to results/profiling.json; nothing else
should run meanwhile. Weights are drawn at random, which times do not depend on.

* interpolation: the anchors, five stitches chosen of 33 drawn at random, and the other 28, which the model never
  sees, all in turn in one run; how far the model is off the medians of the 28.
* agreement: one session timed by ours, by a loop like onnxruntime's own perf-test (inputs and
  outputs bound once), and by timeit, in turn; and a session as a user opens it, with spinning left on.
* profile: wall time, and per network the medians of the last two profiles against each other.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
import time
import timeit
from pathlib import Path
from typing import Any

import numpy as np
from record import write_part

from klas_zoo.costs.profiling import all_stitches
from klas_zoo.exporters.to_onnx import RouteExporter
from klas_zoo.families.anchors import load_family
from klas_zoo.families.specs import find_family
from klas_zoo.hardware import physical_cores
from klas_zoo.profiles.interpolation import choose_stitches, errors_percent, fit, summarise
from klas_zoo.profiles.runners import SessionRunner, images_of
from klas_zoo.profiles.shapes import count, shapes_of
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.profiles.timing import Method, doubts, time_in_turn
from klas_zoo.routes import Route, Segment
from klas_zoo.runtimes import Session, open_engine
from klas_zoo.supernet import Supernet

POOL = 33


def export(arguments: argparse.Namespace) -> None:
    """The anchors and stitches drawn at random: from these five are chosen, the others are never seen."""
    family = load_family(find_family(arguments.family), random_weights=True)
    anchors = [Route.anchor(anchor, chain.depth) for anchor, chain in family.chains.items()]
    routes = [*anchors, *random.Random(arguments.seed).sample(all_stitches(family.chains), POOL)]
    exporter = RouteExporter(Supernet(family.chains, routes).eval(), family.input_shape)
    folder = arguments.folder / arguments.family
    folder.mkdir(parents=True, exist_ok=True)
    for route in routes:
        exporter.export(route, folder / f"{route}.onnx", metadata={})
    print(f"{len(routes)} engines in {folder}")


def networks(arguments: argparse.Namespace) -> tuple[Any, list[Route], list[Route]]:
    """The family, which of the engines in its folder are measured to fit the model, and which it never sees."""
    family = load_family(find_family(arguments.family), random_weights=True)
    counted = count(family.chains, family.input_shape)
    depths = {anchor: chain.depth for anchor, chain in family.chains.items()}
    routes = [parsed(file.stem, depths) for file in sorted((arguments.folder / arguments.family).glob("*.onnx"))]
    stitches = [route for route in routes if not route.is_anchor]
    chosen = choose_stitches(shapes_of(counted, batch=1), stitches)
    anchors = [Route.anchor(anchor, depth) for anchor, depth in depths.items()]
    return (family, counted), [*anchors, *chosen], [route for route in stitches if route not in chosen]


def parsed(name: str, depths: dict[str, int]) -> Route:
    """A route by its name."""
    if "+" not in name:
        return Route.anchor(name, depths[name])
    parts = (re.fullmatch(r"([\w-]+)\.(\d+)-(\d+)", part) for part in name.split("+"))
    return Route(tuple(Segment(found[1], int(found[2]), int(found[3])) for found in parts if found))


def interpolation(arguments: argparse.Namespace) -> dict[str, Any]:
    (family, counted), fitted, unseen = networks(arguments)
    most = min(arguments.most_unseen, len(unseen))
    unseen = [unseen[number * len(unseen) // most] for number in range(most)]
    images = images_of(arguments.batch, family.input_shape)
    folder = arguments.folder / arguments.family
    live = {
        route: SessionRunner(open_engine(folder / f"{route}.onnx", threads=arguments.threads), images)
        for route in [*fitted, *unseen]
    }
    method = Method(min_runs=arguments.min_runs, min_ms=arguments.min_ms, rounds=arguments.rounds)
    started, load = time.perf_counter(), os.getloadavg()[0]
    times = time_in_turn(live, method)
    seconds, load_after = time.perf_counter() - started, os.getloadavg()[0]
    medians = {route: float(np.median(found.host_ms)) for route, found in times.items()}
    shapes = shapes_of(counted, batch=arguments.batch)
    model = fit(shapes, {route: medians[route] for route in fitted})
    errors = errors_percent(model, {route: medians[route] for route in unseen})
    found = summarise(list(errors.values()), "")
    whole = [
        {"network": str(route), "use": "fit" if route in fitted else "unseen", "median_ms": medians[route],
         "p10_ms": float(np.percentile(times[route].host_ms, 10)), "runs": len(times[route].host_ms),
         "error_percent": errors.get(route)}
        for route in times
    ]  # fmt: skip
    print(f"{arguments.family} batch {arguments.batch}, {arguments.threads} threads, {seconds:.0f} s, load {load:.1f}:")
    print(f"  median {found.median_percent:.2f} %, largest {found.largest_percent:.2f} % of {len(errors)} unseen")
    print(f"  cross-validated on the 5: {model.error.median_percent:.2f} %, {model.error.largest_percent:.2f} %")
    return {
        f"interpolation {arguments.family} batch {arguments.batch} threads {arguments.threads}": {
            "measured": len(fitted), "unseen": len(errors), "stitches_in_all": len(all_stitches(family.chains)),
            "median_percent": found.median_percent, "p90_percent": found.p90_percent,
            "largest_percent": found.largest_percent, "cross_validated_median_percent": model.error.median_percent,
            "cross_validated_largest_percent": model.error.largest_percent, "networks": whole,
            "doubts": doubts({str(route): one.host_ms for route, one in times.items()}, arguments.rounds),
            "seconds": seconds, "load_before": load, "load_after": load_after, "method": vars(method),
        }
    }  # fmt: skip


def agreement(arguments: argparse.Namespace) -> dict[str, Any]:
    (family, _), _, _ = networks(arguments)
    images = images_of(arguments.batch, family.input_shape)
    found = {}
    for name in family.chains:
        engine = arguments.folder / arguments.family / f"{name}.onnx"
        ours = SessionRunner(open_engine(engine, threads=arguments.threads), images)
        plain = open_engine(engine, threads=arguments.threads, spinning=True)
        medians = _compared(ours, plain, images, arguments)
        found[name] = {**medians, "ratios": {key: medians["ours"] / ms for key, ms in medians.items()}}
        print(f"{arguments.family} {name}: " + ", ".join(f"{key} {ms:.4g} ms" for key, ms in medians.items()))
    part = {"networks": found, "load_after": os.getloadavg()[0]}
    return {f"agreement {arguments.family} batch {arguments.batch} threads {arguments.threads}": part}


def _compared(
    ours: SessionRunner, plain: Session, images: np.ndarray, arguments: argparse.Namespace
) -> dict[str, float]:
    session = ours.session.raw
    name = session.get_inputs()[0].name
    binding = session.io_binding()
    binding.bind_cpu_input(name, images)
    binding.bind_output(session.get_outputs()[0].name)

    def perf_test(count: int) -> list[float]:
        times = []
        for _ in range(count):
            started = time.perf_counter()
            session.run_with_iobinding(binding)
            times.append(1e3 * (time.perf_counter() - started))
        return times

    def by_timeit(session: Any, count: int) -> list[float]:
        return [1e3 * one for one in timeit.repeat(lambda: session.run(None, {name: images}), number=1, repeat=count)]

    ways = {
        "ours": lambda count: ours.time(count)[0],
        "perf_test": perf_test,
        "timeit": lambda count: by_timeit(session, count),
        "timeit_spinning": lambda count: by_timeit(plain.raw, count),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    burst = max(3, round(arguments.min_ms / arguments.rounds / max(ours.time(5)[0])))
    for number in range(arguments.rounds):
        for name in list(ways) if number % 2 == 0 else list(ways)[::-1]:
            ways[name](2)
            times[name] += ways[name](burst)
    return {name: float(np.median(one)) for name, one in times.items()}


def profile(arguments: argparse.Namespace) -> dict[str, Any]:
    root = arguments.folder / "registry"
    command = [sys.executable, "-m", "klas_zoo", "profile", "--family", arguments.family, "--registry", str(root)]
    command += ["--batch", str(arguments.batch), "--threads", str(arguments.threads)]
    started = time.perf_counter()
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - started
    print(f"klas-zoo profile --family {arguments.family}: {seconds:.0f} s")
    part: dict[str, Any] = {"wall_seconds": seconds}
    held = [
        one
        for one in ProfileStore.of(root).profiles(arguments.family, "cpu")
        if (one.batch, one.threads) == (arguments.batch, arguments.threads)
    ]
    if len(held) > 1:
        new, old = held[:2]
        changes = {
            str(one.route): 100 * (one.latency.p50_ms / before.latency.p50_ms - 1)
            for one in new.networks
            if (before := old.network(one.route)) is not None
        }
        within = sum(abs(change) <= 3 for change in changes.values())
        doubtful = new.noisy or old.noisy
        print(f"  against the one before: {within} of {len(changes)} medians within 3 %; noisy: {doubtful}")
        part |= {"change_percent": changes, "measured_at": [old.measured_at, new.measured_at]}
        part |= {"warnings": [list(old.warnings), list(new.warnings)], "within_3_percent": within}
    return {f"profile {arguments.family} batch {arguments.batch} threads {arguments.threads}": part}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=["export", "interpolation", "agreement", "profile"])
    parser.add_argument("--family", default="deit")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=physical_cores())
    parser.add_argument("--min-runs", type=int, default=30)
    parser.add_argument("--min-ms", type=float, default=500)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--most-unseen", type=int, default=POOL)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("data/profiling"))
    arguments = parser.parse_args()
    if arguments.command == "export":
        export(arguments)
        return
    part = {"interpolation": interpolation, "agreement": agreement, "profile": profile}[arguments.command](arguments)
    for name, numbers in part.items():
        print(f"written: {write_part('profiling', name, numbers)}")


if __name__ == "__main__":
    main()
