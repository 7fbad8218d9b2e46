"""`klas-zoo list` and `klas-zoo families`: what is there."""

from __future__ import annotations

import json
from pathlib import Path

import click

from klas_zoo.cli.options import json_option, registry_option, wide_option
from klas_zoo.cli.output import say, say_json


@click.command("list")
@click.option("--family", help="Only this one; or a tag, such as deit@prod.")
@click.option("--device", help="Only this one.")
@click.option("--route", help="Only this one.")
@wide_option
@registry_option
@json_option
def list_engines(
    family: str | None, device: str | None, route: str | None, wide: bool, registry: Path | None, as_json: bool
) -> None:
    """Show the registered engines."""
    from klas_zoo.errors import UnknownName
    from klas_zoo.registry import Registry
    from klas_zoo.registry.tags import registered_device

    place = Registry.open(registry, create=False)
    engines = place.engines()
    with place.reading() as connection:
        device = registered_device(connection, device)
    if family is not None and "@" in family:
        engines, family = place.engines(family), None
    for kind, wanted in (("family", family), ("device", device), ("route", route)):
        known = {str(getattr(one, kind)) for one in engines}
        if wanted is not None and wanted not in known:
            raise UnknownName(kind, wanted, known, "Only what is registered can be listed.")
        engines = [one for one in engines if wanted in (None, str(getattr(one, kind)))]
    if as_json:
        say_json([one.to_json() for one in engines])
        return
    if not engines:
        say(f"The registry {place.root} is empty: run klas-zoo build, add or install first.")
        return
    from klas_zoo.cli.tables import engines_table
    from klas_zoo.progress.tables import show

    show(engines_table(engines, wide))


@click.command()
@json_option
def families(as_json: bool) -> None:
    """Show the families that can be built."""
    from klas_zoo.families.specs import builtin_families

    found = builtin_families()
    if as_json:
        say(
            json.dumps(
                [
                    {
                        "family": spec.name,
                        "description": spec.description,
                        "input_shape": spec.input_shape,
                        "num_classes": spec.num_classes,
                        "anchors": [{"anchor": a.name, "model": a.model} for a in spec.anchors],
                        "preset": spec.preset,
                    }
                    for spec in found.values()
                ],
                sort_keys=True,
            )
        )
        return
    for spec in found.values():
        say(f"{spec.name}: {spec.description}")
        say(f"    {' < '.join(f'{a.name} ({a.model})' for a in spec.anchors)}")
    say("A family of your own is a TOML file: klas-zoo build --family mine.toml")
