"""`klas-zoo profile`: measure, predict, export and import what routes cost on a device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klas_zoo.cli.options import LocalPath, Number, counts, json_option, registry_option, seed_option
from klas_zoo.cli.output import say, say_json
from klas_zoo.errors import UsageError
from klas_zoo.runtimes import RUNTIMES

if TYPE_CHECKING:
    from collections.abc import Callable

    from klas_zoo.profiles.profile import Profile


@click.group(invoke_without_command=True)
@click.option("--family", help="A built-in family, or a TOML file of your own. Its weights are drawn at random: latency does not depend on them.")
@click.option("--device", default="cpu", show_default=True, help="What to measure on: cpu, cuda, or the name of the GPU that is there.")
@click.option("--runtime", type=click.Choice(list(RUNTIMES)), default="onnxruntime", show_default=True, help="What runs the networks.")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "bf16", "int8"]), default="fp32", show_default=True, help="Of weights and activations.")
@click.option("--batch", "batches", callback=counts, default="1", show_default=True, metavar="N[,N...]", help="Batch sizes; a record each.")
@click.option("--threads", type=click.IntRange(min=1), help="Of a CPU runtime. Default: one for each physical core.")
@click.option("--stitches", type=click.IntRange(min=0), default=5, show_default=True, help="Stitches to measure besides the anchors; the rest is interpolated.")
@click.option("--check", "checks", type=click.IntRange(min=0), default=0, show_default=True, help="Further stitches to measure, only to see how far the interpolation is off.")
@click.option("--compile", "compiled", is_flag=True, help="torch.compile.")
@click.option("--cuda-graph", "graph", is_flag=True, help="Capture each network into a CUDA graph and replay it.")
@click.option("--as", "name", help="Name of this kind of machine, to tell it from others: fleet-xeon.")
@click.option("--predict", is_flag=True, help="Predict by a roofline what is not here to be measured.")
@click.option("--count", is_flag=True, help="Measure nothing; show multiply-adds, parameters, memory traffic and peak activations of every block.")
@click.option("--rounds", type=click.IntRange(min=1), default=10, show_default=True, help="Bursts in which each network is timed, in turn with the others.")
@click.option("--min-runs", type=click.IntRange(min=1), default=100, show_default=True, help="Least runs of each network.")
@click.option("--min-ms", type=Number(min=0), default=1000, show_default=True, help="Least milliseconds each network is timed for.")
@click.option("--warmup-ms", type=Number(min=0), default=200, show_default=True, help="Milliseconds each network runs before.")
@seed_option("Of which stitches are checked.")
@registry_option
@json_option
@click.pass_context
def profile(context: click.Context, /, registry: Path | None, as_json: bool, family: str | None, **options: Any) -> None:
    """Measure what a family's routes cost on a device; export and import carry it elsewhere."""
    if context.invoked_subcommand is not None:
        if family is not None or registry is not None:
            raise UsageError(f"Options of klas-zoo profile {context.invoked_subcommand} stand after that word.")
        return
    if family is None:
        raise UsageError("Which family? For example: klas-zoo profile --family deit --device cpu.")
    from klas_zoo.families.specs import find_family
    from klas_zoo.profiles.store import ProfileStore
    from klas_zoo.registry import default_root

    spec = find_family(family)
    if options["count"]:
        _count(spec, as_json)
        return
    root = registry or default_root()
    store = ProfileStore.of(root)
    paths: list[Path] = []

    def keep(one: Profile) -> None:
        paths.extend(store.add([one]))
        _apply(root, [one])

    if options["predict"]:
        found = _predicted(spec, store, options)
        for one in found:
            keep(one)
    else:
        found = _measured(spec, options, keep)
    if as_json:
        from klas_zoo.profiles.files import to_json

        say_json([to_json(one) for one in found])
        return
    from klas_zoo.cli.tables import profile_table
    from klas_zoo.costs.predictions import floor_warning
    from klas_zoo.progress.tables import show

    for one in found:
        show(profile_table(one))
        if warning := floor_warning(one):
            say(warning, err=True)
        for warning in one.warnings:
            say(f"Noisy: {warning}", err=True)
    for path in paths:
        say(f"Written: {path}")


