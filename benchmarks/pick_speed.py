"""How long `klas-zoo pick` takes as a process: 5,000 engines of 50 families in the registry.

    python benchmarks/pick_speed.py                 # writes results/pick_speed.json
    python benchmarks/pick_speed.py --engines 500

Engines have three precisions, latencies at batch sizes 1 and 8 and, for each of these, a latency under other
conditions. Processes are timed from start to end with the files in the page cache, by the wall clock and by the
processor time they took (user and system): the first is what a user waits, the second shows whether other work of the
machine made it longer. A bare interpreter is timed in turn with them for the same reason.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import write_record
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # engines with invented numbers are the tests'

import made_up

from klas_zoo.registry import Registry

LIMIT_MS = 150
PRECISIONS = ("fp32", "fp16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=5_000)
    parser.add_argument("--families", type=int, default=50)
    parser.add_argument("--runs", type=int, default=40, help="of each command")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="klas-zoo-pick-") as folder:
        registry = fill(Path(folder), arguments.engines, arguments.families)
        commands = {
            "python -c pass": ["-c", "pass"],
            "klas-zoo --version": ["-m", "klas_zoo", "--version"],
            "klas-zoo pick": ["-m", "klas_zoo", "pick", "--latency", "5ms", "--registry", str(registry.root)],
            "klas-zoo pick --family --explain": [
                "-m", "klas_zoo", "pick", "--latency", "5ms", "--family", "family7", "--explain",
                "--registry", str(registry.root),
            ],
        }  # fmt: skip
        times = timed(commands, arguments.runs)
    title = f"{arguments.engines} engines of {arguments.families} families"
    table = Table("command", "wall, min", "wall, median", "processor, min", "processor, median", title=title)
    numbers = {}
    for name, found in times.items():
        wall, processor = zip(*found, strict=True)
        numbers[name] = {
            "wall_min_ms": min(wall), "wall_p50_ms": statistics.median(wall), "processor_min_ms": min(processor),
            "processor_p50_ms": statistics.median(processor),
        }  # fmt: skip
        table.add_row(name, *(f"{value:.0f} ms" for value in numbers[name].values()))
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    if arguments.engines >= 5_000:
        facts = {"engines": arguments.engines, "families": arguments.families, "runs": arguments.runs}
        load = {"load_per_cpu": os.getloadavg()[0] / (os.cpu_count() or 1)}
        write_record("pick_speed", {**facts, **load, "limit_ms": LIMIT_MS, "commands": numbers})


def fill(root: Path, engines: int, families: int) -> Registry:
    """A registry of that many engines, their packages included."""
    registry, draw = Registry.open(root, create=True), random.Random(0)
    for number in range(families):
        family = f"family{number}"
        members = []
        for index in range(engines // families):
            precision = PRECISIONS[index % len(PRECISIONS)]
            top1, ms = draw.uniform(60, 85), draw.uniform(1, 100)
            latencies = tuple(
                made_up.latency(ms * batch * factor, batch=batch, threads=threads, precision=precision)
                for batch in (1, 8)
                for threads, factor in ((1, 1.0), (4, 0.3))
            )
            members.append(
                made_up.planned(
                    1, f"route{index}", top1, latencies, family=family, precision=precision,
                    preprocessing={"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "crop_pct": 0.9},
                )
            )  # fmt: skip
        made_up.register(registry, made_up.build(family=family), members)
    return registry


def timed(commands: dict[str, list[str]], runs: int) -> dict[str, list[tuple[float, float]]]:
    """Wall clock and processor time of each run of each command, milliseconds; the commands in turn."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for turn in range(runs + 2):
        for name, arguments in commands.items():
            started = time.perf_counter()
            process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL)
            _, status, used = os.wait4(process.pid, 0)
            wall_ms = 1e3 * (time.perf_counter() - started)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                raise SystemExit(f"{name} ended with {process.returncode}")
            if turn >= 2:  # the first ones read files from the disk
                found[name].append((wall_ms, 1e3 * (used.ru_utime + used.ru_stime)))
    return found


if __name__ == "__main__":
    main()
