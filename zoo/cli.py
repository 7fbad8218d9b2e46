"""The command line: a thin layer over the library.

Results go to stdout, progress to stderr; exit 1 means "cannot be done", 2 "makes no sense".
Heavy modules are imported inside the commands that need them.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klas_zoo.errors import KlasZooError, UsageError

if TYPE_CHECKING:
    from klas_zoo.families import FamilySpec
    from klas_zoo.selection.candidates import SelectionSettings
    from klas_zoo.stages import BuildSettings

# what a full, read-only or forbidden disk answers, wherever in a build it happens
_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM})


class _Commands(click.Group):
    """Shows errors raised on purpose as one sentence; a bug keeps its traceback."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except KlasZooError as error:
            click.echo(f"Error: {error}", err=True)
            context.exit(error.exit_code)
        except OSError as error:
            if error.errno not in _DISK_ERRORS:
                raise
            where = f" {error.filename}" if error.filename else ""
            click.echo(f"Error: Cannot write{where}: {os.strerror(error.errno)}. Nothing was registered.", err=True)
            context.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="klas-zoo")
def main() -> None:
    """Stitched networks for every latency budget."""


def _registry_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--registry",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of the registry. Default: $KLAS_ZOO_REGISTRY, else the user's data folder.",
    )(command)


_SELECTORS_HELP = (
    "What chooses the stitches: klas, klas-latency, kl-only, ce, cka, mse, direct, snnet, random, all, klas-mse, "
    "klas-calibrated or output-kl (docs/selection.md)."
)
_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@main.command()
@click.option("--family", required=True, help="A built-in family (klas-zoo families), or a TOML file of your own.")
@click.option("--device", default="cpu", show_default=True, help="What the engines are made for and timed on.")
@click.option("--data", type=click.Path(path_type=Path), help="Image folder (train/ and val/), or CIFAR-10. Default: the family's sample.")
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
@click.option("--init-images", type=click.IntRange(min=1), help="Images the stitching layers are fitted to.")
@click.option("--probe-epochs", type=click.IntRange(min=1), default=4, show_default=True, help="Epochs of the probes.")
@click.option("--probe-batch", type=click.IntRange(min=2), default=64, show_default=True, help="Images per step of the probes.")
@click.option("--probe-lr", type=click.FloatRange(min=0, min_open=True), default=0.01, show_default=True, help="Learning rate of the probes.")
@click.option("--buckets", type=click.IntRange(min=1), default=20, show_default=True, help="Cost buckets between two anchors.")
@click.option("--tolerance", type=click.FloatRange(min=0), default=0.05, show_default=True, help="τ: keep what is within this share of a bucket's best Γ.")
@click.option("--selector", default="klas", show_default=True, help=_SELECTORS_HELP)
@click.option("--most", type=click.IntRange(min=1), help="Keep the best so many stitches of each bucket, whatever τ says.")
@click.option("--pair", "pairs", multiple=True, metavar="SOURCE:TARGET", help="Stitch these anchors instead of those the selector would; repeatable.")
@click.option("--batch", type=click.IntRange(min=1), default=100, show_default=True, help="Images per forward pass outside tuning.")
@click.option("--latency-batch", "latency_batches", type=click.IntRange(min=1), multiple=True, default=(1,), show_default=True, help="Batch size to time engines at; repeatable.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of onnxruntime. Default: one for each physical core.")
@click.option("--workers", type=click.IntRange(min=0), default=0, show_default=True, help="Processes that decode images.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything that is random.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where report.json and frontier.png go. Default: in the registry.")
@_registry_option
@_json_option
def build(family: str, device: str, registry: Path | None, out: Path | None, as_json: bool, **options: Any) -> None:
    """Probe, select, stitch, tune, export, verify, time and register a family."""
    from klas_zoo.families import find_family
    from klas_zoo.profiles.devices import resolve_device

    spec = find_family(family)
    target = resolve_device(device)
    from klas_zoo.registry import Registry

    place = Registry.open(registry, create=True)

    from rich.console import Console

    from klas_zoo.progress import ConsoleListener

    errors = Console(stderr=True)
    listener = ConsoleListener(errors)
    settings = _settings(spec, options)
    if options["random_weights"]:
        listener.say("RANDOM WEIGHTS: nobody trained these networks; accuracies mean nothing.")
    from klas_zoo import build as building
    from klas_zoo import report
    from klas_zoo.anchors import load_family
    from klas_zoo.data import load_data

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
    result = building.build(loaded, images, settings, device=target, registry=place, listener=listener)
    folder = out or place.root / "reports" / f"{result.build_id:04d}-{spec.name}-{target.name}"
    files = report.write_report(result, folder)
    if as_json:
        click.echo(json.dumps(report.to_json(result), sort_keys=True))
        return
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(report.selection_table(result), report.frontier_table(result), report.summary(result))
    for file in files:
        click.echo(f"Written: {file}")
    click.echo(f"Registered as build {result.build_id} in {place.root}")


def _settings(spec: FamilySpec, options: dict[str, Any]) -> BuildSettings:
    """Flat command-line options to settings; what is not said comes from the preset."""
    from dataclasses import replace

    from klas_zoo.selection.probes import ProbeSettings
    from klas_zoo.stages import BuildSettings
    from klas_zoo.tuning import PRESETS

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
        **{name: options[name] for name in ("augmentation", "init_images", "seed")},
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
        selection=_selection(spec, options),
        tuning=tuning,
        batch=options["batch"],
        latency_batches=tuple(dict.fromkeys(options["latency_batches"])),
        threads=options["threads"],
        workers=options["workers"],
        seed=options["seed"],
    )


