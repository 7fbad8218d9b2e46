"""Trains an anchor of `deit-micro` or `convnet-micro` on CIFAR-10 from scratch, and the teacher of all of them.

    python benchmarks/train_anchors.py teacher         --data data/cifar10 --out data/anchors --epochs 40
    python benchmarks/train_anchors.py deit_micro_base --data data/cifar10 --out data/anchors \
        --teacher data/anchors/teacher.safetensors

The teacher is a convolutional network that learns from labels. Anchors are trained one by one and know nothing
of each other: each learns from labels and from the teacher's answers to the same augmented and mixed images
(Hinton et al. 2015, arXiv:1503.02531; Beyer et al. 2022, arXiv:2106.05237). Without `--teacher` they learn from
labels alone. Matrices and full convolutions of the blocks are updated by Muon, everything else by AdamW.

Runs on the CPU or, with `--device cuda`, on a GPU, in bf16 autocast. The training images that ship as the
sample are left out of training and serve as the validation set. `--seconds` ends the schedule after a time
instead of after `--epochs`, whichever comes first. A checkpoint after every epoch lets an interrupted run resume.

Written to `--out`: `<model>.safetensors` in fp16 and `<model>.json` with settings, history and versions; both
after every epoch that ends `--save-every` seconds or more after the last time. `benchmarks/anchor_record.py`
makes `training.json` of them.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from cifar_training import Images, Teacher, augmented, load, make_optimisers, mixed, rate_at
from safetensors.torch import load_file, save_file
from timm.layers import set_fused_attn
from torch import Tensor, nn

import klas_zoo.families.micro  # noqa: F401  registers the anchors with timm

TEACHER = "teacher"


def make_model(name: str, width: int) -> nn.Module:
    return Teacher(width) if name == TEACHER else timm.create_model(name)


def load_teacher(path: Path, device: str) -> nn.Module:
    """The frozen teacher, bf16 on GPUs."""
    model = Teacher.of_state(load_file(path))
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return model.bfloat16() if device == "cuda" else model


def save_half(model: nn.Module, path: Path) -> None:
    """Weights as fp16, whole or not at all."""
    half = {k: v.detach().half().cpu().contiguous() for k, v in model.state_dict().items() if v.is_floating_point()}
    rest = {k: v.cpu() for k, v in model.state_dict().items() if not v.is_floating_point()}
    save_file({**half, **rest}, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Images, device: str) -> float:
    """Top-1 in per cent, in the arithmetic of training."""
    model.eval()
    hits = torch.zeros((), device=device)
    for x, y in images.batches(500):
        with torch.autocast(device, torch.bfloat16):
            hits += (model(x).argmax(1) == y).sum()
    model.train()
    return 100 * float(hits) / len(images)


class Run:
    """One model on its way through its schedule."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, arguments.device
        torch.manual_seed(arguments.seed)
        training, self.validation = load(arguments.data, self.device)
        if arguments.limit:
            training = Images(training.pixels[: arguments.limit], training.labels[: arguments.limit])
        self.training = training.padded()
        self.model = make_model(arguments.model, arguments.width).to(self.device, memory_format=torch.channels_last)
        self.teacher = load_teacher(arguments.teacher, self.device) if arguments.teacher else None
        if arguments.model == TEACHER:
            self.optimisers: list[torch.optim.Optimizer] = [
                torch.optim.SGD(
                    self.model.parameters(), lr=arguments.lr, momentum=0.9, nesterov=True,
                    weight_decay=arguments.weight_decay,
                )
            ]  # fmt: skip
        else:
            self.optimisers = make_optimisers(self.model, arguments.lr, arguments.weight_decay)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["peak"] = arguments.lr
        self.generator = torch.Generator(self.device).manual_seed(arguments.seed)
        self.history: list[dict[str, Any]] = []
        self.seconds, self.saved = 0.0, 0.0
        self.checkpoint = (arguments.checkpoints or arguments.out) / f"{arguments.model}.checkpoint.pt"
        if self.checkpoint.exists():
            self._restore()
        if arguments.compile:
            for part in getattr(self.model, "blocks", [self.model]):
                part.compile(dynamic=False)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy with smoothed, mixed labels, and KL from the teacher at temperature T, times T²."""
        arguments = self.arguments
        targets = F.one_hot(labels, 10).float()
        if arguments.mixup:
            images, targets = mixed(images, targets, arguments.mixup, self.generator)
        with torch.autocast(self.device, torch.bfloat16):
            logits = self.model(images).float()
        plain = F.cross_entropy(logits, targets, label_smoothing=arguments.smoothing)
        if self.teacher is None:
            return plain
        with torch.no_grad(), torch.autocast(self.device, torch.bfloat16):
            taught = self.teacher(images.to(next(self.teacher.parameters()).dtype)).float()
        heat = arguments.temperature
        divergence = F.kl_div(
            F.log_softmax(logits / heat, 1), F.log_softmax(taught / heat, 1), log_target=True, reduction="batchmean"
        )
        return (1 - arguments.distillation) * plain + arguments.distillation * heat**2 * divergence

    def epoch(self) -> bool:
        """One pass over the training images; whether the schedule has come to its end."""
        arguments, started = self.arguments, time.perf_counter()
        order = torch.randperm(len(self.training), generator=self.generator, device=self.device)
        steps = len(order) // arguments.batch
        total, done = torch.zeros((), device=self.device), 0
        for step, chosen in enumerate(order[: steps * arguments.batch].split(arguments.batch)):
            progress = (len(self.history) + step / steps) / arguments.epochs
            if arguments.seconds:
                progress = max(progress, (self.seconds + time.perf_counter() - started) / arguments.seconds)
            if progress >= 1:
                break
            for optimiser in self.optimisers:
                for group in optimiser.param_groups:
                    group["lr"] = group["peak"] * rate_at(progress)
            loss = self.loss(*augmented(self.training, chosen, self.generator, arguments.cutout))
            loss.backward()
            for optimiser in self.optimisers:
                optimiser.step()
                optimiser.zero_grad()
            total += loss.detach()
            done += 1
            if step % 20 == 19:
                total.item()  # keeps the clock honest: the device is never far behind
        mean = float(total) / max(1, done)
        spent = time.perf_counter() - started
        self.seconds += spent
        row = {"epoch": len(self.history) + 1, "loss": mean, "seconds": spent, "steps": done}
        self.history.append(row)
        last = done < steps or len(self.history) >= arguments.epochs
        if last or len(self.history) % arguments.validate == 0:
            row["validation_top1"] = accuracy(self.model, self.validation, self.device)
        print(arguments.model, json.dumps(row), f"{done * arguments.batch / spent:.0f} images/s", flush=True)
        return last

    def save(self, *, last: bool) -> None:
        if not last and time.perf_counter() - self.saved < self.arguments.save_every:
            return
        self.saved = time.perf_counter()
        save_half(self.model, self.arguments.out / f"{self.arguments.model}.safetensors")
        record = {
            "model": self.arguments.model,
            "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.arguments).items()},
            "history": self.history,
            "seconds": self.seconds,
            "versions": {"torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version()},
            "hardware": torch.cuda.get_device_name() if self.device == "cuda"
            else f"{torch.get_num_threads()} threads of {platform.machine()}",
            "date": datetime.date.today().isoformat(),
        }  # fmt: skip
        (self.arguments.out / f"{self.arguments.model}.json").write_text(json.dumps(record, indent=1) + "\n")
        state = {
            "model": self.model.state_dict(),
            "optimisers": [o.state_dict() for o in self.optimisers],
            "generator": self.generator.get_state(),
            "history": self.history,
            "seconds": self.seconds,
        }
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        os.replace(self.checkpoint.with_suffix(".tmp"), self.checkpoint)

    def _restore(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        for optimiser, saved in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(saved)
        self.generator.set_state(state["generator"].cpu())
        self.history, self.seconds = state["history"], state["seconds"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", help=f"`{TEACHER}`, or a timm name such as deit_micro_tiny")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--checkpoints", type=Path, help="folder of checkpoints; default: --out")
    parser.add_argument("--teacher", type=Path, help="weights of a teacher to learn from")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--width", type=int, default=64, help="of the teacher's first layer")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seconds", type=float, help="of training after which the schedule ends")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--lr", type=float, help="peak; default 0.4 for the teacher (SGD), 0.004 for anchors")
    parser.add_argument("--weight-decay", type=float, help="default 0.0005 for the teacher, 0.05 for anchors")
    parser.add_argument("--smoothing", type=float, default=0.0)
    parser.add_argument("--distillation", type=float, default=0.8, help="weight of the teacher's answers")
    parser.add_argument("--temperature", type=float, default=2.0)
    parser.add_argument("--mixup", type=float, default=0.0, help="share of the images")
    parser.add_argument("--cutout", type=int, default=0, help="side of the square, pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="use only so many training images")
    parser.add_argument("--validate", type=int, default=5, help="epochs between two validations")
    parser.add_argument("--save-every", type=float, default=30.0, help="seconds")
    parser.add_argument("--compile", action="store_true", help="blocks by torch.compile")
    arguments = parser.parse_args()
    teacher = arguments.model == TEACHER
    arguments.lr = arguments.lr or (0.4 if teacher else 4e-3)
    arguments.weight_decay = arguments.weight_decay or (5e-4 if teacher else 0.05)
    return arguments


def main() -> None:
    arguments = parse()
    for folder in filter(None, (arguments.out, arguments.checkpoints)):
        folder.mkdir(parents=True, exist_ok=True)
    if arguments.device == "cpu":
        set_fused_attn(False)  # the fused kernel's backward pass is slow on CPUs
    else:
        torch.backends.cudnn.benchmark = True
        torch.backends.cuda.matmul.allow_tf32 = True
    run = Run(arguments)
    finished = len(run.history) >= arguments.epochs
    while not finished:
        finished = run.epoch()
        run.save(last=finished)
    print(arguments.model, "done", run.history[-1], flush=True)


if __name__ == "__main__":
    main()
