"""Tunes on a GPU what compare_selectors.py selected elsewhere: every selector alike, at least 1,000 steps a route.

    python benchmarks/compare_selectors.py --data data/cifar10 --select-only
    python benchmarks/tune_selected.py --data data/cifar10 --anchors zoo/builtin/deit-micro \
        --selected benchmarks/results/selectors/deit-micro/selected-*.json --selectors snnet klas --out data/selectors \
        --steps-per-route 1000 --minutes 9 --processes 6
    python benchmarks/tune_selected.py --collect data/selectors --results benchmarks/results/selectors/deit-micro

Settings are those of the preset `quick`, which compare_selectors.py uses too: batches of 64 images, anchors tuned
along, base as it was before as the teacher; the 46,000 training images outside the sample, and all 10,000 test images
at the end. A process takes one selector and seed after the other, in the order of `--selectors`, as long as another
fits into `--minutes`. The first ones measure their speed while all run, and if the time is too short for the steps a
route that were asked for, all take fewer, the same number. An NVIDIA multi-process server, where one runs, lets their
kernels overlap.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from cifar_training import Images, load, load_test, rate_at
from graphed_tuning import GraphedSteps
from local_products import local_products
from selector_report import RUN_FIELDS
from tune_supernet import load_chains, macs_of, training_batches

from klas_zoo.initialisation import initialise_stitches
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.evaluation import evaluate
from klas_zoo.tuning.settings import PRESETS
from klas_zoo.tuning.tuner import Tuner

TRIAL = 600  # steps after which a process knows its speed
SAFETY = 0.85  # of it: speeds fell by a sixth in the course of a run
FIT_IMAGES = 2_000
AFTERWARDS = 25  # seconds for the test images
ANCHORS = ("tiny", "small", "base")


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
    data = load(arguments.data, "cuda")[0], load_test(arguments.data, "cuda")
    agree = partial(together.agreed, number), together.ready.wait
    rate = run(jobs[number], data, arguments, ends, agree)
    while True:
        with together.waiting.get_lock():
            place = together.waiting.value
            if place >= len(jobs):
                return
            steps = arguments.steps_per_route * (len(jobs[place]["stitches"]) + len(ANCHORS))
            if time.time() + steps / rate + AFTERWARDS > ends:
                return
            together.waiting.value += 1
        rate = run(jobs[place], data, arguments, ends, None)


def fitted(job: dict[str, Any], training: Images, arguments: argparse.Namespace) -> Supernet:
    """A supernet of the anchors and a job's stitches in closed form."""
    seed = job["seed"]
    chains = load_chains(arguments.anchors, list(ANCHORS), "cuda")
    anchors = [Route.anchor(name, chain.depth) for name, chain in chains.items()]
    torch.manual_seed(seed)
    stitches = [Route.from_json(one["json"]) for one in job["stitches"]]
    supernet = Supernet(chains, [*anchors, *stitches]).to("cuda")
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[:FIT_IMAGES].to("cuda")
    initialise_stitches(supernet, Images(training.pixels[order], training.labels[order]).batches(500))
    return supernet


def rows_of(job: dict[str, Any], supernet: Supernet, top1: dict[Route, float]) -> list[dict[str, Any]]:
    """What is written of every route."""
    known = {Route.from_json(one["json"]): {k: v for k, v in one.items() if k != "json"} for one in job["stitches"]}
    chains = {name: supernet.chain(name) for name in ANCHORS}
    macs = macs_of(chains, list(supernet.routes))
    return [{**known.get(r, {}), "route": str(r), "macs": macs[r], "top1": top1[r]} for r in supernet.routes]


