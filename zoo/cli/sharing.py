"""`klas-zoo push` and `klas-zoo pull`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from klas_zoo.cli.options import LocalPath, json_option, max_size_option
from klas_zoo.cli.output import say, say_json


@click.command()
@click.argument("package", type=LocalPath())
@click.argument("url")
@click.option("--name", help="What it is called there; may carry a tag, such as deit@prod. Default: the family's name.")
@click.option("--trust-sizes", is_flag=True, help="Do not read back what is there from a push before; compare sizes only.")
@json_option
def push(package: Path, url: str, name: str | None, trust_sizes: bool, as_json: bool) -> None:
    """Copy the family package in the folder PACKAGE to a URL: a folder, s3://, gs://, hf://, oci:// or any other of
    fsspec.

    Run again after an interruption, it sends only what is missing.
    """
    from klas_zoo.sharing import push as pushing
    from klas_zoo.units import format_size

    with _progress("push") as (on_start, on_bytes):
        done = pushing.push(package, url, name=name, trust_sizes=trust_sizes, on_start=on_start, on_bytes=on_bytes)
    if as_json:
        say_json(done.to_json())
        return
    say(
        f"{done.name} {done.version[:12]} at {done.url}: {format_size(done.size_bytes)}, "
        f"{format_size(done.sent_bytes)} of it sent"
    )


@click.command()
@click.argument("url")
@click.argument("folder", type=LocalPath())
@click.option("--name", help="Of the package there; needed where there are several.")
@click.option("--version", help="First digits of a version. Default: the one pushed last.")
@max_size_option
@json_option
def pull(
    url: str, folder: Path, name: str | None, version: str | None, largest_bytes: int, as_json: bool
) -> None:
    """Copy a family package from a URL into a new FOLDER, and check it.

    Run again after an interruption, it fetches only what is missing.
    """
    from klas_zoo.sharing import pull as pulling
    from klas_zoo.units import format_size

    with _progress("pull") as (on_start, on_bytes):
        done = pulling.pull(
            url, folder, name=name, version=version, largest_bytes=largest_bytes, on_start=on_start, on_bytes=on_bytes
        )
    if as_json:
        say_json(done.to_json())
        return
    say(
        f"{done.folder}: {done.name} {done.version[:12]}, {format_size(done.size_bytes)}, "
        f"{format_size(done.received_bytes)} of it fetched"
    )


@contextmanager
def _progress(name: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar on stderr, where that is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (TextColumn(name, markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(name, total=None)
        yield lambda size: bar.update(task, total=size), lambda size: bar.update(task, advance=size)
