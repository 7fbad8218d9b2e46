"""`klas-zoo show`."""

from __future__ import annotations

from pathlib import Path

import click

from klas_zoo.cli.options import json_option, registry_option
from klas_zoo.cli.output import say, say_json


@click.command()
@click.argument("route")
@click.option("--family", help="Only of this one; or a tag, such as deit@prod.")
@click.option("--device", help="Only on this one.")
@registry_option
@json_option
def show(route: str, family: str | None, device: str | None, registry: Path | None, as_json: bool) -> None:
    """Tell where an engine came from: ROUTE is a route's name, or an engine's file."""
    from klas_zoo.registry import Registry
    from klas_zoo.registry.origin import origins

    found = origins(Registry.open(registry, create=False), route, family, device)
    if as_json:
        say_json([one.to_json() for one in found])
        return
    for one in found:
        for line in one.lines():
            say(line)
