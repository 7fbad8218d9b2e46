"""`klas-zoo export`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klas_zoo.cli.format_options import format_options, options_for
from klas_zoo.cli.options import json_option, registry_option
from klas_zoo.exporters.formats import FORMATS
from klas_zoo.exporters.manifest import PRECISIONS

if TYPE_CHECKING:
    from klas_zoo.exporters.contract import Verdict
    from klas_zoo.exporters.family import Profile, Source
    from klas_zoo.families.specs import FamilySpec


@click.command()
@click.option("--family", required=True, help="A family that was built, by its name or TOML file.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="onnx", show_default=True, help="Of the engines.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of weights and products.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The folder to write; it must not exist, or be empty.")
@click.option("--routes", "names", multiple=True, metavar="ROUTE[,ROUTE…]", help="Only these routes; repeatable. Default: all.")
@click.option("--frontier", is_flag=True, help="Only the routes on the frontier.")
@click.option("--latency", help="Only routes whose measured median is within this budget: 5ms, 200us or 1.5s.")
@click.option("--device", help="The one the family was built for, where there are several; of TensorRT engines the GPUs they are for: a100 or 8.0,8.6.")
@click.option("--data", type=click.Path(path_type=Path), help="Images to verify with, as a build takes them. Default: the family's sample.")
@click.option("--images", "count", type=click.IntRange(min=1), help="Test images to verify with. Default: as many as take a minute.")
@click.option("--random-weights", is_flag=True, help="Weights that nobody trained, for sizes and times.")
@click.option("--profile", is_flag=True, help="Time every engine on this machine; the latencies go into the package.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of onnxruntime. Default: one for each physical core.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of everything that is random.")
@format_options
@registry_option
@json_option
def export(family: str, form: str, precision: str, out: Path, as_json: bool, **options: Any) -> None:
    """Write a family as one package: every route an engine, the weights stored once, all of it verified."""
    from klas_zoo.building.exporting import export_as, images_for
    from klas_zoo.families.specs import find_family

    special = options_for(form, options)
    spec = find_family(family)
    source = _source(spec, options)
    if source.facts.weights == "random":
        click.echo("RANDOM WEIGHTS: nobody trained these networks; accuracies mean nothing.", err=True)
    images, described = images_for(
        spec, source, options["data"], count=options["count"], seed=options["seed"]
    )
    click.echo(f"{len(source.routes)} routes, verified on {described}", err=True)
    verdicts = export_as(
        source, out, special, precision=precision, images=images, threads=options["threads"],
        profile=_profile(source, options) if options["profile"] else None, listener=_tell,
    )  # fmt: skip
    _report(out, precision, verdicts, as_json)


def _source(spec: FamilySpec, options: dict[str, Any]) -> Source:
    from klas_zoo.building.exporting import choose, random_source, tuned_source
    from klas_zoo.registry import default_root
    from klas_zoo.units import parse_latency_ms

    names = [name for text in options["names"] for name in text.split(",")]
    budget_ms = parse_latency_ms(options["latency"]) if options["latency"] is not None else None
    if options["random_weights"]:
        source = random_source(spec, options["seed"], names)
    else:
        source = tuned_source(spec, options["registry"] or default_root(), options["device"])
    return choose(source, names=names, frontier=options["frontier"], budget_ms=budget_ms)


def _profile(source: Source, options: dict[str, Any]) -> Profile:
    from klas_zoo.profiles.devices import resolve_device
    from klas_zoo.profiles.latency import measure

    device, shape = resolve_device("cpu"), source.facts.input_shape
    return lambda engine: (measure(engine, device=device, input_shape=shape, threads=options["threads"]),)


def _tell(stage: str, route: str) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{stage} {route}", nl=False, err=True)


def _report(out: Path, precision: str, verdicts: list[Verdict], as_json: bool) -> None:
    """What became of each route, and where the package is."""
    if sys.stderr.isatty():
        click.echo("\r\033[K", nl=False, err=True)
    for verdict in verdicts:
        if verdict.status == "refused":
            click.echo(f"Left out: {verdict.artifact.route}. {verdict.reason}", err=True)
    if as_json:
        found = [one.to_json() for one in verdicts]
        click.echo(json.dumps({"package": str(out), "precision": precision, "routes": found}, sort_keys=True))
        return
    from klas_zoo.cli.package_tables import verdicts_table
    from klas_zoo.cli.tables import show

    show(verdicts_table(verdicts))
    click.echo(f"Written: {out}")
