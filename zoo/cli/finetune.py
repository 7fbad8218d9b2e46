"""`klas-zoo finetune`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from klas_zoo.cli.options import LocalPath, Number, json_option, seed_option
from klas_zoo.cli.output import say, say_json

if TYPE_CHECKING:
    from klas_zoo.building.finetuning import FinetunedAnchor
    from klas_zoo.processes.signals import Signals
    from klas_zoo.processes.team import Team


@click.command()
@click.option("--family", required=True, help="A TOML file with the number of your classes, or a built-in family.")
@click.option("--data", type=LocalPath(), help="Images of your classes, as a build takes them (docs/data.md). Default: the family's sample.")
@click.option("--weights", type=LocalPath(), help="Folder with a checkpoint for every anchor, of any classes. Default: the family's, or timm's own.")
@click.option("--out", type=LocalPath(file_okay=False), required=True, help="Where <anchor>.safetensors go, for build --weights.")
@click.option("--steps", type=click.IntRange(min=0), help="Optimiser steps of each whole anchor. Default: 0, new heads alone.")
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs, instead of steps.")
@click.option("--batch", type=click.IntRange(min=1), default=64, show_default=True, help="Images per step, over all processes.")
@click.option("--lr", type=Number(min=0), default=2e-4, show_default=True, help="Peak learning rate.")
@click.option("--weight-decay", type=Number(min=0), default=0.05, show_default=True, help="AdamW's, on matrices.")
@click.option("--augmentation", type=click.Choice(["light", "strong"]), default="light", show_default=True, help="Crop and flip, or RandAugment and erasing too.")
@click.option("--ema", type=Number(0, 1, min_open=True, max_open=True), help="Decay of a running average of the weights, which then is written.")
@click.option("--classes", metavar="FILE", help="Names of your classes in the order that the heads number them (docs/data.md).")
@click.option("--skip-damaged", type=click.IntRange(min=0), default=0, show_default=True, metavar="NUMBER", help="Leave out up to so many images that cannot be decoded.")
@click.option("--device", default="cpu", show_default=True, help="What to compute on: cpu or cuda.")
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode images.")
@click.option("--nproc", type=click.IntRange(min=1), default=1, show_default=True, help="Processes on this machine, as torchrun would start them; under torchrun it has no effect.")
@click.option("--checkpoint-every", "checkpoint_s", type=Number(min=0), default=60, show_default=True, help="Seconds between two checkpoints.")
@seed_option("Of everything that is random.")
@json_option
def finetune(family: str, as_json: bool, **options: Any) -> None:
    """Make anchors for your own classes: fit new heads to features, then tune whole networks if asked.

    The same command resumes where an interrupted one stopped.
    """
    from klas_zoo.processes.team import join, leave, limit_threads, under_torchrun

    if options["steps"] is not None and options["epochs"] is not None:
        raise click.UsageError("--steps and --epochs contradict each other: pass one.")
    if options["nproc"] > 1 and not under_torchrun():
        from klas_zoo.processes.launching import launch

        raise SystemExit(launch(sys.argv[1:], processes=options["nproc"], restarts=0))
    from klas_zoo.processes.signals import Signals

    with Signals().installed() as signals:
        team = join(options["device"])
        limit_threads()
        try:
            found = _finetune(family, options, team, signals)
        finally:
            leave(team)
    if not team.is_main:
        return
    if as_json:
        rows = [
            {"anchor": one.anchor, "file": str(one.file), "head_top1": one.head_top1, "top1": one.top1} for one in found
        ]
        say_json(rows)
        return
    for one in found:
        say(f"{one.anchor:12} {one.head_top1:6.2f} % with the new head, {one.top1:6.2f} % tuned: {one.file}")
    say(f"Next: klas-zoo build --family {family} --weights {options['out']}")


def _finetune(family: str, options: dict[str, Any], team: Team, signals: Signals) -> list[FinetunedAnchor]:
    from dataclasses import replace

    from rich.console import Console

    from klas_zoo.building.finetuning import finetune_family
    from klas_zoo.data.classes import read_classes
    from klas_zoo.data.damage import DamageCheck
    from klas_zoo.data.loading import load_data
    from klas_zoo.families.anchors import load_family
    from klas_zoo.families.specs import find_family
    from klas_zoo.progress.console import ConsoleListener
    from klas_zoo.progress.listeners import NullListener
    from klas_zoo.tuning.settings import PRESETS

    listener = ConsoleListener(Console(stderr=True)) if team.is_main else NullListener()
    spec = find_family(family)
    loaded = load_family(spec, weights_folder=options["weights"], seed=options["seed"], new_heads=True)
    data = load_data(
        options["data"], sample=spec.sample, num_classes=loaded.num_classes, data_config=loaded.data_config,
        augmentation=options["augmentation"], seed=options["seed"],
        classes=read_classes(options["classes"]) if options["classes"] else None,
        damage=DamageCheck(
            allowed=options["skip_damaged"], cache=options["out"], processes=options["workers"] or None, team=team,
            say=listener.say, watch=listener.stage,
        ),
    )  # fmt: skip
    for sentence in (*loaded.notes, *data.notes):
        listener.say(sentence)
    steps = None if options["epochs"] else options["steps"] or 0
    settings = replace(
        PRESETS["quick"], steps=steps, epochs=options["epochs"] or 1, batch=options["batch"], anchor_rate=options["lr"],
        weight_decay=options["weight_decay"], augmentation=options["augmentation"], ema=options["ema"],
        seed=options["seed"],
    )  # fmt: skip
    return finetune_family(
        spec, loaded, data, options["out"], settings=settings, device=options["device"], workers=options["workers"],
        checkpoint_s=options["checkpoint_s"], team=team, signals=signals, listener=listener,
    )  # fmt: skip
