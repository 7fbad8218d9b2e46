"""`klas-zoo build`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klas_zoo.cli.options import json_option, registry_option, selection_settings, selector_options
from klas_zoo.errors import UsageError

if TYPE_CHECKING:
    from klas_zoo.building.pipeline import StageRecord
    from klas_zoo.building.settings import BuildSettings
    from klas_zoo.families.specs import FamilySpec
    from klas_zoo.processes.signals import Signals
    from klas_zoo.processes.team import Team
    from klas_zoo.profiles.devices import Device
    from klas_zoo.progress.listeners import Listener


@click.command()
@click.option("--family", required=True, help="A built-in family (klas-zoo families), or a TOML file of your own.")
@click.option("--device", default="cpu", show_default=True, help="What the engines are made for and timed on.")
@click.option("--data", type=click.Path(path_type=Path), help="Image folder (train/ and val/), CIFAR-10, shards, Parquet files or hf:owner/name (docs/builds.md). Default: the family's sample.")
@click.option("--weights", type=click.Path(path_type=Path), help="Folder with a checkpoint for every anchor.")
@click.option("--random-weights", is_flag=True, help="Go without weights; accuracies mean nothing.")
@click.option("--preset", type=click.Choice(["quick", "paper"]), help="Settings of tuning. Default: the family's.")
@click.option("--tune-steps", type=click.IntRange(min=0), help="Optimiser steps; 0 keeps the closed-form stitching layers.")
@click.option("--tune-epochs", type=click.IntRange(min=1), help="Epochs, instead of steps.")
@click.option("--tune-batch", type=click.IntRange(min=1), help="Images per step.")
@click.option("--anchor-lr", type=click.FloatRange(min=0), help="Peak learning rate of the anchors.")
@click.option("--stitch-lr", type=click.FloatRange(min=0), help="Peak learning rate of the stitching layers.")
@click.option("--weight-decay", type=click.FloatRange(min=0), help="AdamW's, on matrices.")
@click.option("--warmup", type=click.FloatRange(0, 1), help="Share of the steps in which the rates rise.")
@click.option("--distillation", type=click.FloatRange(0, 1), help="Weight of the largest anchor's answers in the loss.")
@click.option("--hard/--soft", default=None, help="Distil the teacher's class, or its distribution.")
@click.option("--clip", type=click.FloatRange(min=0), help="Largest norm of the gradient; 0 does not clip.")
@click.option("--augmentation", type=click.Choice(["light", "strong"]), help="Crop and flip, or RandAugment and erasing too.")
@click.option("--tune-precision", type=click.Choice(["auto", "fp32", "bf16"]), help="Of products while tuning; weights stay fp32.")
@click.option("--accumulate", type=click.IntRange(min=1), help="Parts a batch is cut into, one after the other, to save memory.")
@click.option("--ema", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Decay of a running average of the weights, which then is what is exported.")
@click.option("--tune-routes", type=click.Choice(["same", "each"]), help="Of several processes: the same route in a step, or each another.")
@click.option("--compile/--no-compile", default=None, help="torch.compile, block by block, while tuning.")
@click.option("--memory-format", type=click.Choice(["auto", "contiguous", "channels-last"]), help="Of weights and maps while tuning.")
@click.option("--init-images", type=click.IntRange(min=1), help="Images the stitching layers are fitted to.")
@click.option("--probe-epochs", type=click.IntRange(min=1), default=4, show_default=True, help="Epochs of the probes.")
@click.option("--probe-batch", type=click.IntRange(min=2), default=64, show_default=True, help="Images per step of the probes.")
@click.option("--probe-lr", type=click.FloatRange(min=0, min_open=True), default=0.01, show_default=True, help="Learning rate of the probes.")
@click.option("--buckets", type=click.IntRange(min=1), default=20, show_default=True, help="Cost buckets between two anchors.")
@click.option("--tolerance", type=click.FloatRange(min=0), default=0.05, show_default=True, help="τ: keep what is within this share of a bucket's best Γ.")
@selector_options
@click.option("--most", type=click.IntRange(min=1), help="Keep the best so many stitches of each bucket, whatever τ says.")
@click.option("--pair", "pairs", multiple=True, metavar="SOURCE:TARGET", help="Stitch these anchors instead of those the selector would; repeatable.")
@click.option("--batch", type=click.IntRange(min=1), default=100, show_default=True, help="Images per forward pass outside tuning.")
@click.option("--latency-batch", "latency_batches", type=click.IntRange(min=1), multiple=True, default=(1,), show_default=True, help="Batch size to time engines at; repeatable.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of onnxruntime. Default: one for each physical core.")
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode images.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything that is random.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where report.json and frontier.png go. Default: in the registry.")
@click.option("--dry-run", is_flag=True, help="Only show which stages would be done, and which are kept from before.")
@click.option("--redo", metavar="STAGE", help="Throw away what was kept of this stage and of those after it.")
@click.option("--checkpoint-every", "checkpoint_s", type=click.FloatRange(min=0), default=60, show_default=True, help="Seconds between two checkpoints of tuning; more where writing them takes long.")
@click.option("--nproc", type=click.IntRange(min=1), default=1, show_default=True, help="Processes on this machine that probe, tune and evaluate together, as torchrun would start them; under torchrun it has no effect.")
@click.option("--max-restarts", type=click.IntRange(min=0), default=0, show_default=True, help="With --nproc: how often to go on from the last checkpoint when a process dies.")
@click.option("--log-json", metavar="FILE", help="Append what happens to a file, one JSON object a line; - is stderr.")
@click.option("--tensorboard", type=click.Path(path_type=Path, file_okay=False), help="Write scalars of tuning for TensorBoard to this folder.")
@registry_option
@json_option
def build(family: str, device: str, registry: Path | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Probe, select, stitch, tune, export, verify, time and register a family.

    A build that was interrupted, by whatever, goes on where it stopped when it is run again.
    """
    from klas_zoo.costs.targets import target_device
    from klas_zoo.families.specs import find_family
    from klas_zoo.profiles.store import ProfileStore
    from klas_zoo.registry import default_root

    spec = find_family(family)
    store = ProfileStore.of(registry or default_root())
    settings = build_settings(spec, options)
    from klas_zoo.processes.team import join, leave, under_torchrun

    if options["nproc"] > 1 and not under_torchrun() and not options["dry_run"]:
        from klas_zoo.processes.launching import launch

        target_device(device, store)  # what cannot work is said once
        raise SystemExit(launch(sys.argv[1:], processes=options["nproc"], restarts=options["max_restarts"]))
    from klas_zoo.processes.signals import Signals

    with Signals().installed() as signals:
        target = target_device(device, store)
        team = join(target.torch_device)
        try:
            _build(spec, settings, target, team, signals, registry, out, as_json, options)
        finally:
            leave(team)


