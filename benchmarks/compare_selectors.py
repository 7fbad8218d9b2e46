"""Does KLAS beat its rivals? Every selector, tuned alike, on full CIFAR-10 and real trained families.

    python benchmarks/compare_selectors.py --data data/cifar10                   # everything: hours on 2 cores
    python benchmarks/compare_selectors.py --data data/cifar10 --families deit-micro benchmarks/convnet-micro.toml

For each family and seed all measurements are taken once; then each selector's stitches are fitted, tuned
for the same number of steps on the same batches, and scored on the same test images. Besides these
selectors of klas-zoo there are `warm-up` (all candidates are tuned together for a third of the steps, the best of each
bucket on held-out images go on), and controls: `all` (every candidate in one supernet), `self` (a network
stitched with itself, blocks left out) and cascades of two anchors at the same mean cost. Selectors stitch
up, from the smaller anchor to the larger one, as published; those called `<selector> down` stitch the other way
(`--direction down`), `<selector> both` choose among stitches both ways, and `<selector> few` keep the best of 4
buckets a pair, no more than SN-Net has where networks have stages. With `--every 2` there are seams behind every
second block only, which leaves a quarter of the candidates.

Written: results/selectors/<family>/*.csv, a line of `#` before the header says on what machine. Seeds and
selectors that stand there already are not run again, so an interrupted benchmark goes on where it
stopped. At the end selector_report.py turns the tables into figures and one page of numbers.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import selector_report
import torch
from coarser_chains import coarser
from torch import Tensor

from klas_zoo.data.loading import Batch, Data, Split, batches, load_data
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import find_family
from klas_zoo.initialisation import initialise_stitches
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.profiles.macs import route_costs
from klas_zoo.routes import Route, Seam
from klas_zoo.selection import select
from klas_zoo.selection.candidates import Candidate, Direction, SelectionSettings
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.measuring import MeasurementImages, images_of, measure
from klas_zoo.selection.probes import ProbeSettings
from klas_zoo.selection.scoring import keep_best
from klas_zoo.selection.selectors import find_selector
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.evaluation import evaluate
from klas_zoo.tuning.settings import PRESETS
from klas_zoo.tuning.tuner import tune
from klas_zoo.versions import versions

SELECTORS = (
    "snnet", "klas", "kl-only", "cka", "mse", "ce", "direct", "random", "output-kl",
)  # fmt: skip
DOWN, BOTH, FEW = " down", " both", " few"  # end the names of variants
OTHERS = (
    "klas both", "kl-only both", "snnet both", "klas few", "kl-only few", "klas both few", "warm-up", "all", "self",
)  # fmt: skip
EVERYTHING = (
    *(name + variant for variant in ("", DOWN, BOTH, FEW, BOTH + FEW) for name in SELECTORS), "all both", "self",
)  # fmt: skip
HERE = Path(__file__).parent / "results" / "selectors"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One family with one seed: what all of its runs share."""

    family: Family
    data: Data
    macs: Callable[[Route], float]
    arguments: argparse.Namespace
    seed: int

    @property
    def anchors(self) -> list[Route]:
        return [Route.anchor(name, chain.depth) for name, chain in self.family.chains.items()]

    def settings(self, selector: str) -> SelectionSettings:
        few = {"buckets": 4, "most": 1} if selector.endswith(FEW) else {}
        wanted = selector.removesuffix(FEW)
        direction: Direction = "both" if wanted.endswith(BOTH) else "down" if wanted.endswith(DOWN) else "up"
        name = wanted.removesuffix(BOTH).removesuffix(DOWN)
        return SelectionSettings(selector=name, direction=direction, seed=self.seed, **few)

    @property
    def images(self) -> MeasurementImages:
        """What is measured on, the same for every selector."""
        return images_of(
            self.data, probing=self.probing, batch=100, init_images=self.arguments.fit_images, seed=self.seed
        )

    @property
    def probing(self) -> ProbeSettings:
        return ProbeSettings(epochs=self.arguments.probe_epochs)


