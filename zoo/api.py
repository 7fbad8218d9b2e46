"""`klas_zoo.build`: in Python what the command does, with the same options and defaults."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from klas_zoo.errors import FamilyError, UnknownName, UsageError
from klas_zoo.extras import explained

if TYPE_CHECKING:
    from klas_zoo.building.job import BuildResult
    from klas_zoo.families.anchors import Family
    from klas_zoo.families.specs import FamilySpec
    from klas_zoo.progress.listeners import Listener

_COMMAND_LINE_ONLY = ("family", "as_json", "nproc", "max_restarts", "dry_run", "log_json", "tensorboard", "wide")


@explained("klas_zoo.build")
def build(
    family: Family | str | Path,
    *,
    device: str = "cpu",
    registry: str | Path | None = None,
    listener: Listener | None = None,
    **options: Any,
) -> BuildResult:
    """Probe, select, stitch, tune, export, verify, time and register a family.

    The same call resumes where an interrupted one stopped.

    Args:
        family: of your own chains (`Family.of`), a built-in one by its name, or a TOML file.
        device: what the engines are made for and timed on.
        registry: the folder. Default: $KLAS_ZOO_REGISTRY, else the user's data folder.
        listener: gets progress and sentences; None: nothing is printed.
        options: those of `klas-zoo build`, such as `data="photos"`, `tune_steps=500` or `pairs=[("tiny", "base")]`,
            with its defaults; `-` becomes `_`, and the reference of the command names the others.

    Raises:
        UnknownName: `klas-zoo build` has no such option.
        UsageError: an option has a value that makes no sense.
        KlasZooError: any other of its kinds; the registry stays as it was.
    """
    from klas_zoo.building import job
    from klas_zoo.building.report import write_report
    from klas_zoo.cli.build import build_settings, prepared, report_folder
    from klas_zoo.costs.targets import target_device
    from klas_zoo.families.anchors import Family
    from klas_zoo.families.specs import find_family
    from klas_zoo.profiles.store import ProfileStore
    from klas_zoo.progress.listeners import NullListener
    from klas_zoo.registry import Registry

    own = family if isinstance(family, Family) else None
    spec = _spec_of(family) if isinstance(family, Family) else find_family(family)
    chosen = _complete(options)
    settings = build_settings(spec, chosen)
    place = Registry.open(Path(registry) if registry is not None else None, create=True)
    target = target_device(str(device), ProfileStore.of(place.root))
    loaded, images, rest = prepared(
        spec, settings, target, place=place, listener=listener or NullListener(), options=chosen, own=own
    )
    result = job.build(loaded, images, settings, **rest)
    assert result is not None  # there is one process
    folder = Path(chosen["out"]) if chosen["out"] else report_folder(result, place, spec, target)
    write_report(result, folder, place)
    return result


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    """Options of the command by name: those given, checked as the command checks them, and defaults."""
    import click

    from klas_zoo.cli.build import build as command

    known = {str(one.name): one for one in command.params if one.name not in _COMMAND_LINE_ONLY}
    for name in given:
        if name not in known or name in ("device", "registry"):
            raise UnknownName("option", name, set(known) - {"device", "registry"}, "See klas-zoo build --help.")
    # as the command line would have it, without any option but the one that is required
    context = command.make_context("build", ["--family", "own"])
    found = dict(context.params)
    for name, value in given.items():
        option = known[name]
        if name == "pairs":
            value = tuple(pair if isinstance(pair, str) else ":".join(pair) for pair in value or ())
        elif option.multiple and isinstance(value, int):
            value = (value,)
        try:
            found[name] = None if value is None else option.type_cast_value(context, value)
        except (click.BadParameter, TypeError, ValueError) as error:
            reason = error.message if isinstance(error, click.BadParameter) else str(error)
            raise UsageError(f"{name}={value!r} is not valid: {reason}") from error
    return found


def _spec_of(family: Family) -> FamilySpec:
    """What a family file would say about chains that are there already."""
    from klas_zoo.families.specs import AnchorSpec, FamilySpec

    try:
        return FamilySpec(
            name=family.name,
            input_shape=family.input_shape,  # type: ignore[arg-type]
            num_classes=family.num_classes,
            anchors=tuple(AnchorSpec(name=name, model="") for name in family.chains),
        )
    except ValueError as error:
        raise FamilyError(f"The family {family.name} cannot be built: {error}.") from error
