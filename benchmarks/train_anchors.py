"""Trains the three anchors of `deit-micro` or `resnet-micro` on CIFAR-10, from scratch, on a CPU.

    python benchmarks/train_anchors.py --data data/cifar10 --family deit-micro --out data/deit-micro
    python benchmarks/train_anchors.py --data data/cifar10 --family resnet-micro --out data/resnet-micro --hints 0

All three learn in one loop from the labels of the same augmented batches. With `--hints` above 0, the
default, the two cheaper networks also learn features: after the stem and every block a linear map of their
own is drawn to those of the next dearer anchor (Romero et al. 2015, "FitNets", arXiv:1412.6550). With
`--stitches` N above 0 every step also draws N stitches (i, i) of each two neighbours, whose stitching layers
learn along, and adds their losses (as the members of a supernet learn: Yu et al. 2019, "Slimmable Neural
Networks", arXiv:1812.08928). The maps and these layers are thrown away; what they leave is a family whose
blocks know each other's features. With both at 0 the three know nothing of each other. `--distillation` adds
the base network's current answers as a teacher (Zhang et al. 2018, "Deep Mutual Learning", arXiv:1706.00384,
in one direction).

Matrices of the blocks are updated by Muon, everything else by AdamW, both on a one-cycle schedule; bf16
autocast. The training images that ship as the sample are left out, so that a build sees them as new. A
checkpoint after every epoch lets an interrupted run go on.

Written: one fp16 safetensors file per anchor, and `training.json` with accuracies on the 10,000 test
images, settings, seed, versions, hardware and date.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import random
import time
from pathlib import Path
from typing import ClassVar

import timm
import torch
import torch.nn.functional as F
from make_sample import choose
from safetensors.torch import save_file
from timm.layers import set_fused_attn
from torchvision.datasets import CIFAR10

import klas_zoo.families.micro  # noqa: F401  registers the anchors with timm
from klas_zoo.architectures import to_chain
from klas_zoo.chains import Chain
from klas_zoo.costs.counting import route_costs
from klas_zoo.families.anchors import Family
from klas_zoo.routes import Route
from klas_zoo.selection.candidates import candidates_of
from klas_zoo.supernet import Supernet
from klas_zoo.tuning.evaluation import evaluate

SHIFT = 3  # pixels
SAMPLE = 4_000  # training images that make_sample.py takes, with its default seed
SIZES = ("tiny", "small", "base")
MEAN = torch.tensor((0.4914, 0.4822, 0.4465)).view(1, 3, 1, 1)
STD = torch.tensor((0.2470, 0.2435, 0.2616)).view(1, 3, 1, 1)


class CIFAR10WithoutSums(CIFAR10):
    """torchvision's reader, without MD5 sums: prepare_cifar10.py cannot reproduce them."""

    train_list: ClassVar = [[name, None] for name, _ in CIFAR10.train_list]
    test_list: ClassVar = [[name, None] for name, _ in CIFAR10.test_list]
    meta: ClassVar = {**CIFAR10.meta, "md5": None}


def load(root: Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,)."""
    split = CIFAR10WithoutSums(root, train=train)
    return torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)


def without_sample(images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves out the training images that ship as the sample, so that a build sees them as new."""
    keep = torch.ones(len(labels), dtype=torch.bool)
    keep[choose(labels.tolist(), SAMPLE, seed=0)] = False
    return images[keep], labels[keep]


def normalise(images: torch.Tensor) -> torch.Tensor:
    return ((images.float() / 255 - MEAN) / STD).contiguous(memory_format=torch.channels_last)


def augment(images: torch.Tensor, generator: torch.Generator, cutout: int) -> torch.Tensor:
    """Random shift over a reflected border, random flip, one square cut out."""
    count, _, size, _ = images.shape
    padded = F.pad(images.float(), (SHIFT,) * 4, mode="reflect")
    shift = torch.randint(0, 2 * SHIFT + 1, (2, count), generator=generator)
    flip = torch.rand(count, generator=generator) < 0.5
    across = torch.arange(size).expand(count, size)
    columns = torch.where(flip[:, None], across.flip(1), across) + shift[0][:, None]
    rows = across + shift[1][:, None]
    cropped = padded[
        torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]
    ].permute(0, 3, 1, 2)
    result = normalise(cropped)
    if cutout:
        centre = torch.randint(0, size, (2, count), generator=generator)
        inside = [(across - c[:, None]).abs() <= cutout // 2 for c in centre]
        result = result.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)
    return result


