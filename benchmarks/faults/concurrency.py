"""Eight processes that register and pick at once: no build is lost, no pick is wrong, none is slow."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import made_up

from faults import Figure, Outcome
from klas_zoo.registry import Registry
from klas_zoo.registry.checking import check
from klas_zoo.registry.picking import pick
from klas_zoo.registry.store import check_file
from klas_zoo.registry.upkeep import builds

PROCESSES = 8
OPERATIONS = 2_000
REGISTERED_SHARE = 0.25
ENGINES = 8  # of each build
SHARED = "shared"  # the family that all processes register; each has one of its own too


def run(scale: float) -> Outcome:
    each = max(4, round(OPERATIONS * scale / PROCESSES))
    with tempfile.TemporaryDirectory(prefix="klas-zoo-faults-") as folder:
        root = Path(folder) / "registry"
        registry = Registry.open(root, create=True)
        # so that the first picks of the shared family find something
        _register(registry, SHARED, "first", Path(folder))
        started = time.perf_counter()
        reports = _run_workers(root, Path(folder), each)
        seconds = time.perf_counter() - started
        lost = _lost(registry, reports)
        damage = [one.what for one in check(registry)]
    picks_ms = sorted(ms for report in reports for ms in report["picks_ms"])
    wrong = [what for report in reports for what in report["wrong"]]
    registered = sum(len(report["registered"]) for report in reports)
    p99 = statistics.quantiles(picks_ms, n=100)[98]
    return Outcome(
        figures=(
            Figure(name="processes × operations", wanted=f"{PROCESSES} × {OPERATIONS // PROCESSES}",
                   measured=f"{PROCESSES} × {each}: {registered} builds registered, {len(picks_ms)} picks",
                   kept=registered + len(picks_ms) == each * PROCESSES),
            Figure(name="builds lost", wanted="0", measured=str(len(lost)), kept=not lost),
            Figure(name="picks or builds wrong", wanted="0", measured=str(len(wrong)), kept=not wrong),
            Figure(name="found by registry check", wanted="0", measured=str(len(damage)), kept=not damage),
            Figure(name="a pick inside the process, p99", wanted="< 50 ms",
                   measured=f"{p99:.1f} ms (median {statistics.median(picks_ms):.1f} ms)", kept=p99 < 50),
        ),
        numbers={"seconds": seconds, "picks": len(picks_ms), "registered": registered, "p99_ms": p99,
                 "p50_ms": statistics.median(picks_ms), "max_ms": picks_ms[-1], "wrong": wrong, "lost": lost,
                 "found_by_check": damage, "register_p50_ms": statistics.median(_all(reports, "registers_ms")),
                 "register_max_ms": max(_all(reports, "registers_ms")), "seeds": list(range(PROCESSES))},
    )  # fmt: skip


def _all(reports: list[dict[str, Any]], name: str) -> list[float]:
    return [value for report in reports for value in report[name]]


def _run_workers(root: Path, folder: Path, operations: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "faults.concurrency", str(root), str(folder), str(operations)]
    here = Path(__file__).parent.parent
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen([*command, str(number)], cwd=here, stdin=pipe, stdout=pipe, text=True)
        for number in range(PROCESSES)
    ]
    for process in started:  # all have imported everything
        assert process.stdout and process.stdout.readline() == "ready\n"
    for process in started:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate()[0] for process in started]
    failed = [process.returncode for process in started if process.returncode]
    if failed:
        raise SystemExit(f"{len(failed)} of {PROCESSES} workers failed")
    return [json.loads(output) for output in outputs]


def _lost(registry: Registry, reports: list[dict[str, Any]]) -> list[str]:
    """Builds that were reported registered and are not there as they were, or not where they were put."""
    there = {one.number: (one.family, one.engines) for one in builds(registry)}
    lost = []
    for report in reports:
        for number, family, name in report["registered"]:
            same = there.get(number) == (family, ENGINES) and registry.build(number).command == name
            if not same:
                lost.append(name)
    newest = {family: max(n for n, (f, _) in there.items() if f == family) for family, _ in there.values()}
    current = {engine.family: engine.build_id for engine in registry.engines()}
    hidden = [family for family in newest if newest[family] != current.get(family)]
    return lost + [f"the newest build of {family}, which is not current" for family in hidden]


def _register(registry: Registry, family: str, name: str, folder: Path) -> int:
    """A build whose engines all carry its name, the later the slower and the better."""
    engines = []
    for index in range(ENGINES):
        # one file is every build's: then processes write it at once
        file = folder / (f"{name}-{index}" if index else f"common-{name}")
        file.write_bytes(f"{name} {index}".encode() * 2_000 if index else b"common" * 2_000)
        engines.append(
            made_up.new_engine(file, f"{name}-{index}", 50.0 + index, latencies=1.0 + index, family=family)
        )
    number = made_up.register(registry, made_up.build(family=family, command=name), engines)
    for engine in engines:
        engine.file.unlink()
    return number


def _worker(root: Path, folder: Path, operations: int, number: int) -> dict[str, Any]:
    draw = random.Random(number)
    registry = Registry(root)
    report: dict[str, Any] = {"registered": [], "wrong": [], "picks_ms": [], "registers_ms": []}
    own = f"family{number}"
    least = {SHARED: 1}  # what has to be seen at least: builds of before
    for step in range(operations):
        family = draw.choice([SHARED, own])
        if family not in least or draw.random() < REGISTERED_SHARE:
            name = f"{own}.{step}".replace(".", "-")
            with _timed(report["registers_ms"]):
                least[family] = _register(registry, family, name, folder)
            report["registered"].append((least[family], family, name))
        else:
            budget = draw.randrange(1, ENGINES + 1)
            with _timed(report["picks_ms"]):
                found = pick(budget + 0.5, family=family, registry=root)
            report["wrong"] += _wrong(found, budget, least[family], exact=family == own)
            least[family] = max(least[family], found.engine.build_id)
    return report


def _wrong(found: Any, budget: int, least: int, *, exact: bool) -> list[str]:
    engine = found.engine
    stem, _, index = str(engine.route).rpartition("-")
    neighbours = [one.engine for one in (found.runner_up_faster, found.runner_up_slower) if one]
    wrong = []
    if int(index) != budget - 1 or engine.top1 != 50.0 + budget - 1 or found.candidates != ENGINES:
        wrong.append(f"{engine.route} is not the best within {budget}.5 ms")
    if any(str(one.route).rpartition("-")[0] != stem for one in neighbours):
        wrong.append(f"{engine.route} stands beside engines of another build")
    if engine.build_id < least or (exact and engine.build_id != least):
        wrong.append(f"{engine.route} is of build {engine.build_id}, though {least} was there before")
    check_file(engine, content=True)
    return wrong


@contextmanager
def _timed(times_ms: list[float]) -> Iterator[None]:
    started = time.perf_counter()
    yield
    times_ms.append(1e3 * (time.perf_counter() - started))


if __name__ == "__main__":
    print("ready", flush=True)
    sys.stdin.readline()
    root, folder, operations, number = sys.argv[1:]
    print(json.dumps(_worker(Path(root), Path(folder), int(operations), int(number))))