def open_job(name: str, seed: int, arguments: argparse.Namespace) -> Job:
    """The family and its images; splits are cut down to what the arguments allow, at random."""
    family = coarser(load_family(find_family(name)), arguments.every)
    data = load_data(
        arguments.data, sample=None, num_classes=family.num_classes, data_config=family.data_config, seed=seed
    )
    few = replace(
        data,
        train=_some(data.train, arguments.probe_images, seed),
        heldout=_some(data.heldout, arguments.heldout_images, seed),
        test=_some(data.test, arguments.test_images, 0),  # the same for all seeds
    )
    cost_of = route_costs(family)
    return Job(family=family, data=few, macs=lambda route: float(cost_of(route).macs), arguments=arguments, seed=seed)


def _some(split: Split, count: int, seed: int) -> Split:
    chosen = np.random.default_rng(seed).permutation(len(split))[:count]
    return Split(split.source, [split.indices[k] for k in sorted(chosen)], split.transform)


def take_measurements(job: Job, file: Path) -> Measurements:
    """Everything the selectors ask for, from a file if they were taken before."""
    if file.exists():
        return Measurements.from_json(json.loads(file.read_text()))
    names = ["klas", *(name for name in SELECTORS if name in job.arguments.selectors)]
    needs = frozenset().union(*(find_selector(name).asks_for(job.settings(name)) for name in names))
    found = measure(
        job.family.chains, needs - {"latency_ms"}, job.images, job.macs, job.settings("klas both"),
        probing=job.probing,
    )  # fmt: skip
    file.write_text(json.dumps(found.to_json(), sort_keys=True) + "\n")
    return found


def stitches_of(job: Job, selector: str, measured: Measurements) -> list[Candidate]:
    """The stitches of one selector; all stitch the anchor pairs that klas chooses, so that they compare."""
    pairs = select(job.family.chains, measured, job.macs, job.settings("klas")).pairs
    if selector == "self":
        return self_stitches(job)
    settings = replace(job.settings(selector), pairs=pairs)
    return list(select(job.family.chains, measured, job.macs, settings).chosen)


def self_stitches(job: Job) -> list[Candidate]:
    """The largest anchor with blocks left out: (i, j) of it with itself, i ≤ j, for every seam there is."""
    name = list(job.family.chains)[-1]
    chain = job.family.chains[name]
    seams = [
        Seam(name, i, name, j)
        for i in range(1, chain.depth)
        for j in range(i, chain.depth)
        if chain.shapes[i] == chain.shapes[j]
    ]
    return [
        Candidate(
            route=(route := Route.stitch(name, s.i, name, s.j, chain.depth)), source=name, i=s.i, target=name,
            j=s.j, cost=job.macs(route), bucket=0,
        )
        for s in seams
    ]  # fmt: skip


def new_supernet(job: Job, stitches: Sequence[Candidate]) -> Supernet:
    """A fresh copy of the anchors with these stitches, fitted in closed form."""
    torch.manual_seed(job.seed)
    supernet = Supernet(copy.deepcopy(job.family.chains), [*job.anchors, *(c.route for c in stitches)])
    initialise_stitches(supernet, job.images.fit())
    return supernet


def tune_for(job: Job, supernet: Supernet, steps: int, seed: int) -> None:
    random.seed(seed)
    settings = replace(PRESETS["quick"], steps=steps, seed=seed)
    endless = batches(job.data.augmented, settings.batch, shuffle_seed=seed, forever=True)
    tune(supernet, endless, steps, settings)


