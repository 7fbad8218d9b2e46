"""What checkpoints cost, and what a second process brings; deit-micro on its embedded sample.

    python benchmarks/tuning_costs.py                # a few minutes, on an idle machine

Two processes of one thread each, as torchrun starts them, take turns with one process of one thread; both take the
same steps at the same batch, so their losses have to agree in fp32. bf16, which `quick` takes where
the processor has it, is measured at the first of the batches. Steps are timed after the first five, from
images on the disk to updated weights; starting processes is not in it. The ratio is that of whole runs; the ratio
of fastest steps takes each step from the run where it was fastest, which leaves out what else the machine did.
Checkpoints are written as often as their own rule allows, and as a build writes them by default.

Prints a table and writes results/tuning_costs.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from record import write_record
from rich.console import Console
from rich.table import Table

from klas_zoo.data.loading import batches, load_data
from klas_zoo.families.anchors import load_family
from klas_zoo.families.specs import find_family
from klas_zoo.processes.team import ALONE, Team, join, leave
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.checkpoints import Checkpoints
from klas_zoo.tuning.settings import PRESETS, TuningSettings
from klas_zoo.tuning.tuner import Tuner

SKIPPED = 5  # steps, while allocators and caches fill


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="of each run; default 40")
    parser.add_argument("--repeats", type=int, default=4, help="pairs of runs; default 4")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128], help="images a step; default 64 128")
    parser.add_argument("--seconds", type=float, default=62, help="of tuning with checkpoints; default 62")
    parser.add_argument("--precision", default="fp32", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.worker:
        work(Path(arguments.worker), arguments.steps, arguments.batches[0], arguments.precision)
        return
    # in another process: gradients and forks do not go together, and memory starts empty
    cases = [(batch, "fp32") for batch in arguments.batches] + [(arguments.batches[0], "bf16")]
    found = {f"batch {one[0]}, {one[1]}": speedup(arguments.steps, arguments.repeats, *one) for one in cases}
    often = (("as often as may be", 0.0), ("every 60 s", 60.0))
    checkpoints = {name: share(every_s, arguments.seconds) for name, every_s in often}
    show(found, checkpoints)
    numbers = {"speedup": found, "checkpoints": checkpoints, "steps": arguments.steps, "repeats": arguments.repeats}
    write_record("tuning_costs", {**numbers, "seed": 0})


def supernet_and_settings(batch: int, precision: str) -> tuple[Supernet, Any, TuningSettings]:
    """Deit-micro, three stitches of each pair of neighbours, and the preset `quick`."""
    spec = find_family("deit-micro")
    family = load_family(spec)
    settings = replace(PRESETS["quick"], precision=precision, batch=batch, reuse=1)  # type: ignore[arg-type]
    data = load_data(None, sample=spec.sample, num_classes=10, data_config=family.data_config)
    anchors = [Route.anchor(name, chain.depth) for name, chain in family.chains.items()]
    names = list(family.chains)
    stitches = [
        Route.stitch(source, i, target, i, family.chains[target].depth)
        for source, target in pairwise(names)
        for i in (2, 4, 6)
    ]
    torch.manual_seed(0)
    return Supernet(family.chains, [*anchors, *stitches]), data, settings


def stepping(team: Team, steps: int, batch: int, precision: str) -> tuple[Tuner, Any]:
    net, data, settings = supernet_and_settings(batch, precision)
    tuner = Tuner(net, steps, settings, team=team)
    return tuner, batches(data.augmented, settings.batch, shuffle_seed=0, forever=True, team=team)


def work(out: Path, steps: int, batch: int, precision: str) -> None:
    """One run, in each of its processes: seconds of the steps after the first few, and all losses."""
    team = join("cpu")
    tuner, stream = stepping(team, steps, batch, precision)
    losses, ends = [], []
    with tuner.running():
        while tuner.done < steps:
            losses.append(tuner.step(stream).last)
            ends.append(time.perf_counter())
    if team.is_main:
        seconds = [later - earlier for earlier, later in pairwise(ends[SKIPPED - 1 :])]
        out.write_text(json.dumps({"seconds": seconds, "losses": losses}))
    leave(team)


def speedup(steps: int, repeats: int, batch: int, precision: str) -> dict[str, Any]:
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for _ in range(repeats):
        for processes, found in runs.items():
            found.append(run(processes, steps, batch, precision))
    ratios = [sum(one["seconds"]) / sum(two["seconds"]) for one, two in zip(runs[1], runs[2], strict=True)]
    fastest = {n: sum(map(min, zip(*(one["seconds"] for one in found), strict=True))) for n, found in runs.items()}
    difference = max(abs(a - b) for a, b in zip(runs[1][0]["losses"], runs[2][0]["losses"], strict=True))
    timed = steps - SKIPPED
    return {
        "ratios": ratios,
        "median_ratio": statistics.median(ratios),
        "ratio_of_fastest_steps": fastest[1] / fastest[2],
        "seconds_a_step": {n: [sum(one["seconds"]) / timed for one in found] for n, found in runs.items()},
        "seconds_a_fastest_step": {n: seconds / timed for n, seconds in fastest.items()},
        "largest_difference_of_losses": difference,
        "losses": {n: found[0]["losses"] for n, found in runs.items()},
    }


def run(processes: int, steps: int, batch: int, precision: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run.json"
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        job = [__file__, "--worker", str(out), "--steps", str(steps), "--batches", str(batch)]
        job += ["--precision", precision]
        subprocess.run([*start, *job], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found: dict[str, Any] = json.loads(out.read_text())
        return found


def share(every_s: float, seconds: float) -> dict[str, float]:
    """Of tuning's time that goes into checkpoints."""
    with tempfile.TemporaryDirectory() as folder:
        tuner, stream = stepping(ALONE, 1_000_000, 64, "fp32")
        checkpoints = Checkpoints(Path(folder), every_s=every_s)
        with tuner.running():
            for _ in range(SKIPPED):
                tuner.step(stream)
            started, before = time.perf_counter(), tuner.done
            while time.perf_counter() - started < seconds:
                tuner.step(stream)
                checkpoints.after_step(tuner)
        spent = time.perf_counter() - started
        return {
            "share": checkpoints.seconds / spent,
            "count": checkpoints.count,
            "seconds_each": checkpoints.seconds / max(1, checkpoints.count),
            "steps": tuner.done - before,
            "bytes": checkpoints.file.stat().st_size if checkpoints.count else 0,
        }


def show(found: dict[str, Any], checkpoints: dict[str, Any]) -> None:
    table = Table("figure", "wanted", "measured", title="Tuning deit-micro")
    for case, one in found.items():
        ratios = ", ".join(f"{ratio:.2f}" for ratio in one["ratios"])
        table.add_row(f"two processes over one, {case}", "1.6 ×", f"{one['median_ratio']:.2f} × ({ratios})")
        table.add_row("  each step where it was fastest", "", f"{one['ratio_of_fastest_steps']:.2f} ×")
        wanted = "1e-5" if "fp32" in case else ""
        table.add_row("  losses differ by at most", wanted, f"{one['largest_difference_of_losses']:.1e}")
    for name, one in checkpoints.items():
        what = f"{one['share']:.2%} ({one['count']} of {one['seconds_each'] * 1e3:.0f} ms)"
        table.add_row(f"checkpoints, {name}", "3 %", what)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
