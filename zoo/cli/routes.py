"""`klas-zoo routes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from klas_zoo.cli.options import (
    LocalPath,
    Number,
    former_name,
    json_option,
    registry_option,
    seed_option,
    selection_settings,
    selector_options,
)
from klas_zoo.cli.output import say_json


@click.command()
@click.option("--family", required=True, help="A built-in family (klas-zoo families), or a TOML file of your own.")
@selector_options
@click.option("--pair", "pairs", multiple=True, metavar="SOURCE:TARGET", help="Stitch these anchors instead of those the selector would; repeatable.")
@click.option("--buckets", type=click.IntRange(min=1), help="Cost buckets between two anchors. Default: the family's, else 20.")
@click.option("--tolerance", type=Number(min=0), default=0.05, show_default=True, help="τ: keep what is within this share of a bucket's best score.")
@click.option("--per-bucket", "most", type=click.IntRange(min=1), help="Keep the N best stitches per bucket, ignoring τ.", metavar="N")
@former_name("--most", "most", type=click.IntRange(min=1))
@seed_option("Of what is drawn and of how images are split.")
@click.option("--data", type=LocalPath(), help="Images to measure on. Default: the last build's scores, or the family's sample.")
@click.option("--classes", metavar="FILE", help="Names of the family's classes in its order, or imagenet-1k, for --data whose folders name them.")
@click.option("--weights", type=LocalPath(), help="Folder with a checkpoint for every anchor, to measure with.")
@registry_option
@json_option
def routes(
    family: str, data: Path | None, classes: str | None, weights: Path | None, registry: Path | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Show the routes a selector chooses, without building any."""
    from klas_zoo.families.specs import find_family

    spec = find_family(family)
    settings = selection_settings(spec, options)
    from rich.console import Console

    from klas_zoo.building.route_list import list_routes, routes_table
    from klas_zoo.data.classes import read_classes
    from klas_zoo.progress.console import ConsoleListener
    from klas_zoo.progress.tables import show
    from klas_zoo.registry import default_root

    listener = ConsoleListener(Console(stderr=True))
    found = list_routes(
        spec, settings, root=registry or default_root(), data=data, weights=weights,
        classes=read_classes(classes) if classes else None,
        stage=listener.stage, say=listener.say,
    )  # fmt: skip
    if as_json:
        say_json([one.to_json() for one in found])
    else:
        show(routes_table(found, settings))