def warmed_up(job: Job, everything: Sequence[Candidate]) -> tuple[list[Candidate], Supernet]:
    """The best candidates of each bucket after a shared warm-up, in a supernet that goes on from there."""
    warm = new_supernet(job, everything)
    tune_for(job, warm, job.arguments.steps // 3, job.seed + 1_000)
    top1 = evaluate(warm, warm.routes, job.images.heldout())
    stitches = []
    for pair in dict.fromkeys((c.source, c.target) for c in everything):
        scored = [replace(c, score=-top1[c.route], reason="") for c in everything if (c.source, c.target) == pair]
        # within τ of the best accuracy would be nearly all: the best one of each bucket
        stitches += [c for c in keep_best(scored, SelectionSettings(most=1)) if c.reason]
    chains = {name: warm.chain(name) for name in job.family.chains}
    supernet = Supernet(chains, [*job.anchors, *(c.route for c in stitches)])
    for seam in supernet.seams:
        supernet.stitch(seam).load_state_dict(warm.stitch(seam).state_dict())
    return stitches, supernet


def test_batches(job: Job) -> Iterator[Batch]:
    return batches(job.data.test, 250)


def rows_of(job: Job, stitches: Sequence[Candidate], top1: dict[Route, float]) -> Iterator[dict[str, Any]]:
    for route in job.anchors:
        yield {"route": str(route), "source": str(route), "macs": int(job.macs(route)), "top1": top1[route]}
    for one in stitches:
        yield {
            "route": str(one.route), "source": one.source, "i": one.i, "target": one.target, "j": one.j,
            "macs": int(job.macs(one.route)), "bucket": one.bucket, "reason": one.reason, "top1": top1[one.route],
        }  # fmt: skip


def run_selector(job: Job, selector: str, measured: Measurements, file: Path) -> None:
    """Fits, tunes and scores one selector's stitches; its rows are appended in one piece."""
    started = time.perf_counter()
    if selector == "warm-up":
        stitches, supernet = warmed_up(job, stitches_of(job, "all", measured))
        tune_for(job, supernet, job.arguments.steps - job.arguments.steps // 3, job.seed)
    else:
        stitches = stitches_of(job, selector, measured)
        supernet = new_supernet(job, stitches)
        tune_for(job, supernet, job.arguments.steps, job.seed)
    top1 = evaluate(supernet, supernet.routes, test_batches(job))
    seconds = round(time.perf_counter() - started)
    rows = [{"seed": job.seed, "selector": selector, "seconds": seconds, **row} for row in rows_of(job, stitches, top1)]
    append(file, selector_report.RUN_FIELDS, rows, job)
    print(f"{job.family.name} seed {job.seed} {selector}: {len(stitches)} stitches, {seconds} s", flush=True)


def score_candidates(job: Job, measured: Measurements, file: Path) -> None:
    """Every candidate with every score and its accuracy right after the closed form, on the test images."""
    everything = stitches_of(job, "all", measured)
    supernet = new_supernet(job, everything)
    top1 = evaluate(supernet, supernet.routes, test_batches(job))
    rows = [{"seed": job.seed, **row} for row in rows_of(job, everything, top1)]
    scores = {name: scores_of(job, name, measured) for name in SELECTORS if find_selector(name).formula}
    for row in rows:
        row |= {f"score {name}": found.get(row["route"], "") for name, found in scores.items()}
    fields = ("seed", *selector_report.RUN_FIELDS[2:-1], *(f"score {name}" for name in scores))
    append(file, fields, rows, job)


def scores_of(job: Job, selector: str, measured: Measurements) -> dict[str, float]:
    pairs = select(job.family.chains, measured, job.macs, job.settings("klas")).pairs
    settings = replace(job.settings(selector), pairs=pairs)
    found = select(job.family.chains, measured, job.macs, settings).candidates
    return {str(c.route): c.score for c in found if c.score is not None}


def run_cascades(job: Job, file: Path) -> None:
    """Two anchors in turn: the large one answers where the small one's highest probability is below a threshold.

    The anchors are as they were shipped; the cost is the mean over the test images.
    """
    chains, macs = job.family.chains, {str(route): job.macs(route) for route in job.anchors}
    answers: dict[str, list[Tensor]] = {name: [] for name in chains}
    labels: list[Tensor] = []
    with torch.inference_mode():
        for images, truth in test_batches(job):
            labels.append(truth)
            for name, chain in chains.items():
                answers[name].append(chain(images).softmax(1))
    truth, probabilities = torch.cat(labels), {name: torch.cat(parts) for name, parts in answers.items()}
    rows = []
    names = list(chains)
    for small, large in [(a, b) for k, a in enumerate(names) for b in names[k + 1 :]]:
        sure = probabilities[small].amax(1)
        for threshold in torch.quantile(sure, torch.linspace(0, 1, 41)).tolist():
            passed = sure < threshold
            answer = torch.where(passed, probabilities[large].argmax(1), probabilities[small].argmax(1))
            rows.append(
                {
                    "seed": job.seed, "small": small, "large": large, "threshold": threshold,
                    "macs": int(macs[small] + passed.float().mean().item() * macs[large]),
                    "top1": 100 * (answer == truth).float().mean().item(),
                }
            )  # fmt: skip
    append(file, tuple(rows[0]), rows, job)


def append(file: Path, fields: Sequence[str], rows: list[dict[str, Any]], job: Job) -> None:
    """Adds rows; a new file first says on what they were measured."""
    new = not file.exists()
    with file.open("a", newline="") as out:
        if new:
            about = {
                "family": job.family.name, "weights": job.family.fingerprint[:16], "date": str(datetime.date.today()),
                "hardware": resolve_device("cpu").hardware, "threads": torch.get_num_threads(),
                "versions": versions(),
                "settings": {k: v for k, v in vars(job.arguments).items() if k not in ("data", "families", "seeds")},
            }  # fmt: skip
            out.write(f"# {json.dumps(about, sort_keys=True, default=str)}\n")
        writer = csv.DictWriter(out, fields, restval="", lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def done(file: Path, *keys: str) -> set[tuple[str, ...]]:
    """What stands in a file already, by its key fields."""
    if not file.exists():
        return set()
    return {tuple(row[key] for key in keys) for row in selector_report.read(file)}


def write_selected(job: Job, selectors: Sequence[str], measured: Measurements, file: Path) -> None:
    """What every selector chose, and all candidates with their scores, for tune_selected.py."""
    names = ["all", *(name for name in selectors if name not in ("warm-up", "all"))]
    chosen = {name: [_as_json(one) for one in stitches_of(job, name, measured)] for name in names}
    for name in selectors:
        if name in SELECTORS and find_selector(name).formula:
            found = scores_of(job, name + BOTH, measured)
            for one in (*chosen["all"], *chosen.get("all both", [])):
                one[f"score {name}"] = found.get(str(Route.from_json(one["json"])), "")
    for name, routes in chosen.items():
        print(f"{job.family.name} seed {job.seed} {name}: {len(routes)} stitches", flush=True)
    file.write_text(json.dumps({"seed": job.seed, "every": job.arguments.every, "selected": chosen}) + "\n")


def _as_json(one: Candidate) -> dict[str, Any]:
    return {
        "json": one.route.to_json(), "source": one.source, "i": one.i, "target": one.target, "j": one.j,
        "bucket": one.bucket, "reason": one.reason,
    }  # fmt: skip


def run_family(name: str, arguments: argparse.Namespace) -> None:
    folder = HERE / find_family(name).name
    folder.mkdir(parents=True, exist_ok=True)
    for seed in arguments.seeds:
        job = open_job(name, seed, arguments)
        measured = take_measurements(job, folder / f"measurements-{seed}.json")
        if (str(seed),) not in done(folder / "cascades.csv", "seed"):
            run_cascades(job, folder / "cascades.csv")
        if arguments.select_only:
            write_selected(job, arguments.selectors, measured, folder / f"selected-{seed}.json")
            continue
        if (str(seed),) not in done(folder / "candidates.csv", "seed"):
            score_candidates(job, measured, folder / "candidates.csv")
        for selector in arguments.selectors:
            if (str(seed), selector) not in done(folder / "runs.csv", "seed", "selector"):
                run_selector(job, selector, measured, folder / "runs.csv")


def parse(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 (prepare_cifar10.py makes it)")
    parser.add_argument("--families", nargs="+", default=["deit-micro"], help="names or family files")
    parser.add_argument("--selectors", nargs="+", help="default: those above; with --select-only in every direction")
    parser.add_argument("--every", type=int, default=1, help="blocks from one seam to the next")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300, help="of tuning, the same for every selector")
    parser.add_argument("--probe-images", type=int, default=8_000)
    parser.add_argument("--probe-epochs", type=int, default=4)
    parser.add_argument("--heldout-images", type=int, default=2_000)
    parser.add_argument("--fit-images", type=int, default=2_000, help="that stitching layers are fitted to")
    parser.add_argument("--test-images", type=int, default=5_000)
    parser.add_argument("--select-only", action="store_true", help="write what is chosen, for tune_selected.py")
    arguments = parser.parse_args()
    if arguments.selectors is None:
        arguments.selectors = list(EVERYTHING if arguments.select_only else (*SELECTORS, *OTHERS))
    return arguments


def main() -> None:
    arguments = parse(__doc__)
    for name in arguments.families:
        run_family(name, arguments)
    if not arguments.select_only:
        selector_report.main()


if __name__ == "__main__":
    main()