def _build(
    spec: FamilySpec, settings: BuildSettings, target: Device, team: Team, signals: Signals,
    registry: Path | None, out: Path | None, as_json: bool, options: dict[str, Any],
) -> None:  # fmt: skip
    from klas_zoo.building import job as building
    from klas_zoo.building import report
    from klas_zoo.costs.predicting import predicted_costs
    from klas_zoo.data.loading import load_data
    from klas_zoo.families.anchors import load_family
    from klas_zoo.profiles.store import ProfileStore
    from klas_zoo.registry import Registry

    place = Registry.open(registry, create=True)
    listener = _listener(options, team)
    if options["random_weights"]:
        listener.say("RANDOM WEIGHTS: nobody trained these networks; accuracies mean nothing.")
    loaded = load_family(
        spec, weights_folder=options["weights"], random_weights=options["random_weights"], seed=options["seed"]
    )
    images = load_data(
        options["data"],
        sample=spec.sample,
        num_classes=loaded.num_classes,
        data_config=loaded.data_config,
        augmentation=settings.tuning.augmentation,
        seed=options["seed"],
    )
    costs = predicted_costs(
        loaded, target, batches=settings.latency_batches, store=ProfileStore.of(place.root),
        keep=team.leads and not options["dry_run"],
    )  # fmt: skip
    if costs:
        listener.say(costs.describe())
    told: dict[str, Any] = {
        "device": target, "registry": place, "listener": listener, "costs": costs, "redo": options["redo"]
    }  # fmt: skip
    if options["dry_run"]:
        _show_plan(building.plan(loaded, images, settings, **told), as_json)
        return
    result = building.build(loaded, images, settings, team=team, signals=signals, **told)
    if result is None:
        return  # the first process has it
    folder = out or place.root / "reports" / f"{result.build_id:04d}-{spec.name}-{target.name}"
    files = report.write_report(result, folder)
    if as_json:
        click.echo(json.dumps(report.to_json(result), sort_keys=True))
        return
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(
        report.selection_table(result), report.frontier_table(result), report.summary(result), report.times(result)
    )
    for file in files:
        click.echo(f"Written: {file}")
    click.echo(f"Registered as build {result.build_id} in {place.root}")


