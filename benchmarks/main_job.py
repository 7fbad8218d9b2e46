"""The main job's figures: `build --family deit-micro --device cpu` and `pick`, measured as a user sees them.

    python benchmarks/main_job.py                    # three seeds, about a quarter of an hour on 2 cores

Prints a table and writes results/main_job.json:

* each build as a whole process: wall time, peak memory, routes on the frontier, agreement of
  engines with torch, buckets in which stitches beat the straight line between their anchors;
* selection (probes and Θ) against the anchors' plain forward passes over the same images,
  taken in turn in one process, as a ratio;
* `klas-zoo pick` as a whole process, beside an empty Python process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from record import write_record

from klas_zoo.data.loading import batches, load_data
from klas_zoo.families.anchors import load_family
from klas_zoo.families.specs import find_family
from klas_zoo.selection.probes import ProbeSettings, train_probes
from klas_zoo.selection.similarity import measure_similarities


def run(command: list[str], **options: Any) -> tuple[str, float, int]:
    """Runs a process: its stdout, wall seconds, and peak memory in bytes."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, **options)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        if status != 0:
            raise SystemExit(f"{' '.join(command)} failed")
        out.seek(0)
        return out.read(), seconds, usage.ru_maxrss * 1024


def one_build(seed: int, registry: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "klas_zoo", "build", "--family", "deit-micro", "--device", "cpu"]
    text, seconds, memory = run([*command, "--seed", str(seed), "--registry", str(registry), "--json"])
    report = json.loads(text)
    routes = report["routes"]
    checked = [one["verification"] for one in routes if one["verification"]]
    return {
        "seed": seed,
        "wall_seconds": seconds,
        "peak_memory_bytes": memory,
        "registry_bytes": sum(path.stat().st_size for path in registry.rglob("*") if path.is_file()),
        "anchors_fp32_bytes": 4 * sum(one["cost"]["parameters"] for one in routes if len(one["segments"]) == 1),
        "stitches": sum(len(one["segments"]) > 1 for one in routes),
        "stitches_on_frontier": sum(one["on_frontier"] and len(one["segments"]) > 1 for one in routes),
        "rejected": sum(bool(one["rejected"]) for one in routes),
        "least_top1_agreement": min(one["top1_agreement"] for one in checked),
        "largest_difference": max(one["max_abs_difference"] for one in checked),
        "buckets_above_line": report["buckets_above_line"],
        "areas": report["areas"],
        "anchors": {
            one["route"]: [one["top1_before"], one["top1"]] for one in routes if len(one["segments"]) == 1
        },
        "stage_seconds": report["seconds"],
    }


def selection_cost(repeats: int) -> dict[str, Any]:
    """Probes and Θ against the anchors' forward passes over the same images, in turn."""
    spec = find_family("deit-micro")
    family = load_family(spec)
    data = load_data(None, sample=spec.sample, num_classes=10, data_config=family.data_config)
    train = list(batches(data.train, 64, shuffle_seed=0))
    heldout = list(batches(data.heldout, 100))

    def forward_passes() -> None:
        with torch.inference_mode():
            for (images, _), chain in itertools.product([*train, *heldout], family.chains.values()):
                chain(images)

    def selection() -> None:
        probes = train_probes(family.chains, [iter(train)], ProbeSettings(epochs=1))
        measure_similarities(family.chains, probes, heldout)

    def timed(job: Any) -> float:
        started = time.perf_counter()
        job()
        return time.perf_counter() - started

    timed(forward_passes), timed(selection)
    pairs = [(timed(selection), timed(forward_passes)) for _ in range(repeats)]
    ratios = [chosen / plain for chosen, plain in pairs]
    return {"ratios": ratios, "median_ratio": statistics.median(ratios), "seconds": pairs}


def pick_cost(registry: Path, repeats: int) -> dict[str, Any]:
    def milliseconds(*command: str) -> list[float]:
        return [1_000 * run([sys.executable, *command])[1] for _ in range(repeats)]

    pick = ("-m", "klas_zoo", "pick", "--latency", "5ms", "--registry", str(registry))
    picked, empty = milliseconds(*pick)[1:], milliseconds("-c", "pass")[1:]
    return {
        "runs": repeats - 1,
        "median_ms": statistics.median(picked),
        "max_ms": max(picked),
        "empty_python_median_ms": statistics.median(empty),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        registry = Path(folder)
        builds = [one_build(seed, registry) for seed in arguments.seeds]
        pick = pick_cost(registry, 21)
    selection = selection_cost(arguments.repeats)
    path = write_record("main_job", {"builds": builds, "pick": pick, "selection": selection})
    for one in builds:
        lines = {pair: f"{b['above']}/{b['occupied']}" for pair, b in one["buckets_above_line"].items()}
        print(
            f"seed {one['seed']}: {one['wall_seconds']:.0f} s, {one['peak_memory_bytes'] / 1e9:.2f} GB, "
            f"{one['stitches_on_frontier']} of {one['stitches']} stitches on the frontier, "
            f"top-1 agrees on {100 * one['least_top1_agreement']:.2f} %, above the line in {lines} buckets, "
            f"area {one['areas']['macs_untuned']:.3f} untuned, {one['areas']['macs']:.3f} tuned"
        )
    print(f"selection / forward passes: {selection['median_ratio']:.3f} (median of {arguments.repeats})")
    print(f"pick: {pick['median_ms']:.0f} ms (empty Python {pick['empty_python_median_ms']:.0f} ms)")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
