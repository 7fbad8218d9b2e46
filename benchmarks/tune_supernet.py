"""Tunes the stitches (i, i) between neighbouring anchors of `deit-micro` on the 46,000 images outside the sample.

    python benchmarks/tune_supernet.py --data data/cifar10 --anchors data/anchors --out data/tuned \
        --variant joint-norms --steps 17000 --save
    python benchmarks/tune_supernet.py … --pair tiny:small --variant frozen --steps 1500 --seed 1

Variants of tuning, all with closed-form stitching layers to begin with:

    joint             anchors and stitching layers
    frozen            stitching layers alone
    frozen-norms      and normalisations that every stitch has for itself behind its seam
    frozen-low-rank   and updates of rank 8 in the first two blocks behind the seam
    joint-features    joint, and the distance from the target's last features
    joint-gain        joint, routes drawn in proportion to what they still gain
    joint-norms       joint, and normalisations of every stitch's own
    joint-low-rank    and updates of rank 8

Written to `--out`: `<variant>-<seed>.json` with top-1 on the sample's 4,000 training images, which neither anchors
nor stitches have learned from, in closed form and tuned; with `--save` also on the 10,000 test images, and
`<variant>-<seed>.safetensors` in fp16. The base network as it was before tuning is the teacher. Runs on the CPU or
on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from cifar_training import Images, Teachers, augmented, let_muon_update, load, load_test, mixed, rate_at
from graphed_tuning import GraphedSteps
from local_products import local_products
from safetensors.torch import load_file, save_file
from timm.layers import set_fused_attn
from train_anchors import accuracy, load_teacher

import klas_zoo.families.micro  # noqa: F401  registers the anchors with timm
from klas_zoo.chains import Chain
from klas_zoo.initialisation import initialise_stitches
from klas_zoo.profiles.macs import chain_cost, route_cost, seam_cost
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.evaluation import evaluate
from klas_zoo.tuning.settings import TuningSettings
from klas_zoo.tuning.tuner import Tuner

SHAPE = (3, 32, 32)
VARIANTS: dict[str, dict[str, Any]] = {
    "joint": {},
    "frozen": {"anchors": "frozen"},
    "frozen-norms": {"anchors": "frozen", "own_norms": True},
    "frozen-low-rank": {"anchors": "frozen", "own_norms": True, "rank": 8},
    "joint-features": {"features": 1.0},
    "joint-gain": {"sampling": "gain"},
    "joint-norms": {"own_norms": True},
    "joint-low-rank": {"own_norms": True, "rank": 8},
}


def load_chains(folder: Path, names: list[str], device: str) -> dict[str, Chain]:
    """Anchors by size, smallest first."""
    chains = {}
    for name in names:
        model = timm.create_model(f"deit_micro_{name}")
        weights = load_file(folder / f"deit_micro_{name}.safetensors")
        model.load_state_dict({key: value.float() for key, value in weights.items()})
        chains[name] = Chain.of(model.eval(), SHAPE).to(device)
    return chains


def paired_routes(chains: dict[str, Chain], pairs: list[tuple[str, str]]) -> list[Route]:
    """The anchors, and the stitches (i, i) of each pair."""
    anchors = [Route.anchor(name, chain.depth) for name, chain in chains.items()]
    return anchors + [
        Route.stitch(source, i, target, i, chains[target].depth)
        for source, target in pairs
        for i in range(1, chains[target].depth)
    ]


def macs_of(chains: dict[str, Chain], routes: list[Route]) -> dict[Route, int]:
    costs = {name: chain_cost(chain, SHAPE) for name, chain in chains.items()}

    def of_seam(seam):  # type: ignore[no-untyped-def]
        return seam_cost(chains[seam.source].layouts[seam.i], chains[seam.target].layouts[seam.j])

    return {route: route_cost(route, costs, of_seam).macs for route in routes}


def training_batches(
    images: Images, batch: int, mixup: float, seed: int, device: str, cutout: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless augmented batches: images and targets (B, classes)."""
    padded, generator = images.padded(), torch.Generator(device).manual_seed(seed)
    while True:
        order = torch.randperm(len(padded), generator=generator, device=device)
        for chosen in order[: len(order) // batch * batch].split(batch):
            pictures, labels = augmented(padded, chosen, generator, cutout)
            yield mixed(pictures, F.one_hot(labels, 10).float(), mixup, generator)


def tune(arguments: argparse.Namespace) -> dict[str, Any]:
    device = arguments.device
    training, held_out = load(arguments.data, device)
    if arguments.limit:
        held_out = Images(held_out.pixels[: arguments.limit], held_out.labels[: arguments.limit])
    pairs = [tuple(pair.split(":")) for pair in arguments.pair]
    names = [name for name in ("tiny", "small", "base") if any(name in pair for pair in pairs)]
    chains = load_chains(arguments.anchors, names, device)
    routes = paired_routes(chains, pairs)  # type: ignore[arg-type]
    macs = macs_of(chains, routes)
    supernet = Supernet(chains, routes).to(device)
    order = torch.randperm(len(training), generator=torch.Generator().manual_seed(arguments.seed))
    chosen = order[: arguments.limit or 4_000].to(device)
    initialise_stitches(supernet, Images(training.pixels[chosen], training.labels[chosen]).batches(500))
    before = evaluate(supernet, routes, held_out.batches(500))
    test = load_test(arguments.data, device) if arguments.save else None
    tested = [evaluate(supernet, routes, test.batches(500)) if test else {}]
    settings = TuningSettings(
        steps=arguments.steps, epochs=1, batch=arguments.batch, anchor_rate=arguments.anchor_rate,
        stitch_rate=arguments.stitch_rate, weight_decay=0.05, warmup=0.05, distillation=0.8, hard=False, clip=None,
        augmentation="light", init_images=4_000, precision="bf16", compile=arguments.compile, temperature=2.0,
        seed=arguments.seed, reuse=arguments.reuse,
    )  # fmt: skip
    settings = replace(settings, **VARIANTS[arguments.variant])
    teacher: torch.nn.Module = load_chains(arguments.anchors, ["base"], device)["base"].eval().requires_grad_(False)
    if arguments.teacher:
        teacher = Teachers(teacher, _InItsType(load_teacher(arguments.teacher, device)))
    taught = accuracy(teacher, held_out, device)
    print(f"{arguments.name}: teacher {taught:.2f} % of the images held out", flush=True)
    tuner = Tuner(supernet, arguments.steps, settings, teacher=teacher.eval())
    if arguments.muon:
        let_muon_update(tuner.optimiser, supernet.chains, arguments.muon, settings.weight_decay)
    stream = training_batches(training, arguments.batch, arguments.mixup, arguments.seed, device, arguments.cutout)
    started = time.perf_counter()
    if arguments.seconds:
        schedule_by_time(tuner, arguments.seconds)
    with tuner.running(), local_products() if device == "cuda" else nullcontext():
        graphs = GraphedSteps(tuner, stream) if arguments.graphs else None
        while tuner.done < arguments.steps:
            spent = time.perf_counter() - started
            if arguments.seconds and spent >= arguments.seconds:
                break
            if graphs:
                graphs.step()
            else:
                tuner.step(stream)
            if tuner.done in (20, 200) or tuner.done % 2_000 == 0:
                print(arguments.name, tuner.done, f"loss {tuner.loss:.4f}, {spent:.1f} s", flush=True)
    tuner.finish()
    seconds = time.perf_counter() - started
    after = evaluate(supernet, routes, held_out.batches(500))
    tested.append(evaluate(supernet, routes, test.batches(500)) if test else {})
    if arguments.save:
        state = {name: tensor.half().cpu().contiguous() for name, tensor in supernet.state_dict().items()}
        save_file(state, arguments.out / f"{arguments.name}.safetensors")
    return {
        "variant": arguments.variant, "seed": arguments.seed, "seconds": seconds, "steps": tuner.done,
        "settings": asdict(settings), "mixup": arguments.mixup, "pairs": arguments.pair, "torch": torch.__version__,
        "muon": arguments.muon, "cutout": arguments.cutout, "reuse": arguments.reuse, "teacher": taught,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "routes": [
            {
                "route": str(r), "json": r.to_json(), "macs": macs[r], "closed_form": before[r], "tuned": after[r],
                "closed_form_test": tested[0].get(r), "tuned_test": tested[1].get(r),
            }
            for r in sorted(routes, key=macs.__getitem__)
        ],
    }  # fmt: skip


class _InItsType(torch.nn.Module):
    """A teacher that takes images in the type of its weights."""

    def __init__(self, teacher: torch.nn.Module) -> None:
        super().__init__()
        self.teacher, self.type_ = teacher, next(teacher.parameters()).dtype

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.teacher(images.to(self.type_))
        return found


def schedule_by_time(tuner: Tuner, seconds: float) -> None:
    """Learning rates by the share of the time that has passed, or of the steps, whichever is larger."""
    started, warmup = time.perf_counter(), tuner.settings.warmup

    def rate(step: int) -> float:
        return rate_at(max(step / tuner.steps, (time.perf_counter() - started) / seconds), warmup)

    tuner.scheduler.lr_lambdas = [rate] * len(tuner.optimiser.param_groups)


def above_the_line(rows: list[dict[str, Any]], key: str = "tuned", anchors: str = "closed_form") -> list[float]:
    """Points of every stitch above the straight line between the anchors around it, in order of MACs."""
    known = [(row["macs"], row[anchors]) for row in rows if "+" not in row["route"]]
    found = []
    for row in rows:
        if "+" in row["route"]:
            (x0, y0), (x1, y1) = next((a, b) for a, b in itertools.pairwise(known) if a[0] <= row["macs"] <= b[0])
            found.append(row[key] - y0 - (y1 - y0) * (row["macs"] - x0) / (x1 - x0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--anchors", type=Path, required=True, help="folder of deit_micro_<size>.safetensors")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", help="of the files; default: <variant>-<seed>")
    parser.add_argument("--append", type=Path, help="one file of JSON lines for many runs")
    parser.add_argument("--variant", choices=list(VARIANTS), required=True)
    parser.add_argument("--pair", action="append", help="SOURCE:TARGET; default: tiny:small and small:base")
    parser.add_argument("--steps", type=int, default=17_000)
    parser.add_argument("--seconds", type=float, help="of tuning after which the schedule ends")
    parser.add_argument("--graphs", action="store_true", help="steps as CUDA graphs")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--anchor-rate", type=float, default=5e-4)
    parser.add_argument("--stitch-rate", type=float, default=2e-3)
    parser.add_argument("--mixup", type=float, default=0.3, help="share of the images")
    parser.add_argument("--cutout", type=int, default=0, help="side of the square, pixels")
    parser.add_argument("--teacher", type=Path, help="a convolutional one, which teaches together with base")
    parser.add_argument("--muon", type=float, help="peak rate of Muon, for the matrices of anchors' blocks")
    parser.add_argument("--reuse", type=int, default=1, help="steps on one batch, each on another route")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=int, help="of images to fit stitching layers to, and to evaluate on")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--save", action="store_true", help="write the tuned supernet")
    arguments = parser.parse_args()
    arguments.pair = arguments.pair or ["tiny:small", "small:base"]
    arguments.name = arguments.name or f"{arguments.variant}-{arguments.seed}"
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.device == "cpu":
        set_fused_attn(False)
    else:
        torch.backends.cudnn.benchmark = True
    found = tune(arguments)
    if arguments.append:
        with arguments.append.open("a") as file:
            file.write(json.dumps(found) + "\n")
    else:
        (arguments.out / f"{arguments.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    line = above_the_line(found["routes"])
    if arguments.save:
        test = above_the_line(found["routes"], "tuned_test", "tuned_test")
        print("test", [(row["route"], row["tuned_test"]) for row in found["routes"]], [round(x, 2) for x in test])
    tuned = {row["route"]: row["tuned"] for row in found["routes"] if "+" not in row["route"]}
    print(arguments.name, f"{found['seconds']:.0f} s, anchors", tuned, "above the line", [round(x, 2) for x in line])


if __name__ == "__main__":
    main()
