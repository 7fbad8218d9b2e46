"""`klas-zoo routes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from klas_zoo.cli.options import json_option, registry_option, selection_settings, selector_options


@click.command()
@click.option("--family", required=True, help="A built-in family (klas-zoo families), or a TOML file of your own.")
@selector_options
@click.option("--pair", "pairs", multiple=True, metavar="SOURCE:TARGET", help="Stitch these anchors instead of those the selector would; repeatable.")
@click.option("--buckets", type=click.IntRange(min=1), default=20, show_default=True, help="Cost buckets between two anchors.")
@click.option("--tolerance", type=click.FloatRange(min=0), default=0.05, show_default=True, help="τ: keep what is within this share of a bucket's best score.")
@click.option("--most", type=click.IntRange(min=1), help="Keep the best so many stitches of each bucket, whatever τ says.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of what is drawn and of how images are split.")
@click.option("--data", type=click.Path(path_type=Path), help="Images to measure on. Default: the last build's scores, or the family's sample.")
@click.option("--weights", type=click.Path(path_type=Path), help="Folder with a checkpoint for every anchor, to measure with.")
@registry_option
@json_option
def routes(family: str, data: Path | None, weights: Path | None, registry: Path | None, as_json: bool, **options: Any) -> None:
    """Show the routes a selector chooses, without building any."""
    from klas_zoo.families.specs import find_family

    spec = find_family(family)
    settings = selection_settings(spec, options)
    from rich.console import Console

    from klas_zoo.building.route_list import list_routes, routes_table
    from klas_zoo.cli.tables import show
    from klas_zoo.progress.console import ConsoleListener
    from klas_zoo.registry import default_root

    listener = ConsoleListener(Console(stderr=True))
    found = list_routes(
        spec, settings, root=registry or default_root(), data=data, weights=weights,
        stage=listener.stage, say=listener.say,
    )  # fmt: skip
    if as_json:
        click.echo(json.dumps([one.to_json() for one in found], sort_keys=True))
    else:
        show(routes_table(found, settings))
