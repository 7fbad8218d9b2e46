"""Options of `klas-zoo export` that belong to some formats only, and what they mean to the library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from klas_zoo.cli.options import LocalPath
from klas_zoo.errors import BadQuantity, UsageError
from klas_zoo.exporters.formats import DERIVED

# option on the command line → what formats call it
_NAMES = {"profiles": "batches", "timing_cache": "timing-cache"}


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options below to a command; `options_for` takes them off again."""
    for decorate in (
        click.option("--timing-cache", type=LocalPath(dir_okay=False), help="tensorrt: file to keep its measurements in."),
        click.option("--plans", multiple=True, type=LocalPath(file_okay=False), help="triton: a package of tensorrt engines to serve, one for each GPU; repeatable."),
        click.option("--copy", is_flag=True, help="triton: copies instead of links, for places that keep no links."),
        click.option("--strip", is_flag=True, help="tensorrt: engines without weights, filled from the shared weights file when opened."),
        click.option("--batches", "profiles", multiple=True, metavar="SMALLEST:USUAL:LARGEST", help="tensorrt: batch sizes of an optimisation profile; repeatable.  [default: 1:8:32]"),
    ):  # fmt: skip
        command = decorate(command)
    return command


def options_for(form: str, given: dict[str, Any]) -> dict[str, Any]:
    """Takes the options of formats out of `given`, and gives those of one format, `format` among them.

    Raises:
        UsageError: one was given that belongs to another format.
        BadQuantity: a range of batch sizes does not parse.
    """
    takes = DERIVED[form].options if form in DERIVED else ()
    found: dict[str, Any] = {"format": form}
    for name in ("profiles", "strip", "copy", "plans", "timing_cache"):
        value = given.pop(name)
        if not value:
            continue
        if name not in takes:
            others = [one for one, derived in DERIVED.items() if name in derived.options]
            raise UsageError(f"--{_NAMES.get(name, name)} belongs to --format {' or '.join(others)}, not to {form}.")
        found[name] = value
    if "profiles" in found:
        found["profiles"] = tuple(map(_batch_range, found["profiles"]))
    if "capabilities" in takes and given["device"]:
        # the GPUs that engines are for need not be what the family was built for
        found["capabilities"] = _capabilities(given["device"])
        given["preferred"], given["device"] = given["device"], None
    return found


def _capabilities(text: str) -> tuple[Any, ...]:
    from klas_zoo.exporters.gpu_targets import ComputeCapability

    return tuple(dict.fromkeys(ComputeCapability.parse(name) for name in text.split(",")))


def _batch_range(text: str) -> Any:
    from klas_zoo.runtimes.plans import BatchRange

    try:
        smallest, usual, largest = map(int, text.split(":"))
        return BatchRange(smallest=smallest, usual=usual, largest=largest)
    except ValueError:
        raise BadQuantity(f"--batches '{text}' is not SMALLEST:USUAL:LARGEST, for example 1:8:32.") from None