def split_parameters(model: torch.nn.Module) -> tuple[list, list, list]:
    """Matrices of the blocks; other weights that decay; biases, norms and positions."""
    matrices, weights, rest = [], [], []
    for name, parameter in model.named_parameters():
        if name.startswith("blocks.") and parameter.ndim == 2:
            matrices.append(parameter)
        elif parameter.ndim >= 2 and "pos_embed" not in name:
            weights.append(parameter)
        else:
            rest.append(parameter)
    return matrices, weights, rest


def make_hints(chains: dict[str, Chain]) -> torch.nn.ModuleList:
    """For every anchor but the dearest one linear map per position to the next dearer one's width."""
    return torch.nn.ModuleList(
        torch.nn.ModuleList(torch.nn.Linear(low.width(k), high.width(k)) for k in range(low.depth + 1))
        for low, high in itertools.pairwise(chains.values())
    )


def make_supernet(chains: dict[str, Chain]) -> tuple[Supernet, list[list[Route]]]:
    """The anchors with a stitching layer for every (i, i) between two neighbours; these stitches by pair."""
    cost_of = route_costs(Family.of("anchors", chains, {}))
    by_pair = [
        [c.route for c in candidates_of(chains, pair, lambda route: cost_of(route).macs, buckets=1) if c.i == c.j]
        for pair in itertools.pairwise(chains)
    ]
    return Supernet(chains, itertools.chain.from_iterable(by_pair)), by_pair


def make_optimisers(models, helpers, arguments) -> list[torch.optim.Optimizer]:
    kinds = zip(*map(split_parameters, models), strict=True)
    matrices, weights, rest = ([p for part in parts for p in part] for parts in kinds)
    adam = torch.optim.AdamW(
        [
            {"params": [*weights, *helpers.parameters()], "weight_decay": arguments.weight_decay},
            {"params": rest, "weight_decay": 0.0},
        ],
        lr=arguments.lr, betas=(0.9, 0.99),
    )
    if not matrices:
        return [adam]
    muon = torch.optim.Muon(
        matrices, lr=arguments.lr, weight_decay=arguments.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, adam]


def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Top-1 in per cent, fp32."""
    model.eval()
    with torch.inference_mode():
        hits = sum(
            (model(normalise(x)).argmax(1) == y).sum().item()
            for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return 100 * hits / len(labels)


def losses(supernet: Supernet, hints, routes: list[Route], images, labels, arguments) -> torch.Tensor:
    """Cross-entropy of every anchor and of the drawn stitches, whose first blocks are the anchors' own pass.

    Each pair's stitches count together as much as one anchor. The cheaper anchors also learn from hints, and
    from the dearest one's answer.
    """
    with torch.autocast("cpu", torch.bfloat16):
        walks = {name: list(chain.walk(images)) for name, chain in named_chains(supernet)}
        logits = [supernet.chain(name).head(walk[-1]).float() for name, walk in walks.items()]
        stitched = [finish(supernet, route, walks).float() for route in routes]
    target = F.log_softmax(logits[-1].detach(), 1)
    total = logits[-1].new_zeros(())
    for answer in logits:
        total = total + F.cross_entropy(answer, labels, label_smoothing=arguments.smoothing)
    for answer in stitched:
        share = 1 / arguments.stitches
        total = total + share * F.cross_entropy(answer, labels, label_smoothing=arguments.smoothing)
    for answer in logits[:-1]:
        divergence = F.kl_div(F.log_softmax(answer, 1), target, log_target=True, reduction="batchmean")
        total = total + arguments.distillation * divergence
    if arguments.hints:
        for maps, (low, high) in zip(hints, itertools.pairwise(walks.values()), strict=True):
            left = [unexplained(m(x.float()), y.detach().float()) for m, x, y in zip(maps, low, high, strict=True)]
            total = total + arguments.hints * torch.stack(left).mean()
    return total


def unexplained(guess: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Share of the variance of features (B, N, D) that a guess of them leaves, about 0..1."""
    centred = features - features.mean((0, 1))
    return (guess - features).square().mean() / centred.square().mean()


def named_chains(supernet: Supernet) -> list[tuple[str, Chain]]:
    return [(name.removeprefix("anchor_"), chain) for name, chain in supernet.chains.items()]


def finish(supernet: Supernet, route: Route, walks: dict[str, list[torch.Tensor]]) -> torch.Tensor:
    """Logits of a stitch whose source's features are known."""
    (seam,) = route.seams
    target = supernet.chain(seam.target)
    features = supernet.stitch(seam)(walks[seam.source][seam.i])
    for block in target.blocks[seam.j :]:
        features = block(features)
    return target.head(features)


