"""Tunes what compare_selectors.py selected: every selector alike, at least 1,000 steps a route.

    python benchmarks/compare_selectors.py --data data/cifar10 --select-only
    python benchmarks/tune_selected.py --data data/cifar10 --family deit-micro \
        --selected benchmarks/results/selectors/deit-micro/selected-*.json --selectors snnet klas --out data/selectors \
        --steps-per-route 1000 --minutes 9 --processes 6
    python benchmarks/tune_selected.py --collect data/selectors --results benchmarks/results/selectors/deit-micro \
        --selected benchmarks/results/selectors/deit-micro/selected-*.json

`--selectors "all both"` tunes every candidate, up and down, in one supernet: selector_report.py then says what each
selector would have kept of it.

Settings are those of the preset `quick`, which compare_selectors.py uses too: batches of 64 images, anchors tuned
along, the largest as it was before as the teacher; but every batch is used twice, on two routes. The 46,000 training
images outside the sample teach, and all 10,000 test images score at the end. Products are in bf16; on a CPU, where
each process has one thread, those of scoring too.

A process takes one selector and seed after the other, in the order of `--selectors`, as long as another fits into
`--minutes`; what `--out` has already is not done again, and what was stopped goes on from its last checkpoint. The
first ones measure their speed while all run, and if the time is too short for the steps a route that were asked for,
all take fewer, the same number. Steps are CUDA graphs on a GPU. An NVIDIA multi-process server, where one runs, lets
the kernels of several processes overlap there.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cifar_training import Images, load, load_test, rate_at
from coarser_chains import coarser
from graphed_tuning import GraphedSteps
from local_products import local_products
from selector_report import RUN_FIELDS
from tune_supernet import macs_of, training_batches

from klas_zoo.data.loading import Batch
from klas_zoo.families.anchors import load_family
from klas_zoo.families.specs import find_family
from klas_zoo.hardware import describe_cpu
from klas_zoo.initialisation import initialise_stitches
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.checkpoints import Checkpoints
from klas_zoo.tuning.evaluation import evaluate
from klas_zoo.tuning.settings import PRESETS
from klas_zoo.tuning.tuner import Tuner

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRIAL = 600  # steps after which a process knows its speed
SAFETY = 0.85  # of it: speeds fell by a sixth in the course of a run
FIT_IMAGES = 2_000
AFTERWARDS = 25 if DEVICE == "cuda" else 120  # seconds for the test images
CHECKPOINT_S = 300
REUSE = 2  # steps that learn from one batch


@dataclass(frozen=True)
class Together:
    """What processes share: the place of the next job, and how the first ones agree on a number of steps.

    Attributes:
        ready: waits for all processes.
        shares: of its steps that each has time for.
    """

    waiting: Any
    ready: Any
    shares: Any

    def agreed(self, number: int, share: float) -> float:
        """The smallest share, 0..1, that any process has time for."""
        self.shares[number] = share
        self.ready.wait()
        return min([1.0, *self.shares])


def work(
    number: int, jobs: list[dict[str, Any]], together: Together, arguments: argparse.Namespace, ends: float
) -> None:
    """One process: job `number` first, then whichever is next."""
    torch.backends.cudnn.benchmark = True
    torch.set_num_threads(1)
    data = load(arguments.data, DEVICE)[0], load_test(arguments.data, DEVICE)
    agree = partial(together.agreed, number), together.ready.wait
    rate = run(jobs[number], data, arguments, ends, agree)
    while True:
        with together.waiting.get_lock():
            place = together.waiting.value
            if place >= len(jobs):
                return
            steps = arguments.steps_per_route * jobs[place]["routes"]
            if time.time() + steps / rate + AFTERWARDS > ends:
                return
            together.waiting.value += 1
        rate = run(jobs[place], data, arguments, ends, None)


def fitted(job: dict[str, Any], training: Images, arguments: argparse.Namespace) -> Supernet:
    """A supernet of the anchors and a job's stitches in closed form."""
    seed = job["seed"]
    chains = coarser(load_family(find_family(arguments.family)), job["every"]).chains
    anchors = [Route.anchor(name, chain.depth) for name, chain in chains.items()]
    torch.manual_seed(seed)
    stitches = [Route.from_json(one["json"]) for one in job["stitches"]]
    supernet = Supernet(chains, [*anchors, *stitches]).to(DEVICE)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[:FIT_IMAGES].to(DEVICE)
    initialise_stitches(supernet, Images(training.pixels[order], training.labels[order]).batches(500))
    return supernet


