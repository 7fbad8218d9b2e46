"""`klas-zoo build`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from klas_zoo.cli.options import (
    BUILT_RUNTIMES,
    LocalPath,
    NameList,
    Number,
    former_name,
    json_option,
    opset_option,
    registry_option,
    seed_option,
    selection_settings,
    selector_options,
    wide_option,
)
from klas_zoo.cli.output import say, say_json
from klas_zoo.errors import UsageError
from klas_zoo.exporters.manifest import PRECISIONS

if TYPE_CHECKING:
    from klas_zoo.building.job import BuildResult
    from klas_zoo.building.pipeline import StageRecord
    from klas_zoo.building.settings import BuildSettings
    from klas_zoo.data.loading import Data
    from klas_zoo.families.anchors import Family
    from klas_zoo.families.specs import FamilySpec
    from klas_zoo.processes.signals import Signals
    from klas_zoo.processes.team import Team
    from klas_zoo.profiles.devices import Device
    from klas_zoo.progress.listeners import Listener
    from klas_zoo.registry import Registry


_OF_TUNING = (
    "weights", "random_weights", "preset", "tune_steps", "tune_epochs", "tune_batch", "anchor_lr", "stitch_lr",
    "weight_decay", "warmup", "distillation", "hard", "clip", "augmentation", "tune_precision", "accumulate", "reuse",
    "ema", "tune_routes", "compile", "memory_format", "init_images", "probe_epochs", "probe_batch", "probe_lr", "buckets",
    "tolerance", "selector", "direction", "most", "pairs",
)  # fmt: skip


@click.command()
@click.option("--family", required=True, help="A built-in family (klas-zoo families), or a TOML file of your own.")
@click.option("--device", default="cpu", show_default=True, help="What the engines are made for and timed on.")
@click.option("--compute", type=click.Choice(["cpu", "cuda"]), help="Where networks are probed, tuned and evaluated. Default: on the device, or on the GPU that is here when the device is elsewhere.")
@click.option("--data", type=LocalPath(), help="Image folder (train/ and val/), CIFAR-10, shards, Parquet files or hf:owner/name (docs/builds.md). Default: the family's sample.")
@click.option("--weights", type=LocalPath(), help="Folder with a checkpoint for every anchor.")
@click.option("--random-weights", is_flag=True, help="Build without weights; accuracies mean nothing.")
@click.option("--fit-heads", is_flag=True, help="Fit a new head, linear on features, to anchors whose weights are for other classes.")
@click.option("--classes", metavar="FILE", help="Names of the classes in the order of the checkpoints: a text file with one a line, a JSON list, or imagenet-1k. Default: natural order of the folders' names (docs/data.md).")
@click.option("--skip-damaged", type=click.IntRange(min=0), default=0, show_default=True, metavar="NUMBER", help="Leave out up to so many images that cannot be decoded; with more of them nothing is built.")
@click.option("--force", is_flag=True, help="Build although an anchor is no better than chance on the test images.")
@click.option("--preset", type=click.Choice(["quick", "paper"]), help="Settings of tuning. Default: the family's.")
@click.option("--tune-steps", type=click.IntRange(min=0), help="Optimiser steps; 0 keeps the closed-form stitching layers.")
@click.option("--tune-epochs", type=click.IntRange(min=1), help="Epochs, instead of steps.")
@click.option("--tune-batch", type=click.IntRange(min=1), help="Images per step.")
@click.option("--anchor-lr", type=Number(min=0), help="Peak learning rate of the anchors.")
@click.option("--stitch-lr", type=Number(min=0), help="Peak learning rate of the stitching layers.")
@click.option("--weight-decay", type=Number(min=0), help="AdamW's, on matrices.")
@click.option("--warmup", type=Number(0, 1), help="Share of the steps in which the rates rise.")
@click.option("--distillation", type=Number(0, 1), help="Weight of the largest anchor's answers in the loss.")
@click.option("--hard/--soft", default=None, help="Distil the teacher's class, or its distribution.")
@click.option("--clip", type=Number(min=0), help="Largest norm of the gradient; 0 does not clip.")
@click.option("--augmentation", type=click.Choice(["light", "strong"]), help="Crop and flip, or RandAugment and erasing too.")
@click.option("--tune-precision", type=click.Choice(["auto", "fp32", "bf16"]), help="Of products while tuning; weights stay fp32.")
@click.option("--accumulate", type=click.IntRange(min=1), help="Parts a batch is cut into, one after the other, to save memory.")
@click.option("--reuse", type=click.IntRange(min=1), help="Steps, each on another route, that learn from one batch; the teacher answers it once.")
@click.option("--ema", type=Number(0, 1, min_open=True, max_open=True), help="Decay of a running average of the weights, which then is what is exported.")
@click.option("--tune-routes", type=click.Choice(["same", "each"]), help="Of several processes: the same route in a step, or each another.")
@click.option("--compile/--no-compile", default=None, help="torch.compile, block by block, while tuning.")
@click.option("--memory-format", type=click.Choice(["auto", "contiguous", "channels-last"]), help="Of weights and maps while tuning.")
@click.option("--init-images", type=click.IntRange(min=1), help="Images the stitching layers are fitted to.")
@click.option("--probe-epochs", type=click.IntRange(min=1), default=4, show_default=True, help="Epochs of the probes.")
@click.option("--probe-batch", type=click.IntRange(min=2), default=64, show_default=True, help="Images per step of the probes.")
@click.option("--probe-lr", type=Number(min=0, min_open=True), default=0.01, show_default=True, help="Learning rate of the probes.")
@click.option("--buckets", type=click.IntRange(min=1), help="Cost buckets between two anchors. Default: the family's, else 20.")
@click.option("--tolerance", type=Number(min=0), default=0.05, show_default=True, help="τ: keep what is within this share of a bucket's best Γ.")
@selector_options
@click.option("--per-bucket", "most", type=click.IntRange(min=1), help="Keep the N best stitches per bucket, ignoring τ.", metavar="N")
@former_name("--most", "most", type=click.IntRange(min=1))
@click.option("--pair", "pairs", multiple=True, metavar="SOURCE:TARGET", help="Stitch these anchors instead of those the selector would; repeatable.")
@click.option("--batch", type=click.IntRange(min=1), default=100, show_default=True, help="Images per forward pass outside tuning.")
@click.option("--latency-batch", "latency_batches", type=click.IntRange(min=1), multiple=True, default=(1,), show_default=True, help="Batch size to time engines at; repeatable.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of the runtime. Default: one for each physical core.")
@click.option("--precision", "precisions", type=NameList(PRECISIONS), help="Of the engines, for example fp32,int8. Default: what pays on the device: fp32 and int8 on a CPU, fp32 and fp16 elsewhere.")
@click.option("--runtime", "runtimes", type=NameList(BUILT_RUNTIMES), help="That the engines are made for and timed in, for example onnxruntime,openvino. Default: onnxruntime.")
@opset_option("18 for CPUs, 23 for NVIDIA's GPUs")
@click.option("--cascades/--no-cascades", default=True, show_default=True, help="Fit cascades of the engines on held-out images, time and register them.")
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode images.")
@seed_option("Of everything that is random.")
@click.option("--out", type=LocalPath(file_okay=False), help="Where report.html, report.json and frontier.png go. Default: in the registry.")
@click.option("--dry-run", is_flag=True, help="Only show which stages would be done, and which are cached.")
@click.option("--redo", metavar="STAGE", help="Delete the cached results of this stage and of those after it.")
@click.option("--checkpoint-every", "checkpoint_s", type=Number(min=0), default=60, show_default=True, help="Seconds between two checkpoints of tuning; more where writing them takes long.")
@click.option("--nproc", type=click.IntRange(min=1), default=1, show_default=True, help="Processes on this machine that probe, tune and evaluate together, as torchrun would start them; under torchrun it has no effect.")
@click.option("--max-restarts", type=click.IntRange(min=0), default=0, show_default=True, help="With --nproc: how often to resume from the last checkpoint when a process dies.")
@click.option("--log-json", metavar="FILE", help="Append what happens to a file, one JSON object a line; - is stderr.")
@click.option("--tensorboard", type=LocalPath(file_okay=False), help="Write scalars of tuning for TensorBoard to this folder.")
@wide_option
@registry_option
@json_option
def build(family: str, device: str, registry: Path | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Probe, select, stitch, tune, export, verify, time and register a family.

    A build that was interrupted resumes where it stopped when the same command runs again.
    """
    from klas_zoo.costs.targets import target_device
    from klas_zoo.families.specs import find_family
    from klas_zoo.profiles.store import ProfileStore
    from klas_zoo.registry import default_root

    spec = find_family(family)
    store = ProfileStore.of(registry or default_root())
    settings = build_settings(spec, options)
    if spec.supernet is not None and not asks_to_tune(click.get_current_context()):
        settings = replace(settings, shipped=True)
    from klas_zoo.processes.team import join, leave, limit_threads, under_torchrun
    from klas_zoo.profiles.devices import check_provider

    if not under_torchrun() and not options["dry_run"]:
        check_provider(target_device(device, store, options["compute"]))  # reported once, not by every process
    if options["nproc"] > 1 and not under_torchrun() and not options["dry_run"]:
        from klas_zoo.processes.launching import launch

        raise SystemExit(launch(sys.argv[1:], processes=options["nproc"], restarts=options["max_restarts"]))
    from klas_zoo.processes.signals import Signals

    with Signals().installed() as signals:
        target = target_device(device, store, options["compute"])
        team = join(target.torch_device)
        limit_threads()
        if target.note and team.is_main:
            say(target.note, err=True)
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
    from klas_zoo.registry import Registry

    place = Registry.open(registry, create=True)
    listener = _listener(options, team)
    if spec.dominated:
        listener.say(f"Note: {spec.dominated}; a plain network may serve better (benchmarks/README.md).")
    loaded, images, rest = prepared(
        spec, settings, target, place=place, listener=listener, options=options, team=team
    )
    if options["dry_run"]:
        _show_plan(building.plan(loaded, images, settings, **rest), as_json)
        return
    result = building.build(loaded, images, settings, team=team, signals=signals, **rest)
    if result is None:
        return  # the first process has it
    files = report.write_report(result, out or report_folder(result, place, spec, target), place)
    if as_json:
        say_json(report.to_json(result))
        return
    from klas_zoo.progress.tables import show

    show(
        report.selection_table(result), report.frontier_table(result, options["wide"]), report.summary(result),
        report.times(result),
    )  # fmt: skip
    for file in files:
        say(f"Written: {file}")
    say(f"Registered as build {result.build_id} in {place.root}")


