"""Options that several commands share, and what they mean to the library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klas_zoo.addresses import is_url, without_credentials
from klas_zoo.errors import UsageError
from klas_zoo.routes import DIRECTIONS

if TYPE_CHECKING:
    from klas_zoo.families.specs import FamilySpec
    from klas_zoo.selection.candidates import SelectionSettings


class LocalPath(click.Path):
    """A path of this machine. click's own takes a URL for one, and what is written there is a folder called `s3:`."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(path_type=Path, **settings)

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if is_url(value):
            self.fail(
                f"{without_credentials(str(value))} is a URL, and this is a local path: klas-zoo push, pull and install "
                "take packages to and from URLs.", parameter, context,
            )  # fmt: skip
        return super().convert(value, parameter, context)


class Number(click.FloatRange):
    """A number within a range. click's own takes "nan" for one within any range, and lets "inf" through."""

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> float:
        found: float = super().convert(value, parameter, context)
        if not math.isfinite(found):
            self.fail(f"{value} is not a number.", parameter, context)
        return found


def seed_option(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--seed`, up to what generators take."""
    return click.option(
        "--seed", type=click.IntRange(0, 2**63 - 1), default=0, show_default=True, metavar="NUMBER", help=help
    )


def opset_option(default: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`--opset`: from what torch translates to without converting, to the first with attention as one operator."""
    return click.option(
        "--opset", type=click.IntRange(18, 23), metavar="N",
        help=f"The newest opset of ONNX whose operators graphs may use; 23 has attention as one operator. Default: {default}.",
    )  # fmt: skip


BUILT_RUNTIMES = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx")
"""Runtimes that engines can be built for."""


class NameList(click.ParamType):  # type: ignore[type-arg, unused-ignore]  # generic from click 8.2 on
    """Names separated by commas, each of them known and given once."""

    name = "name[,name…]"

    def __init__(self, known: Sequence[str]) -> None:
        self.known = known

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(name.strip() for name in str(value).split(",")))
        for name in names:
            if name not in self.known:
                self.fail(f"'{name}' is not one of {', '.join(self.known)}.", parameter, context)
        return names


def former_name(option: str, parameter: str, **settings: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A hidden alias: the name that an option had in the version before."""

    def take(context: click.Context, _: click.Parameter, value: Any) -> None:
        if value is not None:
            context.params[parameter] = value

    return click.option(option, hidden=True, expose_value=False, is_eager=True, callback=take, help="A former name.", **settings)


def registry_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--registry",
        type=LocalPath(file_okay=False),
        help="Folder of the registry. Default: $KLAS_ZOO_REGISTRY, else the user's data folder.",
    )(command)


def selector_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--selector` and `--direction`."""
    selector = click.option(
        "--selector",
        help="What chooses the stitches: klas, klas-latency, kl-only, ce, cka, mse, direct, snnet, random, all or "
        "output-kl (docs/selection.md). Default: klas.",
    )
    direction = click.option(
        "--direction",
        type=click.Choice(DIRECTIONS),
        help="Stitch up from the smaller anchor to the larger one, down from the larger to the smaller, or both, with half of the buckets each. "
        "Default: the family's; up, as published, where --selector is given.",
    )
    return selector(direction(command))


def preprocessing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--mean`, `--std`, `--interpolation` and `--crop-pct`: how images are prepared for a network from anywhere."""
    for option in (
        click.option("--crop-pct", type=float, help="Share of the resized image that is kept. Default: 0.875."),
        click.option("--interpolation", help="Of resizing: nearest, bilinear, bicubic, box, hamming or lanczos. Default: bicubic."),
        click.option("--std", callback=_channels, metavar="R,G,B", help="Of each channel, on the scale of 0 to 1. Default: ImageNet's."),
        click.option("--mean", callback=_channels, metavar="R,G,B", help="Of each channel, on the scale of 0 to 1. Default: ImageNet's."),
    ):
        command = option(command)
    return command


def _channels(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    if value is None:
        return None
    try:
        found = tuple(float(one) for one in value.split(","))
    except ValueError:
        found = ()
    if len(found) not in (1, 3):
        raise click.BadParameter(
            f"{parameter.name} is three numbers, such as 0.485,0.456,0.406, or one for grey images, not '{value}'."
        )
    return found


def size_bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    """`50MB`."""
    from klas_zoo.units import parse_size_bytes

    return None if value is None else parse_size_bytes(value)


def max_size_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--max-size", "largest_bytes", callback=size_bytes, default="64GB", show_default=True, metavar="SIZE",
        help="Refuse larger packages from a URL.",
    )(command)  # fmt: skip


def counts(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """`1,8,32`."""
    if value is None:
        return None
    try:
        found = tuple(dict.fromkeys(int(one) for one in value.split(",")))
    except ValueError:
        found = (0,)
    if min(found) < 1:
        raise click.BadParameter(f"'{value}' is no list of batch sizes such as 1,8,32.", context, parameter)
    return found


wide_option = click.option("--wide", is_flag=True, help="Show all columns of tables.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def selection_settings(spec: FamilySpec, options: dict[str, Any]) -> SelectionSettings:
    from klas_zoo.selection.candidates import SelectionSettings
    from klas_zoo.selection.selectors import find_selector

    # a selector that is named is the published one, from small to large
    direction = options["direction"] or ("up" if options["selector"] else spec.direction)
    return SelectionSettings(
        buckets=options["buckets"] or spec.buckets,
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
