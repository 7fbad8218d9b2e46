"""`klas-zoo pick`. Imports nothing heavy, ever: it has to answer in milliseconds."""

from __future__ import annotations

import json
from typing import Any

import click

from klas_zoo.cli.options import json_option, registry_option


@click.command()
@click.option("--latency", required=True, help="Budget for one batch: 5ms, 200us or 1.5s.")
@click.option("--device", help="Needed where engines of several devices are registered.")
@click.option("--family", help="Or a tag, such as deit@prod. Needed where families were evaluated on different images.")
@click.option("--percentile", type=click.Choice(["p50", "p90", "p99"]), default="p50", show_default=True, help="Of the measured latency.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size the latency was measured at.")
@click.option("--min-accuracy", type=float, help="Lowest top-1, in per cent.")
@click.option("--max-size", help="Largest file: 50MB, 48MiB or 900kB.")
@click.option("--measured-only", is_flag=True, help="Refuse latencies that were interpolated or predicted by a roofline.")
@click.option("--explain", is_flag=True, help="Show the runner-up on each side and what it would cost.")
@registry_option
@json_option
def pick(latency: str, explain: bool, as_json: bool, **limits: Any) -> None:
    """Print the most accurate engine within every limit."""
    from klas_zoo.registry.picking import pick as choose

    chosen = choose(latency, **limits)
    if as_json:
        click.echo(json.dumps(chosen.to_json(), sort_keys=True))
        return
    click.echo(str(chosen.engine.path))
    for line in chosen.explain() if explain else chosen.summary():
        click.echo(line)
