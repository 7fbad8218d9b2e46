"""`klas-zoo pick`. Imports nothing heavy, ever: it has to answer in milliseconds."""

from __future__ import annotations

from typing import Any

import click

from klas_zoo.cli.options import json_option, registry_option
from klas_zoo.cli.output import say, say_json


@click.command()
@click.option("--latency", help="Limit for the percentile of one batch: 5ms, 200us or 1.5s.")
@click.option("--mean", help="Limit for the mean over images; of an engine that is no cascade its median counts.")
@click.option("--worst", help="Limit for an image that every stage of a cascade executes; of other engines their p99.")
@click.option("--device", help="Needed where engines of several devices are registered.")
@click.option("--family", help="Only of this one; or a tag, such as deit@prod. Default: all that were evaluated on the same images.")
@click.option("--percentile", type=click.Choice(["p50", "p90", "p99"]), default="p50", show_default=True, help="Of the latency.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size of the latency.")
@click.option("--min-accuracy", type=float, help="Lowest top-1, in per cent.")
@click.option("--max-size", help="Largest size of graph and weights: 50MB, 48MiB or 900kB.")
@click.option("--measured-only", is_flag=True, help="Exclude latencies that were interpolated or predicted by a roofline.")
@click.option("--hardware", help="Use latencies of this hardware instead of this machine's: a part of its description.")
@click.option("--threads", type=click.IntRange(min=0), help="Use latencies measured with this many threads. Default: the number most engines were measured with.")
@click.option("--claimed", is_flag=True, help="Include engines whose accuracy was claimed instead of measured.")
@click.option("--explain", is_flag=True, help="Show the neighbouring engines and what they would cost.")
@registry_option
@json_option
def pick(latency: str | None, explain: bool, as_json: bool, **limits: Any) -> None:
    """Print the most accurate engine or cascade within every limit; at least one of latency, mean and worst is needed.

    Latencies are compared under one set of conditions, accuracies on one set of images; what that excludes is printed.
    """
    from klas_zoo.registry.picking import pick as choose

    chosen = choose(latency, **limits)
    if as_json:
        say_json(chosen.to_json())
        return
    click.echo(str(chosen.engine.path))  # as it is: scripts open it
    for line in chosen.explain() if explain else chosen.summary():
        say(line)