def _listener(options: dict[str, Any], team: Team) -> Listener:
    from klas_zoo.progress.listeners import JsonLog, Nobody, Several, TensorBoard

    if not team.leads:
        return Nobody()
    from rich.console import Console

    from klas_zoo.progress.console import ConsoleListener

    listeners: list[Listener] = []
    if options["log_json"] != "-":  # lines for machines and for people do not mix
        listeners.append(ConsoleListener(Console(stderr=True)))
    if options["log_json"]:
        listeners.append(JsonLog.to(options["log_json"]))
    if options["tensorboard"]:
        listeners.append(TensorBoard(options["tensorboard"]))
    return Several(*listeners)


def build_settings(spec: FamilySpec, options: dict[str, Any]) -> BuildSettings:
    """Flat command-line options to settings; what is not said comes from the preset."""
    from dataclasses import replace

    from klas_zoo.building.settings import BuildSettings
    from klas_zoo.selection.probes import ProbeSettings
    from klas_zoo.tuning.settings import PRESETS

    if options["random_weights"] and options["weights"] is not None:
        raise UsageError("--random-weights and --weights contradict each other: say one.")
    if options["tune_steps"] is not None and options["tune_epochs"] is not None:
        raise UsageError("--tune-steps and --tune-epochs contradict each other: say one.")
    said = {
        "steps": options["tune_steps"],
        "epochs": options["tune_epochs"],
        "batch": options["tune_batch"],
        "anchor_rate": options["anchor_lr"],
        "stitch_rate": options["stitch_lr"],
        "precision": options["tune_precision"],
        **{name: options[name] for name in ("weight_decay", "warmup", "distillation", "hard", "clip")},
        **{name: options[name] for name in ("augmentation", "init_images", "seed", "accumulate", "ema", "compile")},
        "routes": options["tune_routes"],
        "memory_format": options["memory_format"],
    }
    tuning = replace(
        PRESETS[options["preset"] or spec.preset], **{name: value for name, value in said.items() if value is not None}
    )
    if options["tune_epochs"] is not None:
        tuning = replace(tuning, steps=None)
    if options["clip"] == 0:
        tuning = replace(tuning, clip=None)
    return BuildSettings(
        probes=ProbeSettings(
            epochs=options["probe_epochs"], batch=options["probe_batch"], learning_rate=options["probe_lr"]
        ),
        selection=selection_settings(spec, options),
        tuning=tuning,
        batch=options["batch"],
        latency_batches=tuple(dict.fromkeys(options["latency_batches"])),
        threads=options["threads"],
        workers=options["workers"],
        seed=options["seed"],
        checkpoint_s=options["checkpoint_s"],
    )


def _show_plan(stages: list[StageRecord], as_json: bool) -> None:
    if as_json:
        shown = [{"stage": one.name, "status": one.status, "key": one.key, "seconds": one.seconds} for one in stages]
        click.echo(json.dumps(shown))
        return
    for one in stages:
        took = f"took {one.seconds:.1f} s on {one.facts['finished_at']}" if one.status == "kept" else ""
        click.echo(f"{one.name:18} {one.status:8} {took or one.key or 'depends on a stage that is still to do'}")
