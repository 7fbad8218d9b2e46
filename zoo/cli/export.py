"""`klas-zoo export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klas_zoo.cli.format_options import format_options, options_for
from klas_zoo.cli.options import LocalPath, json_option, opset_option, registry_option, seed_option
from klas_zoo.cli.output import say, say_json, say_progress
from klas_zoo.exporters.formats import FORMATS
from klas_zoo.exporters.manifest import PRECISIONS

if TYPE_CHECKING:
    from klas_zoo.exporters.contract import Verdict
    from klas_zoo.exporters.family import PackageSource, Profile
    from klas_zoo.families.specs import FamilySpec


@click.command()
@click.option("--family", required=True, help="A family that was built, by its name or TOML file.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="onnx", show_default=True, help="Of the engines.")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", show_default=True, help="Of weights and products.")
@click.option("--out", type=LocalPath(), required=True, help="The folder to write; it must not exist, or be empty.")
@click.option("--routes", "names", multiple=True, metavar="ROUTE[,ROUTE…]", help="Only these routes; repeatable. Default: all.")
@click.option("--frontier", is_flag=True, help="Only the routes on the frontier.")
@click.option("--latency", help="Only routes whose measured median is within this budget: 5ms, 200us or 1.5s.")
@click.option("--device", help="The one the family was built for, where there are several; of TensorRT engines the GPUs they are for: a100 or 8.0,8.6.")
@click.option("--data", type=LocalPath(), help="Images to verify with, as a build takes them. Default: the family's sample.")
@click.option("--classes", metavar="FILE", help="Names of the family's classes in its order, or imagenet-1k, for --data whose folders name them.")
@click.option("--images", "count", type=click.IntRange(min=1), help="Test images to verify with. Default: as many as the limits of the precision need.")
@click.option("--random-weights", is_flag=True, help="Untrained weights, for sizes and times.")
@click.option("--profile", is_flag=True, help="Time every engine on this machine; the latencies go into the package.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads of onnxruntime. Default: one for each physical core.")
@opset_option("18, for TensorRT 23")
@click.option("--provenance", type=click.Choice(["public", "full"]), default="public", show_default=True, help="What the package says of its making; full: also the command lines, the host and its kernel, and paths.")
@seed_option("Of everything that is random.")
@format_options
@registry_option
@json_option
def export(family: str, form: str, precision: str, out: Path, as_json: bool, **options: Any) -> None:
    """Write a family as one package: every route an engine, the weights stored once, all of it verified."""
    from klas_zoo.building.exporting import export_as, images_for
    from klas_zoo.data.classes import read_classes

    special = options_for(form, options)
    spec, source = _source(family, options)
    if source.facts.weights == "random":
        say("RANDOM WEIGHTS: these networks are untrained; accuracies mean nothing.", err=True)
    images, described = images_for(
        spec, source, options["data"], precision=precision, count=options["count"], seed=options["seed"],
        classes=read_classes(options["classes"]) if options["classes"] else None,
    )  # fmt: skip
    say(f"{len(source.routes)} routes, verified on {described}", err=True)
    verdicts = export_as(
        source, out, special, precision=precision, images=images, threads=options["threads"],
        profile=_profile(source, options, precision) if options["profile"] else None,
        opset=options["opset"], listener=_tell,
    )  # fmt: skip
    _report(out, precision, verdicts, as_json)


def _source(family: str, options: dict[str, Any]) -> tuple[FamilySpec, PackageSource]:
    from klas_zoo.building.package_sources import choose, random_source, tuned_source
    from klas_zoo.families.specs import find_family
    from klas_zoo.registry import default_root
    from klas_zoo.units import parse_latency_ms

    names = [name for text in options["names"] for name in text.split(",")]
    budget_ms = parse_latency_ms(options["latency"]) if options["latency"] is not None else None
    full = options["provenance"] == "full"
    if options["random_weights"]:
        spec = find_family(family)
        source = random_source(spec, options["seed"], names, full_provenance=full)
    else:
        spec, source = tuned_source(
            family, options["registry"] or default_root(), options["device"], full_provenance=full,
            preferred=options.get("preferred"),
        )
    return spec, choose(source, names=names, frontier=options["frontier"], budget_ms=budget_ms)


def _profile(source: PackageSource, options: dict[str, Any], precision: str) -> Profile:
    from klas_zoo.profiles.devices import resolve_device
    from klas_zoo.profiles.latency import measure_engine

    device, shape = resolve_device("cpu"), source.facts.input_shape
    return lambda engine: (
        measure_engine(engine, device=device, precision=precision, input_shape=shape, threads=options["threads"]),
    )


def _tell(stage: str, route: str) -> None:
    say_progress(f"{stage} {route}")


def _report(out: Path, precision: str, verdicts: list[Verdict], as_json: bool) -> None:
    """What became of each route, and where the package is."""
    say_progress()
    for verdict in verdicts:
        if verdict.status == "refused":
            say(f"Left out: {verdict.artifact.route}. {verdict.reason}", err=True)
    if as_json:
        found = [one.to_json() for one in verdicts]
        say_json({"package": str(out), "precision": precision, "routes": found})
        return
    from klas_zoo.cli.package_tables import verdicts_table
    from klas_zoo.progress.tables import show

    show(verdicts_table(verdicts))
    say(f"Written: {out}")
