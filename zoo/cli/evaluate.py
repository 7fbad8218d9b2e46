"""`klas-zoo evaluate`."""

from __future__ import annotations

from typing import Any

import click

from klas_zoo.cli.options import json_option, preprocessing_options, registry_option
from klas_zoo.cli.output import say, say_json, say_progress


@click.command()
@click.argument("target")
@click.option("--data", help="A folder with a folder for each class, or a data set as klas-zoo build takes it, whose test images are used. Default: the images that the family embeds, for one that does.")
@click.option("--route", "routes", multiple=True, help="Of a package only this route; may be repeated.")
@click.option("--family", help="Of a registered route: only of this one; or a tag, such as deit@prod.")
@click.option("--device", help="Of a registered route: only for this one.")
@click.option("--classes", metavar="FILE", help="Names of the engine's classes in its order, or imagenet-1k.")
@click.option("--runtime", help="What executes it. Default: of a registered engine its own, else onnxruntime.")
@click.option("--provider", help="Of the runtime, such as CUDAExecutionProvider.")
@click.option("--threads", type=click.IntRange(min=1), help="That compute one operator. Default: one for each physical core.")
@click.option("--workers", type=click.IntRange(min=1), help="Threads that decode images. Default: one for each physical core.")
@preprocessing_options
@registry_option
@json_option
def evaluate(target: str, routes: tuple[str, ...], classes: str | None, as_json: bool, **options: Any) -> None:
    """Measure top-1 and top-5 of engines on labelled images, with 95 % confidence intervals.

    TARGET is the folder of a package of any format, an engine's file, or a registered route. Of a file outside of a
    package it has to be known how images are prepared: pass --mean and --std.
    """
    from klas_zoo.catalogue.evaluating import evaluate as evaluate_target
    from klas_zoo.preprocess import Preprocess

    fields = {name: options.pop(name) for name in ("mean", "std", "interpolation", "crop_pct")}
    preprocess = None
    if fields["mean"] is not None and fields["std"] is not None:
        # the size is the engine's, and taken from it
        preprocess = Preprocess(**{"interpolation": "bicubic", "input_size": (len(fields["mean"]), 1, 1)} | _given(fields))
    if classes is not None:
        from klas_zoo.data.classes import read_classes

        options["classes"] = read_classes(classes)
    found = evaluate_target(target, routes=routes, preprocess=preprocess, listener=_tell, **options)
    if as_json:
        say_json([one.to_json() for one in found])
        return
    for note in found[0].notes:
        say(f"Note: {note}", err=True)
    for one in found:
        say(f"{one.engine}: {one}")
    say(f"{found[0].images:,} images: {found[0].dataset}, fingerprint {found[0].data_fingerprint[:12]}")


def _given(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _tell(done: int, images: int) -> None:
    say_progress(f"{done:,} of {images:,}", done=done >= images)