def prepared(
    spec: FamilySpec,
    settings: BuildSettings,
    target: Device,
    *,
    place: Registry,
    listener: Listener,
    options: dict[str, Any],
    team: Team | None = None,
    own: Family | None = None,
) -> tuple[Family, Data, dict[str, Any]]:
    """Anchors, images, and what else `klas_zoo.building.job.build` and `plan` are called with.

    Args:
        own: a family of chains that are there already.
    """
    from klas_zoo.building.context import default_precisions, default_runtimes
    from klas_zoo.building.inputs import InputOptions, load_inputs
    from klas_zoo.costs.predictions import predicted_costs
    from klas_zoo.processes.team import ALONE
    from klas_zoo.profiles.store import ProfileStore

    team = team or ALONE
    inputs = InputOptions(**{name: options[name] for name in InputOptions.__dataclass_fields__})
    loaded, images = load_inputs(
        spec, settings, inputs, cache=place.root / "checks", device=target.torch_device, listener=listener, team=team,
        family=own, dry_run=options["dry_run"],
    )  # fmt: skip
    runtimes = settings.runtimes or default_runtimes(target)
    precisions = settings.precisions or default_precisions(target)
    costs = predicted_costs(
        loaded, target, batches=settings.latency_batches, store=ProfileStore.of(place.root),
        also=[(runtime, precision) for runtime in runtimes for precision in precisions],
        keep=team.is_main and not options["dry_run"],
    )  # fmt: skip
    if costs:
        listener.say(costs.describe())
    return loaded, images, {
        "device": target, "registry": place, "listener": listener, "costs": costs, "redo": options["redo"]
    }  # fmt: skip


