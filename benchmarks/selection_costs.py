"""What selection, evaluation and tuning cost beyond the networks' own arithmetic, as ratios within one run.

    python benchmarks/selection_costs.py           # about a quarter of an hour on 2 cores, random weights

* scoring all 3 × 12 × 12 candidates of DeiT Ti/S/B (probes and Θ) against the anchors' forward passes over
  the same images, and peak memory at two numbers of images;
* linear CKA of all block pairs against a loop over pairs on the same features;
* evaluating SN-Net's 71 DeiT routes with shared prefixes against the time in which plain forward passes of the
  anchors do as many multiply-adds;
* tuning against plain training of the same anchors, by multiply-adds a second.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from record import read_parts, write_part
from torch import Tensor, nn

from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch
from klas_zoo.families.anchors import Family, load_family
from klas_zoo.families.specs import find_family
from klas_zoo.profiles.macs import ChainCost, part_costs, route_costs, seam_cost
from klas_zoo.routes import Route, Seam
from klas_zoo.selection.cka import measure_cka
from klas_zoo.selection.probes import ProbeSettings, train_probes
from klas_zoo.selection.similarity import measure_similarities
from klas_zoo.selection.snnet import window_seams
from klas_zoo.supernet import RouteStep, Supernet, steps_of
from klas_zoo.tuning.evaluation import evaluate
from klas_zoo.tuning.settings import PRESETS
from klas_zoo.tuning.tuner import tune

IMAGES = 32  # per pass of scoring; the ratio does not depend on it
PAIRS = (("tiny", "small"), ("small", "base"))


def seconds(job: Callable[[], Any]) -> float:
    started = time.perf_counter()
    job()
    return time.perf_counter() - started


def ratios(one: Callable[[], Any], other: Callable[[], Any], repeats: int) -> dict[str, Any]:
    """Times two jobs in turn, the first turn not counted; ratios of the first to the second."""
    seconds(one), seconds(other)
    pairs = [(seconds(one), seconds(other)) for _ in range(repeats)]
    found = [a / b for a, b in pairs]
    return {"seconds": pairs, "ratios": found, "median_ratio": statistics.median(found)}


def deit() -> Family:
    return load_family(find_family("deit"), random_weights=True)


def made_up(count: int, batch: int, shape: tuple[int, ...], classes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(batch, *shape, generator=generator), torch.randint(0, classes, (batch,), generator=generator))
        for _ in range(count // batch)
    ]


def scoring(family: Family, repeats: int) -> dict[str, Any]:
    batches = made_up(IMAGES, 16, family.input_shape, family.num_classes)

    def forward_passes() -> None:
        with torch.inference_mode():
            for (images, _), chain in itertools.product([*batches, *batches], family.chains.values()):
                chain(images)

    def score() -> None:
        probes = train_probes(family.chains, [iter(batches)], ProbeSettings(epochs=1))
        measure_similarities(family.chains, probes, batches)

    return {"images": IMAGES, "batch": 16, **ratios(score, forward_passes, repeats)}


def peak_memory(images: int) -> int:
    """Bytes at most, of a process of its own that scores deit-micro on so many images."""
    code = (
        "import resource, selection_costs as s; s.score_micro(%d); "
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    command = [sys.executable, "-c", code % images]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    return int(out.stdout)


def score_micro(images: int) -> None:
    family = load_family(find_family("deit-micro"))
    one = made_up(100, 100, family.input_shape, family.num_classes)[0]

    def stream() -> Iterator[Batch]:
        return itertools.repeat(one, images // 100)

    probes = train_probes(family.chains, [stream()], ProbeSettings(epochs=1))
    measure_similarities(family.chains, probes, stream())
    seams = [Seam("tiny", i, "small", j) for i in range(1, 9) for j in range(1, 9)]
    measure_cka(family.chains, seams, stream())


class _Stored(nn.Module):
    """A block that gives features which are there already: what is timed is CKA alone."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features

    def forward(self, images: Tensor) -> Tensor:
        return self.features[: len(images)]


def cka(repeats: int) -> dict[str, Any]:
    """12 × 12 pairs of features (64, 197, 192) and (64, 197, 384)."""
    generator = torch.Generator().manual_seed(0)
    features = {
        name: [torch.randn(64, 197, width, generator=generator) for _ in range(12)]
        for name, width in (("tiny", 192), ("small", 384))
    }
    chains = {}
    for name, found in features.items():
        blocks = [_Stored(one) for one in found]
        chains[name] = Chain(_Stored(found[0]), blocks, _FirstTen(), input_shape=(3, 8, 8))
    seams = [Seam("tiny", i, "small", j) for i in range(1, 13) for j in range(1, 13)]
    batch = (torch.zeros(64, 3, 8, 8), torch.zeros(64, dtype=torch.long))

    def hsic(k: Tensor, l: Tensor) -> Tensor:  # noqa: E741  the literature's name
        centre = torch.eye(len(k)) - 1 / len(k)
        return torch.trace(k @ centre @ l @ centre) / (len(k) - 1) ** 2

    def loop() -> None:
        for x, y in itertools.product(features["tiny"], features["small"]):
            x, y = x.flatten(1), y.flatten(1)
            k, l = x @ x.T, y @ y.T  # noqa: E741
            hsic(k, l) / (hsic(k, k) * hsic(l, l)).sqrt()

    return ratios(loop, lambda: measure_cka(chains, seams, [batch]), repeats)