def score_candidates(job: dict[str, Any], data: tuple[Images, Images], arguments: argparse.Namespace) -> None:
    """All candidates of a seed in closed form."""
    supernet = fitted(job, data[0], arguments)
    rows = rows_of(job, supernet, evaluate(supernet, supernet.routes, data[1].batches(500)))
    (arguments.out / f"all-{job['seed']}.json").write_text(json.dumps({"seed": job["seed"], "rows": rows}) + "\n")


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
    settings = replace(PRESETS["quick"], steps=steps, seed=seed, precision="bf16")
    tuner = Tuner(supernet, steps, settings)
    stream = training_batches(training, settings.batch, 0.0, seed, "cuda")
    started = time.perf_counter()
    with tuner.running(), local_products():
        graphs = GraphedSteps(tuner, stream, reuse=2)
        graphs.capture(supernet.routes)
        if agree:
            agree[1]()  # speeds count when all are at work
        while tuner.done < steps:
            graphs.step()
            if tuner.done == TRIAL // 2:
                torch.cuda.synchronize()
                half = time.perf_counter()
            if agree and tuner.done == TRIAL:
                torch.cuda.synchronize()
                rate = (TRIAL - TRIAL // 2) / (time.perf_counter() - half)
                share = agree[0]((ends - AFTERWARDS - time.time()) * rate * SAFETY / (steps - TRIAL))
                steps = round(steps * share)
                tuner.steps = steps
                schedule(tuner, steps)
            if tuner.done % 2_000 == 0:
                spent = time.perf_counter() - started
                print(
                    job["selector"], seed, f"{tuner.done} of {steps}, loss {tuner.loss:.3f}, {spent:.0f} s", flush=True
                )
    torch.cuda.synchronize()
    spent = time.perf_counter() - started
    tuner.finish()
    top1 = evaluate(supernet, supernet.routes, test.batches(500))
    record = {
        "seed": seed, "selector": job["selector"], "seconds": round(spent), "steps": steps,
        "steps_per_route": round(steps / len(supernet.routes)), "rows": rows_of(job, supernet, top1),
        "hardware": torch.cuda.get_device_name(),
        "torch": torch.__version__, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    name = f"{job['selector'].replace(' ', '-')}-{seed}.json"
    (arguments.out / name).write_text(json.dumps(record) + "\n")
    print(job["selector"], seed, f"{spent:.0f} s, {steps} steps", flush=True)
    return steps / spent


def schedule(tuner: Tuner, steps: int) -> None:
    """Lets the learning rates come to their end after so many steps."""
    rates = [lambda step: rate_at(step / steps, tuner.settings.warmup)]
    tuner.scheduler.lr_lambdas = rates * len(tuner.optimiser.param_groups)


def jobs_of(arguments: argparse.Namespace, selectors: list[str]) -> list[dict[str, Any]]:
    """Selectors in the order given, all seeds of one before the next."""
    selections = [json.loads(file.read_text()) for file in arguments.selected]
    return [
        {"seed": one["seed"], "selector": selector, "stitches": one["selected"][selector]}
        for selector in selectors
        for one in selections
        if selector in one["selected"]
    ]


def collect(folder: Path, results: Path) -> None:
    """Writes `runs.csv` and `candidates.csv` as compare_selectors.py does, from what `--out` holds."""
    files = sorted(folder.glob("*.json"))
    records = [json.loads(file.read_text()) for file in files if not file.name.startswith("all-")]
    about = {
        "family": "deit-micro", "hardware": records[0]["hardware"], "torch": records[0]["torch"],
        "date": records[0]["date"], "test_images": 10_000, "batch": PRESETS["quick"].batch,
        "steps_per_route": sorted({record["steps_per_route"] for record in records}),
    }  # fmt: skip
    runs = [
        {"source": row["route"], **row, **{key: record[key] for key in ("seed", "selector", "seconds")}}
        for record in records
        for row in record["rows"]
    ]
    candidates = [
        {"source": row["route"], **row, "seed": record["seed"]}
        for record in (json.loads(file.read_text()) for file in files if file.name.startswith("all-"))
        for row in record["rows"]
    ]
    scores = dict.fromkeys(name for row in candidates for name in row if name.startswith("score "))
    for name, fields, rows in (
        ("runs.csv", RUN_FIELDS, runs),
        ("candidates.csv", ("seed", *RUN_FIELDS[2:-1], *scores), candidates),
    ):
        with (results / name).open("w", newline="") as file:
            file.write(f"# {json.dumps(about, sort_keys=True)}\n")
            writer = csv.DictWriter(file, fields, restval="", extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--anchors", type=Path)
    parser.add_argument("--selected", type=Path, nargs="+")
    parser.add_argument("--selectors", nargs="+", default=["snnet", "klas"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps-per-route", type=int, default=1_000)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--processes", type=int, default=6)
    parser.add_argument("--collect", type=Path, metavar="OUT")
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    if arguments.collect:
        collect(arguments.collect, arguments.results)
        return
    ends = time.time() + 60 * arguments.minutes
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = jobs_of(arguments, arguments.selectors)
    arguments.processes = min(arguments.processes, len(jobs))
    context = multiprocessing.get_context("spawn")
    for job in jobs_of(arguments, ["all"]):
        score_candidates(job, (load(arguments.data, "cuda")[0], load_test(arguments.data, "cuda")), arguments)
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
