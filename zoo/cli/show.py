"""`klas-zoo show`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from klas_zoo.cli.options import json_option, registry_option


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
        click.echo(json.dumps([one.to_json() for one in found], sort_keys=True))
        return
    for one in found:
        for line in one.lines():
            click.echo(line)
