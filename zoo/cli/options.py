"""Options that several commands share, and what they mean to the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klas_zoo.errors import UsageError
from klas_zoo.routes import DIRECTIONS

if TYPE_CHECKING:
    from klas_zoo.families.specs import FamilySpec
    from klas_zoo.selection.candidates import SelectionSettings


def registry_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--registry",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of the registry. Default: $KLAS_ZOO_REGISTRY, else the user's data folder.",
    )(command)


def selector_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--selector` and `--direction`."""
    selector = click.option(
        "--selector",
        help="What chooses the stitches: klas, klas-latency, kl-only, ce, cka, mse, direct, snnet, random, all, klas-mse, "
        "klas-calibrated or output-kl (docs/selection.md). Default: klas.",
    )
    direction = click.option(
        "--direction",
        type=click.Choice(DIRECTIONS),
        help="Stitch up from the cheaper anchor to the dearer one, down from the dearer to the cheaper, or both. "
        "Default: the family's; up, as published, where --selector is given.",
    )
    return selector(direction(command))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def selection_settings(spec: FamilySpec, options: dict[str, Any]) -> SelectionSettings:
    from klas_zoo.selection.candidates import SelectionSettings
    from klas_zoo.selection.selectors import find_selector

    # a selector that is named is the published one, from cheap to dear
    direction = options["direction"] or ("up" if options["selector"] else spec.direction)
    return SelectionSettings(
        buckets=options["buckets"],
        tolerance=options["tolerance"],
        pairs=anchor_pairs(spec, options["pairs"]),
        selector=find_selector(options["selector"] or "klas").name,
        direction=direction,
        most=options["most"],
        seed=options["seed"],
    )


def anchor_pairs(spec: FamilySpec, texts: tuple[str, ...]) -> tuple[tuple[str, str], ...] | None:
    pairs = []
    for text in texts:
        source, colon, target = text.partition(":")
        if not colon:
            raise UsageError(f"--pair '{text}' is not SOURCE:TARGET, for example tiny:small.")
        pairs.append((spec.anchor(source).name, spec.anchor(target).name))
    return tuple(dict.fromkeys(pairs)) or None