class _FirstTen(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return features.mean(1)[:, :10]


def evaluation(family: Family, repeats: int) -> dict[str, Any]:
    """SN-Net's 71 routes: their time against that of as many multiply-adds in plain forward passes.

    What is left to compute in each anchor's blocks counts at the pace of that anchor's own plain passes.
    """
    chains = family.chains
    stitches = [
        Route.stitch(f, i, g, j, chains[g].depth) for f, g in PAIRS for i, j in window_seams(chains[f], chains[g])
    ]
    anchors = [Route.anchor(name, chain.depth) for name, chain in chains.items()]
    supernet = Supernet(chains, [*anchors, *stitches]).eval()
    batch = made_up(8, 8, family.input_shape, family.num_classes)
    cost_of = route_costs(family)
    shared = shared_macs(family, supernet)
    macs = {name: cost_of(anchor).macs for name, anchor in zip(chains, anchors, strict=True)}
    turns = {name: max(4, round(shared[name] / 4 / macs[name])) for name in chains}

    def plain(name: str) -> None:
        with torch.inference_mode():
            for _ in range(turns[name]):
                chains[name](batch[0][0])

    def one_turn() -> tuple[float, dict[str, float]]:
        return seconds(lambda: evaluate(supernet, supernet.routes, batch)), {
            name: seconds(partial(plain, name)) for name in chains
        }

    one_turn()
    rows = []
    for _ in range(repeats):
        took, alone = one_turn()
        expected = sum(alone[name] / turns[name] * shared[name] / macs[name] for name in chains)
        rows.append({"seconds": took, "plain_seconds": alone, "expected_seconds": expected, "ratio": took / expected})
    separate = sum(cost_of(route).macs for route in supernet.routes)
    return {
        "batch": 8, "routes": len(supernet.routes), "macs_one_by_one": separate, "macs_shared": shared,
        "share_left": sum(shared.values()) / separate, "plain_passes": turns, "turns": rows,
        "median_time_ratio": statistics.median(row["ratio"] for row in rows),
    }  # fmt: skip


def shared_macs(family: Family, supernet: Supernet) -> dict[str, int]:
    """Multiply-adds in each anchor's modules when every prefix that routes share is computed once; seams are
    their target's."""
    parts = part_costs(family)
    total = dict.fromkeys(family.chains, 0)
    seen = set()
    for route in supernet.routes:
        steps = steps_of(route)
        for length, step in enumerate(steps, start=1):
            if steps[:length] not in seen:
                seen.add(steps[:length])
                total[step.seam.target if step.seam else step.anchor] += step_macs(step, family, parts)
    return total


def step_macs(step: RouteStep, family: Family, parts: dict[str, ChainCost]) -> int:
    if step.seam is not None:
        source, target = family.chains[step.seam.source], family.chains[step.seam.target]
        return seam_cost(source.layouts[step.seam.i], target.layouts[step.seam.j]).macs
    part = parts[step.anchor]
    if step.kind == "block":
        return part.block_macs[step.block - 1]
    return part.stem_macs if step.kind == "stem" else part.head_macs


def tuning(repeats: int, steps: int = 30) -> dict[str, Any]:
    """Multiply-adds a second of tuning deit-micro's stitches against plain training of the same modules, in fp32.

    Both go through the same routes in the same order. Plain training sees each as a network of its own, learns
    from labels alone and has a plain AdamW. A training step is counted as three forward passes, the teacher's,
    which only tuning has, as one.
    """
    family = load_family(find_family("deit-micro"))
    cost_of = route_costs(family)
    chains = family.chains
    routes = [Route.stitch(f, i, g, i, 8) for f, g in PAIRS for i in range(1, 8)]
    anchors = [Route.anchor(name, chain.depth) for name, chain in chains.items()]
    supernet = Supernet(chains, [*anchors, *routes])
    networks = {route: supernet.network(route) for route in supernet.routes}
    batch = made_up(64, 64, family.input_shape, family.num_classes)[0]
    settings = replace(PRESETS["quick"], precision="fp32", reuse=1, seed=0)
    draw = random.Random(settings.seed)
    order = [draw.choice(supernet.routes) for _ in range(steps)]
    trained = sum(3 * cost_of(route).macs for route in order)
    optimiser = torch.optim.AdamW(supernet.parameters(), lr=1e-5)

    def train() -> None:
        for route in order:
            loss = F.cross_entropy(networks[route](batch[0]), batch[1])
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()

    found = ratios(train, lambda: tune(supernet, itertools.repeat(batch), steps, settings), repeats)
    tuned = trained + steps * cost_of(anchors[-1]).macs
    return {**found, "median_throughput_ratio": found["median_ratio"] * tuned / trained}


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "scoring": lambda repeats: scoring(deit(), repeats),
    "peak_memory_bytes": lambda repeats: {str(count): peak_memory(count) for count in (500, 4_000)},
    "cka": cka,
    "evaluation": lambda repeats: evaluation(deit(), repeats),
    "tuning": tuning,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="the rest stays as it was")
    arguments = parser.parse_args()
    for name in arguments.parts:
        write_part("selection_costs", name, PARTS[name](arguments.repeats))
    found = read_parts("selection_costs")
    if "scoring" in found:
        print(f"scoring / forward passes: {found['scoring']['median_ratio']:.3f}")
    if memory := found.get("peak_memory_bytes"):
        print("peak memory: " + ", ".join(f"{count} images {size / 1e6:.0f} MB" for count, size in memory.items()))
    if "cka" in found:
        print(f"loop over pairs / CKA of all pairs: {found['cka']['median_ratio']:.1f}")
    if shared := found.get("evaluation"):
        print(f"evaluating {shared['routes']} routes: {shared['share_left']:.3f} of the multiply-adds of one by one, "
              f"{shared['median_time_ratio']:.3f} of the time these take in plain forward passes")
    if "tuning" in found:
        print(f"tuning / plain training, multiply-adds a second: {found['tuning']['median_throughput_ratio']:.3f}")


if __name__ == "__main__":
    main()
