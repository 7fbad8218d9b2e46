"""`klas-zoo devices`: what is known of each device, and what was measured on it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klas_zoo.cli.options import json_option, registry_option
from klas_zoo.cli.output import say_json

if TYPE_CHECKING:
    from klas_zoo.profiles.profile import Profile


@click.command()
@registry_option
@json_option
def devices(registry: Path | None, as_json: bool) -> None:
    """Show the devices there are figures of, and the profiles measured on them."""
    from klas_zoo.hardware import describe_cpu
    from klas_zoo.profiles.catalog import catalog
    from klas_zoo.profiles.store import ProfileStore
    from klas_zoo.registry import default_root

    held = ProfileStore.of(registry or default_root()).devices()
    rows = [
        {
            **{name: getattr(spec, name) for name in ("name", "aliases", "vendor", "kind", "compute_capability")},
            **{name: getattr(spec, name) for name in ("memory_gb", "bandwidth_gb_s", "peak_tflops")},
            "hardware": describe_cpu() if spec.kind == "cpu" else "",
            "sources": {figure: vars(source) for figure, source in spec.sources.items()},
            "profiles": _profiles(held.pop(spec.name, [])),
        }
        for spec in catalog().values()
    ]
    rows += [
        {"name": name, "kind": found[0].kind, "hardware": found[0].hardware, "profiles": _profiles(found)}
        for name, found in sorted(held.items())
    ]
    if as_json:
        say_json(rows)
        return
    from klas_zoo.cli.tables import devices_table
    from klas_zoo.progress.tables import show

    show(devices_table(rows))


def _profiles(found: list[Profile]) -> list[dict[str, Any]]:
    """The newest of each kind, from many to few facts."""
    kinds: dict[str, dict[str, Any]] = {}
    for one in found:
        kinds.setdefault(
            f"{one} {one.origin}",
            {
                "family": one.family,
                "runtime": one.runtime,
                "precision": one.precision,
                "batch": one.batch,
                "origin": one.origin,
                "networks": len(one.networks),
                "measured_at": one.measured_at,
                "noisy": one.noisy,
            },
        )
    return sorted(kinds.values(), key=lambda one: (one["family"], one["runtime"], one["precision"], one["batch"]))
