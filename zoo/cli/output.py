"""What commands print. Names in it may come from anywhere, so nothing reaches a terminal as a command to it."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from klas_zoo.units import printable


def say(text: object = "", *, err: bool = False) -> None:
    """Prints lines to stdout or stderr, control characters in them as escapes."""
    click.echo(printable(str(text)), err=err)


def say_json(value: Any) -> None:
    """Prints JSON of one line, which is ASCII, to stdout."""
    click.echo(json.dumps(value, sort_keys=True))


def say_progress(text: str = "", *, done: bool = False) -> None:
    """Shows on stderr, where that is a terminal, how far something is, in the place of what it showed before.

    Args:
        done: the line stays.
    """
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{printable(text)}", err=True, nl=done)