def scored(supernet: Supernet, test: Images) -> dict[Route, float]:
    """Top-1 of every route, in per cent."""
    with torch.autocast("cpu", torch.bfloat16) if DEVICE == "cpu" else nullcontext():
        return evaluate(supernet, supernet.routes, test.batches(500))


def rows_of(job: dict[str, Any], supernet: Supernet, top1: dict[Route, float]) -> list[dict[str, Any]]:
    """What is written of every route."""
    known = {Route.from_json(one["json"]): {k: v for k, v in one.items() if k != "json"} for one in job["stitches"]}
    chains = {str(route): supernet.chain(str(route)) for route in supernet.routes if route.is_anchor}
    macs = macs_of(chains, list(supernet.routes))
    return [{**known.get(r, {}), "route": str(r), "macs": macs[r], "top1": top1[r]} for r in supernet.routes]


def score_candidates(job: dict[str, Any], data: tuple[Images, Images], arguments: argparse.Namespace) -> None:
    """All candidates of a seed in closed form, unless that is done."""
    file = arguments.out / f"candidates-{job['seed']}.json"
    if file.exists():
        return
    supernet = fitted(job, data[0], arguments)
    rows = rows_of(job, supernet, scored(supernet, data[1]))
    file.write_text(json.dumps({"seed": job["seed"], "rows": rows}) + "\n")