def stitched_accuracy(supernet: Supernet, by_pair: list[list[Route]], images, labels) -> list[dict]:
    """Top-1 of every stitch with the layers that learned along, per cent."""
    batches = ((normalise(x), y) for x, y in zip(images.split(500), labels.split(500), strict=True))
    found = evaluate(supernet.eval(), supernet.routes, batches) if supernet.routes else {}
    return [{str(route): found[route] for route in pair} for pair in by_pair]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=["deit-micro", "resnet-micro"], default="deit-micro")
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--batch", type=int, default=200)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--distillation", type=float, default=0.0, help="weight of the base network's answers")
    parser.add_argument("--hints", type=float, default=1.0, help="weight of the features' part of the loss")
    parser.add_argument("--stitches", type=int, default=0, help="of each two neighbours, drawn at every step")
    parser.add_argument("--cutout", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use only so many training images")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    set_fused_attn(False)  # the fused kernel's backward pass is slow on CPUs for 16 tokens
    torch.manual_seed(arguments.seed)
    images, labels = without_sample(*load(arguments.data, train=True))
    images, labels = images[: arguments.limit], labels[: arguments.limit]
    test_images, test_labels = load(arguments.data, train=False)
    names = [f"{arguments.family.replace('-', '_')}_{size}" for size in SIZES]
    models = [timm.create_model(name).to(memory_format=torch.channels_last) for name in names]
    chains = {size: to_chain(model, (3, 32, 32)) for size, model in zip(SIZES, models, strict=True)}
    hints = make_hints(chains)
    supernet, by_pair = make_supernet(chains)
    helpers = torch.nn.ModuleList([hints, supernet.stitches])
    optimisers = make_optimisers(models, helpers, arguments)
    steps_per_epoch = len(images) // arguments.batch
    total = steps_per_epoch * arguments.epochs
    warm = max(1, total // 20)

    def rate(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))

    schedulers = [torch.optim.lr_scheduler.LambdaLR(o, rate) for o in optimisers]
    generator = torch.Generator().manual_seed(arguments.seed)
    draw = random.Random(arguments.seed)
    history: list[dict] = []
    checkpoint = arguments.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        for thing, saved in zip((*models, helpers, *optimisers, *schedulers), state["parts"], strict=True):
            thing.load_state_dict(saved)
        generator.set_state(state["generator"])
        draw.setstate((state["draw"][0], tuple(state["draw"][1]), state["draw"][2]))
        history = state["history"]

    for epoch in range(len(history), arguments.epochs):
        started, running = time.perf_counter(), 0.0
        for model in models:
            model.train()
        order = torch.randperm(len(images), generator=generator)
        for chosen in order[: steps_per_epoch * arguments.batch].split(arguments.batch):
            augmented = augment(images[chosen], generator, arguments.cutout)
            routes = [route for pair in by_pair for route in draw.sample(pair, arguments.stitches)]
            loss = losses(supernet, hints, routes, augmented, labels[chosen], arguments)
            loss.backward()
            for optimiser, scheduler in zip(optimisers, schedulers, strict=True):
                optimiser.step()
                optimiser.zero_grad()
                scheduler.step()
            running += loss.item()
        row = {
            "epoch": epoch + 1,
            "loss": running / steps_per_epoch,
            "seconds": time.perf_counter() - started,
            "top1": [accuracy(m, test_images, test_labels) for m in models],
        }
        history.append(row)
        print(json.dumps(row), flush=True)
        state = {
            "parts": [t.state_dict() for t in (*models, helpers, *optimisers, *schedulers)],
            "generator": generator.get_state(),
            "draw": draw.getstate(),
            "history": history,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    report = {}
    for name, model in zip(names, models, strict=True):
        half = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        half = {k: v.contiguous() for k, v in half.items()}
        save_file(half, arguments.out / f"{name}.safetensors")
        # what is shipped is what is measured: fp16 weights, read back as fp32
        model.load_state_dict({k: v.float() if v.is_floating_point() else v for k, v in half.items()})
        report[name] = {"top1_test": accuracy(model, test_images, test_labels)}
        print(name, report[name], flush=True)
    record = {
        "anchors": report,
        "stitches": stitched_accuracy(supernet, by_pair, test_images, test_labels) if arguments.stitches else [],
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("data", "out")},
        "history": history,
        "hours": sum(row["seconds"] for row in history) / 3600,
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
        "hardware": f"{torch.get_num_threads()} threads of {platform.processor() or platform.machine()}",
        "date": datetime.date.today().isoformat(),
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