def report_folder(result: BuildResult, place: Registry, spec: FamilySpec, target: Device) -> Path:
    """Where a report goes unless the user names a folder."""
    return place.root / "reports" / f"{result.build_id:04d}-{spec.name}-{target.name}"


def _listener(options: dict[str, Any], team: Team) -> Listener:
    from klas_zoo.progress.listeners import JsonLog, MultiListener, NullListener, TensorBoard

    if not team.is_main:
        return NullListener()
    from rich.console import Console

    from klas_zoo.progress.console import ConsoleListener

    listeners: list[Listener] = []
    if options["log_json"] != "-":  # lines for machines and for people do not mix
        listeners.append(ConsoleListener(Console(stderr=True)))
    if options["log_json"]:
        listeners.append(JsonLog.to(options["log_json"]))
    if options["tensorboard"]:
        listeners.append(TensorBoard(options["tensorboard"]))
    return MultiListener(*listeners)


def asks_to_tune(context: click.Context) -> bool:
    """Whether any option was passed that concerns which stitches there are, or how they are tuned."""
    return any(context.get_parameter_source(name) is ParameterSource.COMMANDLINE for name in _OF_TUNING)


def build_settings(spec: FamilySpec, options: dict[str, Any]) -> BuildSettings:
    """Flat command-line options to settings; what is not said comes from the preset."""
    from klas_zoo.building.settings import BuildSettings
    from klas_zoo.selection.probes import ProbeSettings
    from klas_zoo.tuning.settings import PRESETS

    if options["random_weights"] and options["weights"] is not None:
        raise UsageError("--random-weights and --weights contradict each other: pass one.")
    if options["random_weights"] and options["fit_heads"]:
        raise UsageError("--random-weights and --fit-heads contradict each other: pass one.")
    if options["tune_steps"] is not None and options["tune_epochs"] is not None:
        raise UsageError("--tune-steps and --tune-epochs contradict each other: pass one.")
    said = {
        "steps": options["tune_steps"],
        "epochs": options["tune_epochs"],
        "batch": options["tune_batch"],
        "anchor_rate": options["anchor_lr"],
        "stitch_rate": options["stitch_lr"],
        "precision": options["tune_precision"],
        **{name: options[name] for name in ("weight_decay", "warmup", "distillation", "hard", "clip")},
        **{name: options[name] for name in ("augmentation", "init_images", "seed", "accumulate", "reuse", "ema", "compile")},
        "routes": options["tune_routes"],
        "memory_format": options["memory_format"],
    }
    preset = options["preset"] or spec.preset
    if preset == "quick" and said["epochs"] is None and said["steps"] is None:
        said["steps"] = spec.quick_steps
    tuning = replace(PRESETS[preset], **{name: value for name, value in said.items() if value is not None})
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
        precisions=options["precisions"],
        runtimes=options["runtimes"],
        opset=options["opset"],
        cascades=options["cascades"],
    )


def _show_plan(stages: list[StageRecord], as_json: bool) -> None:
    if as_json:
        shown = [{"stage": one.name, "status": one.status, "key": one.key, "seconds": one.seconds} for one in stages]
        say_json(shown)
        return
    for one in stages:
        took = f"took {one.seconds:.1f} s on {one.facts['finished_at']}" if one.status == "cached" else ""
        say(f"{one.name:18} {one.status:8} {took or one.key or 'depends on a stage that is still to do'}")