def run(
    job: dict[str, Any], data: tuple[Images, Images], arguments: argparse.Namespace, ends: float,
    agree: tuple[Callable[[float], float], Callable[[], object]] | None,
) -> float:  # fmt: skip
    """Fits, tunes and scores one selector's stitches; the steps a second it made.

    Args:
        agree: turns the share of its steps that there is time for into one for all, and waits for all.
    """
    training, test = data
    seed = job["seed"]
    supernet = fitted(job, training, arguments)
    steps = arguments.steps_per_route * len(supernet.routes)
    layout = "contiguous" if DEVICE == "cuda" else "channels-last"
    settings = replace(
        PRESETS["quick"], steps=steps, seed=seed, batch=arguments.batch, reuse=REUSE, precision="bf16",
        memory_format=layout,
    )
    tuner = Tuner(supernet, steps, settings)
    stream = training_batches(training, settings.batch, 0.0, seed, DEVICE)
    checkpoints = Checkpoints(place_of(job, arguments.out).with_suffix(""), every_s=CHECKPOINT_S)
    checkpoints.restore(tuner)
    begun = tuner.done
    for _ in range(tuner.batches_taken):
        next(stream)
    trial = min(TRIAL, steps - begun)
    started = half = time.perf_counter()
    with tuner.running(), local_products() if DEVICE == "cuda" else nullcontext():
        take_step = steps_of(tuner, stream)
        if agree:
            agree[1]()  # speeds count when all are at work
        while tuner.done < steps:
            take_step()
            if tuner.done - begun == trial // 2:
                wait()
                half = time.perf_counter()
            if agree and tuner.done - begun == trial:
                wait()
                rate = (trial - trial // 2) / (time.perf_counter() - half)
                share = agree[0]((ends - AFTERWARDS - time.time()) * rate * SAFETY / max(1, steps - tuner.done))
                steps = tuner.done + round(share * (steps - tuner.done))
                tuner.steps = steps
                schedule(tuner, steps)
            checkpoints.after_step(tuner)
            if tuner.done % 2_000 == 0:
                spent = time.perf_counter() - started
                print(
                    job["selector"], seed, f"{tuner.done} of {steps}, loss {tuner.loss:.3f}, {spent:.0f} s", flush=True
                )
    wait()
    spent = time.perf_counter() - started
    tuner.finish()
    top1 = scored(supernet, test)
    record = {
        "family": find_family(arguments.family).name,
        "seed": seed, "selector": job["selector"], "seconds": round(spent), "steps": steps,
        "steps_per_route": round(steps / len(supernet.routes)), "batch": settings.batch,
        "rows": rows_of(job, supernet, top1),
        "hardware": torch.cuda.get_device_name() if DEVICE == "cuda" else describe_cpu(),
        "torch": torch.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    place_of(job, arguments.out).write_text(json.dumps(record) + "\n")
    print(job["selector"], seed, f"{spent:.0f} s, {steps} steps", flush=True)
    shutil.rmtree(checkpoints.file.parent, ignore_errors=True)
    return (steps - begun) / spent


def steps_of(tuner: Tuner, stream: Iterator[Batch]) -> Callable[[], object]:
    """What takes a step: a CUDA graph, or the tuner as it is."""
    if DEVICE == "cpu":
        return partial(tuner.step, stream)
    graphs = GraphedSteps(tuner, stream)
    graphs.capture(tuner.supernet.routes)
    return graphs.step


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def place_of(job: dict[str, Any], folder: Path) -> Path:
    return folder / f"{job['selector'].replace(' ', '-')}-{job['seed']}.json"


def schedule(tuner: Tuner, steps: int) -> None:
    """Lets the learning rates come to their end after so many steps."""
    rates = [lambda step: rate_at(step / steps, tuner.settings.warmup)]
    tuner.scheduler.lr_lambdas = rates * len(tuner.optimiser.param_groups)


def jobs_of(arguments: argparse.Namespace, selectors: list[str]) -> list[dict[str, Any]]:
    """Selectors in the order given, all seeds of one before the next, without those that are done."""
    anchors = len(find_family(arguments.family).anchors)
    selections = [json.loads(file.read_text()) for file in arguments.selected]
    jobs = []
    for selector, one in itertools.product(selectors, selections):
        stitches = one["selected"].get(selector)
        job = {"seed": one["seed"], "every": one.get("every", 1), "selector": selector, "stitches": stitches}
        if stitches and not place_of(job, arguments.out).exists():
            jobs.append({**job, "routes": len(stitches) + anchors})
    return jobs


def collect(folder: Path, results: Path, selected: list[Path]) -> None:
    """Writes `runs.csv` and `candidates.csv` as compare_selectors.py does, from what `--out` holds.

    `selections.csv` says what each selector chose, whether that was tuned or not.
    """
    files = sorted(folder.glob("*.json"))
    records = [json.loads(file.read_text()) for file in files if not file.name.startswith("candidates-")]
    about = {
        "family": records[0]["family"], "hardware": sorted({record["hardware"] for record in records}),
        "torch": records[0]["torch"], "date": records[0]["date"], "test_images": 10_000,
        "batch": sorted({record.get("batch", 64) for record in records}),
        "steps_per_route": sorted({record["steps_per_route"] for record in records}),
    }  # fmt: skip
    runs = [
        {"source": row["route"], **row, **{key: record[key] for key in ("seed", "selector", "seconds")}}
        for record in records
        for row in record["rows"]
    ]
    candidates = [
        {"source": row["route"], **row, "seed": record["seed"]}
        for record in (json.loads(file.read_text()) for file in files if file.name.startswith("candidates-"))
        for row in record["rows"]
    ]
    scores = dict.fromkeys(name for row in candidates for name in row if name.startswith("score "))
    selections = [
        {"seed": one["seed"], "selector": name, "routes": " ".join(_names(chosen))}
        for one in (json.loads(file.read_text()) for file in selected)
        for name, chosen in one["selected"].items()
    ]
    for name, fields, rows in (
        ("runs.csv", RUN_FIELDS, runs),
        ("candidates.csv", ("seed", *RUN_FIELDS[2:-1], *scores), candidates),
        ("selections.csv", ("seed", "selector", "routes"), selections),
    ):
        with (results / name).open("w", newline="") as file:
            file.write(f"# {json.dumps(about, sort_keys=True)}\n")
            writer = csv.DictWriter(file, fields, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def _names(stitches: list[dict[str, Any]]) -> list[str]:
    return [str(Route.from_json(one["json"])) for one in stitches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--family", default="deit-micro", help="a name or a family file")
    parser.add_argument("--selected", type=Path, nargs="+")
    parser.add_argument("--selectors", nargs="+", default=["snnet", "klas"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--batch", type=int, default=PRESETS["quick"].batch)
    parser.add_argument("--steps-per-route", type=int, default=1_000)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--collect", type=Path, metavar="OUT")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if arguments.collect:
        collect(arguments.collect, arguments.results, arguments.selected or [])
        return
    ends = time.time() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(arguments, arguments.selectors)
    arguments.processes = min(arguments.processes, len(jobs))
    context = multiprocessing.get_context("spawn")
    data = load(arguments.data, DEVICE)[0], load_test(arguments.data, DEVICE)
    for one in (json.loads(file.read_text()) for file in arguments.selected):
        everything = one["selected"].get("all both") or one["selected"]["all"]
        job = {"seed": one["seed"], "every": one.get("every", 1), "stitches": everything}
        score_candidates(job, data, arguments)
    if not jobs:
        print("Everything asked for is done.")
        return
    together = Together(
        waiting=context.Value("i", arguments.processes), ready=context.Barrier(arguments.processes),
        shares=context.Array("d", arguments.processes),
    )  # fmt: skip
    processes = [
        context.Process(target=work, args=(number, jobs, together, arguments, ends))
        for number in range(arguments.processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