def _selection(spec: FamilySpec, options: dict[str, Any]) -> SelectionSettings:
    from klas_zoo.selection.candidates import SelectionSettings
    from klas_zoo.selection.selectors import find_selector

    return SelectionSettings(
        buckets=options["buckets"],
        tolerance=options["tolerance"],
        pairs=_pairs(spec, options["pairs"]),
        selector=find_selector(options["selector"]).name,
        most=options["most"],
        seed=options["seed"],
    )


def _pairs(spec: FamilySpec, texts: tuple[str, ...]) -> tuple[tuple[str, str], ...] | None:
    pairs = []
    for text in texts:
        source, colon, target = text.partition(":")
        if not colon:
            raise UsageError(f"--pair '{text}' is not SOURCE:TARGET, for example tiny:small.")
        pairs.append((spec.anchor(source).name, spec.anchor(target).name))
    return tuple(dict.fromkeys(pairs)) or None


@main.command()
@click.option("--latency", required=True, help="Budget for one batch: 5ms, 200us or 1.5s.")
@click.option("--device", help="Needed where engines of several devices are registered.")
@click.option("--family", help="Needed where families were evaluated on different images.")
@click.option("--percentile", type=click.Choice(["p50", "p90", "p99"]), default="p50", show_default=True, help="Of the measured latency.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size the latency was measured at.")
@click.option("--min-accuracy", type=float, help="Lowest top-1, in per cent.")
@click.option("--max-size", help="Largest file: 50MB, 48MiB or 900kB.")
@click.option("--explain", is_flag=True, help="Show the runner-up on each side and what it would cost.")
@_registry_option
@_json_option
def pick(latency: str, explain: bool, as_json: bool, **limits: Any) -> None:
    """Print the most accurate engine within every limit."""
    from klas_zoo.picking import pick as choose

    chosen = choose(latency, **limits)
    if as_json:
        click.echo(json.dumps(chosen.to_json(), sort_keys=True))
        return
    click.echo(str(chosen.engine.path))
    for line in chosen.explain() if explain else chosen.summary():
        click.echo(line)


@main.command()
@click.option("--family", required=True, help="A built-in family (klas-zoo families), or a TOML file of your own.")
@click.option("--selector", default="klas", show_default=True, help=_SELECTORS_HELP)
@click.option("--pair", "pairs", multiple=True, metavar="SOURCE:TARGET", help="Stitch these anchors instead of those the selector would; repeatable.")
@click.option("--buckets", type=click.IntRange(min=1), default=20, show_default=True, help="Cost buckets between two anchors.")
@click.option("--tolerance", type=click.FloatRange(min=0), default=0.05, show_default=True, help="τ: keep what is within this share of a bucket's best score.")
@click.option("--most", type=click.IntRange(min=1), help="Keep the best so many stitches of each bucket, whatever τ says.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn and of how images are split.")
@click.option("--data", type=click.Path(path_type=Path), help="Images to measure on. Default: the last build's scores, or the family's sample.")
@click.option("--weights", type=click.Path(path_type=Path), help="Folder with a checkpoint for every anchor, to measure with.")
@_registry_option
@_json_option
def routes(family: str, data: Path | None, weights: Path | None, registry: Path | None, as_json: bool, **options: Any) -> None:
    """Show the routes a selector chooses, without building any."""
    from klas_zoo.families import find_family

    spec = find_family(family)
    settings = _selection(spec, options)
    from rich.console import Console

    from klas_zoo.progress import ConsoleListener
    from klas_zoo.registry import default_root
    from klas_zoo.route_list import list_routes, routes_table
    from klas_zoo.tables import show

    listener = ConsoleListener(Console(stderr=True))
    found = list_routes(
        spec, settings, root=registry or default_root(), data=data, weights=weights,
        stage=listener.stage, say=listener.say,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps([one.to_json() for one in found], sort_keys=True))
    else:
        show(routes_table(found, settings))


@main.command("list")
@click.option("--family", help="Only this one.")
@click.option("--device", help="Only this one.")
@click.option("--route", help="Only this one.")
@_registry_option
@_json_option
def list_engines(
    family: str | None, device: str | None, route: str | None, registry: Path | None, as_json: bool
) -> None:
    """Show the registered engines."""
    from klas_zoo.errors import UnknownName
    from klas_zoo.registry import Registry

    place = Registry.open(registry, create=False)
    engines = place.engines()
    for kind, wanted in (("family", family), ("device", device), ("route", route)):
        known = {str(getattr(one, kind)) for one in engines}
        if wanted is not None and wanted not in known:
            raise UnknownName(kind, wanted, known, "Only what is registered can be listed.")
        engines = [one for one in engines if wanted in (None, str(getattr(one, kind)))]
    if as_json:
        click.echo(json.dumps([one.to_json() for one in engines], sort_keys=True))
        return
    if not engines:
        click.echo(f"The registry {place.root} is empty: run klas-zoo build first.")
        return
    from klas_zoo.tables import engines_table, show

    show(engines_table(engines))


@main.command()
@_json_option
def families(as_json: bool) -> None:
    """Show the families that can be built."""
    from klas_zoo.families import builtin_families

    found = builtin_families()
    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "family": spec.name,
                        "description": spec.description,
                        "input_shape": spec.input_shape,
                        "num_classes": spec.num_classes,
                        "anchors": [{"anchor": a.name, "model": a.model} for a in spec.anchors],
                        "preset": spec.preset,
                    }
                    for spec in found.values()
                ],
                sort_keys=True,
            )
        )
        return
    for spec in found.values():
        click.echo(f"{spec.name}: {spec.description}")
        click.echo(f"    {' < '.join(f'{a.name} ({a.model})' for a in spec.anchors)}")
    click.echo("A family of your own is a TOML file: klas-zoo build --family mine.toml")
