"""`klas-zoo cascades`."""

from __future__ import annotations

from typing import Any

import click

from klas_zoo.cli.options import LocalPath, json_option, registry_option
from klas_zoo.cli.output import say, say_json, say_progress


@click.command()
@click.argument("targets", nargs=-1, required=True)
@click.option("--data", help="Labelled images that no network has learned from: a folder with a folder for each class, or a data set whose test images are used. Default: the images that the family embeds, for one that does.")
@click.option("--test", help="Other labelled images, which say how accurate cascades are; all of --data then decide. Default: half of --data.")
@click.option("--out", type=LocalPath(), help="Write a copy of the package that carries the cascades, for klas-zoo install and the servers.")
@click.option("--graphs", is_flag=True, help="With --out: also each cascade of two stages as one ONNX graph with If, for one image at a time.")
@click.option("--register", metavar="NAME", help="Register the cascades as a family of this name, for klas-zoo pick; needs --test.")
@click.option("--precision", help="Of the engines of registered families. Default: fp32.")
@click.option("--route", "routes", multiple=True, help="Use only this route; may be repeated.")
@click.option("--latency", help="Limit for the percentile: 5ms, 200us or 1.5s.")
@click.option("--percentile", type=click.Choice(["p50", "p90", "p99"]), default="p50", show_default=True, help="Of the latency over images, long and short paths together.")
@click.option("--mean", help="Limit for the mean latency over images.")
@click.option("--worst", help="Limit for an image that every stage executes.")
@click.option("--measure", type=click.Choice(["probability", "margin", "entropy"]), default="probability", show_default=True, help="Of confidence.")
@click.option("--no-triples", is_flag=True, help="Only cascades of two stages.")
@click.option("--classes", metavar="FILE", help="Names of the engine's classes in its order, or imagenet-1k.")
@click.option("--threads", type=click.IntRange(min=1), help="That compute one operator. Default: one for each physical core.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the drawing of the images that decide.")
@registry_option
@json_option
def cascades(
    targets: tuple[str, ...], latency: str | None, percentile: str, mean: str | None, worst: str | None, measure: Any,
    no_triples: bool, classes: str | None, as_json: bool, **options: Any,
) -> None:  # fmt: skip
    """Fit cascades of routes, time them here, and print the best within limits.

    TARGETS are folders of packages of ONNX graphs, and registered families, such as plain networks of klas-zoo add;
    several are joined, where they take the same images and know the same classes. A cascade answers with a small
    network and asks a larger one where that is unsure. Half of the images fit temperatures and thresholds, the other
    half says how accurate it is.

    With --register klas-zoo pick considers the cascades; with --out the package is copied with its cascades, which
    klas-zoo install and the servers take. Without a limit every route and cascade is printed, the fastest first.
    """
    from klas_zoo.cascades.search import SearchSettings
    from klas_zoo.catalogue.cascade_reports import Limits
    from klas_zoo.catalogue.joining import fit_registered
    from klas_zoo.units import parse_latency_ms

    bounds = {"latency_ms": latency, "mean_ms": mean, "worst_ms": worst}
    limits = Limits(
        percentile=percentile, **{k: parse_latency_ms(text) for k, text in bounds.items() if text is not None}
    )
    if classes is not None:
        from klas_zoo.data.classes import read_classes

        options["classes"] = read_classes(classes)
    settings = SearchSettings(measure=measure, triples=not no_triples, most=6)
    found = fit_registered(targets, settings=settings, listener=_tell, **options)
    for note in found.notes:
        say(f"Note: {note}", err=True)
    if found.build_id is not None:  # whether or not one of them is within the limits
        say(f"Registered as build {found.build_id}.", err=as_json)
    shown = [limits.best(found.reports)] if limits else found.reports
    if as_json:
        say_json([one.to_json() for one in shown])
    else:
        for one in shown:
            for line in one.lines():
                say(line)


def _tell(what: str, done: int, total: int) -> None:
    say_progress(f"{what}: {done:,} of {total:,}", done=done >= total)
