"""`klas-zoo frontier`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from klas_zoo.cli.options import LocalPath, json_option, registry_option, wide_option
from klas_zoo.cli.output import say, say_json


@click.command()
@click.option("--device", help="Needed where engines of several devices are registered.")
@click.option("--family", help="Only of this one; or a tag, such as deit@prod.")
@click.option("--percentile", type=click.Choice(["p50", "p90", "p99"]), default="p50", show_default=True, help="Of the latency.")
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Batch size of the latency.")
@click.option("--measured-only", is_flag=True, help="Exclude latencies that were interpolated or predicted by a roofline.")
@click.option("--hardware", help="Use latencies of this hardware instead of this machine's: a part of its description.")
@click.option("--threads", type=click.IntRange(min=0), help="Use latencies measured with this many threads. Default: the number most engines were measured with.")
@click.option("--claimed", is_flag=True, help="Include engines whose accuracy was claimed instead of measured.")
@click.option("--all", "every", is_flag=True, help="List every engine, not only those on the frontier and dominated stitches.")
@click.option("--plot", "picture", type=LocalPath(dir_okay=False), help="Also write a PNG.")
@wide_option
@registry_option
@json_option
def frontier(every: bool, picture: Path | None, wide: bool, as_json: bool, **limits: Any) -> None:
    """Show all families of one machine together: the frontier, and stitches that a plain network dominates."""
    from klas_zoo.registry.overview import overview

    found = overview(**limits)
    if picture is not None:
        from klas_zoo.catalogue.frontier_plot import draw

        draw(found, picture)
    if as_json:
        say_json(found.to_json())
        return
    from klas_zoo.cli.tables import frontier_table
    from klas_zoo.progress.tables import show

    show(frontier_table(found, every, wide))
    stitches = [one for one in found.points if not one.plain]
    dominated = [one for one in stitches if one.dominated_by]
    if stitches:
        say(f"{len(dominated)} of {len(stitches)} stitches are dominated by a plain network.")
    for clause in found.left_out:
        say(f"excluded {clause}")
    if picture is not None:
        say(f"Written: {picture}")
