"""`klas-zoo predict`."""

from __future__ import annotations

from typing import Any

import click

from klas_zoo.cli.options import LocalPath, json_option, registry_option
from klas_zoo.cli.output import say, say_json


@click.command()
@click.argument("images", nargs=-1, required=True, type=LocalPath())
@click.option("--latency", required=True, help="Budget for one image: 5ms, 200us or 1.5s.")
@click.option("--top", type=click.IntRange(min=1), default=5, show_default=True, help="Classes to show of each image.")
@click.option("--family", help="Only of this one; or a tag, such as deit@prod.")
@click.option("--device", help="Needed where engines of several devices are registered.")
@click.option("--percentile", type=click.Choice(["p50", "p90", "p99"]), default="p50", show_default=True, help="Of the latency.")
@click.option("--hardware", help="Use latencies of this hardware instead of this machine's: a part of its description.")
@registry_option
@json_option
def predict(images: tuple[Any, ...], latency: str, top: int, as_json: bool, **limits: Any) -> None:
    """Classify the image files IMAGES with the most accurate engine within a latency.

    Images are prepared as for the engine's evaluation. Without torch.
    """
    from klas_zoo.registry.picking import pick

    picked = pick(latency, **limits)
    found = []
    with picked.load() as engine:
        for image in images:
            found.append((image, engine.predict(image, top=top)))
    if as_json:
        shown = [{"image": str(image), "predictions": [one.to_json() for one in best]} for image, best in found]
        say_json({"engine": picked.engine.to_json(), "images": shown})
        return
    for image, best in found:
        say(image)
        for one in best:
            say(f"  {100 * one.probability:5.1f} %  {one.label}")