def _count(spec: Any, as_json: bool) -> None:
    from klas_zoo.cli.tables import blocks_table
    from klas_zoo.families.anchors import load_family
    from klas_zoo.profiles.shapes import block_rows, count
    from klas_zoo.progress.tables import show

    family = load_family(spec, random_weights=True)
    rows = block_rows(count(family.chains, family.input_shape))
    if as_json:
        say_json(rows)
        return
    show(blocks_table(rows))


def _measured(spec: Any, options: dict[str, Any], keep: Callable[[Profile], None]) -> list[Profile]:
    """Each profile is kept as soon as it is measured."""
    from klas_zoo.profiles.devices import check_provider, resolve_device

    device = resolve_device(options["device"])
    if options["runtime"] == "onnxruntime":  # the others need nothing of it
        check_provider(device)
    from rich.console import Console

    from klas_zoo.costs.profiling import profile_family
    from klas_zoo.costs.runtimes import ProfileSettings, check_settings
    from klas_zoo.families.anchors import load_family
    from klas_zoo.profiles.timing import Method
    from klas_zoo.progress.console import ConsoleListener

    names = ("runtime", "precision", "batches", "threads", "stitches", "checks", "compiled", "graph", "name", "seed")
    settings = ProfileSettings(
        **{name: options[name] for name in names},
        method=Method(**{name: options[name] for name in ("rounds", "min_runs", "min_ms", "warmup_ms")}),
    )
    check_settings(settings, device.kind)
    chains = load_family(spec, random_weights=True)
    return profile_family(
        chains, device, settings, listener=ConsoleListener(Console(stderr=True)), on_profile=keep
    )


def _predicted(spec: Any, store: Any, options: dict[str, Any]) -> list[Profile]:
    from klas_zoo.costs.predictions import predict_profiles
    from klas_zoo.families.anchors import load_family
    from klas_zoo.profiles.catalog import find_spec, unknown
    from klas_zoo.profiles.devices import device_name

    device = device_name(options["device"])
    found = find_spec(device)
    if found is None:
        raise unknown(device)
    runtime = "torch-compiled" if options["compiled"] and options["runtime"] == "torch" else options["runtime"]
    return predict_profiles(
        load_family(spec, random_weights=True), found, runtime=runtime, precision=options["precision"],
        batches=options["batches"], store=store,
    )  # fmt: skip


@profile.command("export")
@click.argument("file", type=LocalPath(dir_okay=False))
@click.option("--family", help="Only of this family.")
@click.option("--device", help="Only of this device.")
@click.option("--as", "name", help="Call the device so in the file.")
@click.option("--all", "every", is_flag=True, help="Older measurements of the same things and predictions too.")
@registry_option
def export_profiles(file: Path, registry: Path | None, **options: Any) -> None:
    """Write measured profiles into one FILE, to be imported elsewhere."""
    from klas_zoo.costs.exchange import export_file
    from klas_zoo.registry import default_root

    found = export_file(registry or default_root(), file, **options)
    say(f"Written: {file}, {len(found)} profile{'s' if len(found) > 1 else ''}: {', '.join(map(str, found))}")


@profile.command("import")
@click.argument("file", type=LocalPath(dir_okay=False))
@click.option("--family", help="Where the profile is of a family of your own: its TOML file.")
@click.option("--as", "name", help="Call the device so here, as a CPU that is not this machine's has to be.")
@registry_option
def import_profiles(file: Path, registry: Path | None, **options: Any) -> None:
    """Check a FILE from another machine and use its profiles from now on."""
    from klas_zoo.costs.exchange import import_file
    from klas_zoo.registry import default_root

    found = import_file(registry or default_root(), file, **options)
    _apply(registry or default_root(), [one for one, _ in found])
    for one, path in found:
        say(f"{one}: {path}")


def _apply(root: Path, profiles: list[Profile]) -> None:
    """Stores the latencies of registered engines that are in new profiles, where there is a registry."""
    from klas_zoo.registry import Registry
    from klas_zoo.registry.database import is_there
    from klas_zoo.registry.latencies import apply_profiles

    registry = Registry(root)
    if is_there(registry.database_path):
        for family, device in sorted({(one.family, one.device) for one in profiles}):
            apply_profiles(registry, family, device)
