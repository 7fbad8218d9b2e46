"""`klas-zoo report`."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from klas_zoo.cli.options import LocalPath, registry_option
from klas_zoo.cli.output import say


@click.command()
@click.option("--family", help="Only of this one; or a tag, such as deit@prod.")
@click.option("--device", help="Only on this one.")
@click.option("--out", type=LocalPath(dir_okay=False), help="The page. Default: report.html in the registry.")
@click.option("--open", "show", is_flag=True, help="Also open it in the browser.")
@registry_option
def report(family: str | None, device: str | None, out: Path | None, show: bool, registry: Path | None) -> None:
    """Write a page to look at: accuracy for every budget, what pick answers, how stitches were chosen.

    One HTML file that contains everything it shows and needs no network. A build writes such a page of its own beside
    report.json.
    """
    from klas_zoo.page.contents import registry_contents
    from klas_zoo.page.writing import write_page
    from klas_zoo.registry import Registry

    place = Registry.open(registry, create=False)
    page = (out or place.root / "report.html").absolute()
    write_page(registry_contents(place, family=family, device=device), page)
    say(f"Written: {page}")
    if show and not webbrowser.open(page.as_uri()):
        say("No browser was found to open it.", err=True)
