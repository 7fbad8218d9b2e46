"""How much do KLAS's own settings matter? τ, buckets, direction of KL, temperature, epochs of the probes.

    python benchmarks/ablations.py --data data/cifar10 --families deit-micro      # after compare_selectors.py

Every variant chooses from the same candidates. What its stitches are worth is read off the run `all` of
compare_selectors.py, in which every candidate of the seed was tuned in one supernet: no variant is tuned
by itself, so areas here compare with each other and not with those of that benchmark.

Written: results/selectors/<family>/ablations.csv; selector_report.py puts them on its page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import compare_selectors as benchmark
import numpy as np
import selector_report
import torch
from torch import Tensor

from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch
from klas_zoo.families.specs import find_family
from klas_zoo.frontier import area, frontier
from klas_zoo.selection import select
from klas_zoo.selection.candidates import SelectionSettings
from klas_zoo.selection.measurements import Measurements
from klas_zoo.selection.probes import log_probabilities, train_probes
from klas_zoo.selection.similarity import Similarities

TOLERANCES = (0.0, 0.01, 0.03, 0.05, 0.10)
BUCKETS = (5, 10, 15, 20, 30)
TEMPERATURES = (0.5, 1.0, 2.0, 4.0)
EPOCHS = (1, 2, 4, 8)
DIRECTIONS = ("source first", "target first", "both")
FIELDS = ("seed", "ablation", "value", "selector", "stitches", "area", "spearman", "share of best")

LogProbabilities = dict[str, Tensor]


class Variant(NamedTuple):
    """One setting changed, all others as in the paper."""

    ablation: str
    value: str
    probes: Similarities
    settings: SelectionSettings = SelectionSettings()


def probe(job: benchmark.Job, epochs: int) -> LogProbabilities:
    """log P of every position on the held-out images, anchor → (n + 1, N, classes)."""
    chains = job.family.chains
    images = dataclasses.replace(job, arguments=_with_epochs(job.arguments, epochs)).images
    probes = dict(train_probes(chains, images.epochs(), benchmark.ProbeSettings(epochs=epochs)))
    heldout = list(images.heldout())
    return {name: _answers(chain, probes[name], heldout) for name, chain in chains.items()}


@torch.inference_mode()
def _answers(chain: Chain, probes: torch.nn.Module, heldout: list[Batch]) -> Tensor:
    return torch.cat([log_probabilities(chain, probes, images).double() for images, _ in heldout], dim=1)


def similarities(logs: LogProbabilities, *, temperature: float = 1.0, direction: str = DIRECTIONS[0]) -> Similarities:
    """Θ as klas_zoo measures it, or of other temperatures or in another direction, from the same answers."""
    logs = {name: (log / temperature).log_softmax(-1) for name, log in logs.items()}
    forward = {(f, g): divergence(logs[f], logs[g]) for f, g in product(logs, repeat=2)}
    backward = {(f, g): divergence(logs[g], logs[f]).T for f, g in forward}
    tables = {
        DIRECTIONS[0]: forward,
        DIRECTIONS[1]: backward,
        DIRECTIONS[2]: {pair: (forward[pair] + backward[pair]) / 2 for pair in forward},
    }
    images = next(iter(logs.values())).shape[1]
    return Similarities(between=tables[direction], probe_accuracy={}, images=images)


def divergence(p: Tensor, q: Tensor) -> np.ndarray:
    """Mean KL(P_i ‖ Q_j) in nats of log-probabilities (n, N, classes) and (m, N, classes) → (n, m)."""
    own = (p.exp() * p).sum(-1).mean(1)
    crossed = p.exp().flatten(1) @ q.flatten(1).T / p.shape[1]
    return (own[:, None] - crossed).numpy()


def variants(job: benchmark.Job) -> Iterator[Variant]:
    usual = job.arguments.probe_epochs
    by_epochs = {epochs: probe(job, epochs) for epochs in sorted({*EPOCHS, usual})}
    plain = similarities(by_epochs[usual])
    for tolerance in TOLERANCES:
        yield Variant("tau", f"{tolerance:.0%}", plain, SelectionSettings(tolerance=tolerance))
    for buckets in BUCKETS:
        yield Variant("buckets", str(buckets), plain, SelectionSettings(buckets=buckets))
    for direction in DIRECTIONS:
        yield Variant("direction of KL", direction, similarities(by_epochs[usual], direction=direction))
    for temperature in TEMPERATURES:
        yield Variant("temperature", f"{temperature:g}", similarities(by_epochs[usual], temperature=temperature))
    for epochs in EPOCHS:
        yield Variant("epochs of the probes", str(epochs), similarities(by_epochs[epochs]))


def score(job: benchmark.Job, variant: Variant, selector: str, known: selector_report.Family) -> dict[str, Any]:
    """What a variant chooses, valued by the run `all` of the same seed."""
    seed = str(job.seed)
    tuned = {row["route"]: float(row["top1"]) for row in known.runs["all", seed]}
    pairs = tuple(dict.fromkeys((r["source"], r["target"]) for r in known.runs["all", seed] if r["target"]))
    settings = SelectionSettings(
        buckets=variant.settings.buckets, tolerance=variant.settings.tolerance, pairs=pairs, selector=selector
    )
    found = select(job.family.chains, Measurements(probes=variant.probes), job.macs, settings)
    points = [(job.macs(route), tuned[str(route)]) for route in (*job.anchors, *found.routes)]
    scored = [{"score": c.score, "top1": tuned[str(c.route)], "bucket": (c.source, c.bucket)} for c in found.candidates]
    chosen = {str(route) for route in found.routes}
    return {
        "seed": seed, "ablation": variant.ablation, "value": variant.value, "selector": selector,
        "stitches": len(found.routes),
        "area": area(frontier(points, lambda p: p[0], lambda p: p[1]), *known.ends),
        "spearman": selector_report.spearman_by_bucket(scored),
        "share of best": known.share_of_best_of(chosen, seed),
    }  # fmt: skip


def _with_epochs(arguments: Any, epochs: int) -> Any:
    return type(arguments)(**{**vars(arguments), "probe_epochs": epochs})


def run_family(name: str, arguments: Any) -> None:
    folder = benchmark.HERE / find_family(name).name
    known = selector_report.Family(folder)
    file = folder / "ablations.csv"
    for seed in arguments.seeds:
        if (str(seed),) in benchmark.done(file, "seed"):
            continue
        job = benchmark.open_job(name, seed, arguments)
        rows = [score(job, one, selector, known) for one in variants(job) for selector in ("klas", "kl-only")]
        benchmark.append(file, FIELDS, rows, job)
        print(f"{job.family.name} seed {seed}: {len(rows)} variants", flush=True)


def main() -> None:
    arguments = benchmark.parse(__doc__)
    for name in arguments.families:
        run_family(name, arguments)
    selector_report.main()


if __name__ == "__main__":
    main()
