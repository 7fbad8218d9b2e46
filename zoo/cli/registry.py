"""`klas-zoo registry …`: maintenance of what is registered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klas_zoo.cli.options import Number, json_option, registry_option
from klas_zoo.cli.output import say, say_json

if TYPE_CHECKING:
    from klas_zoo.registry.tags import Move


@click.group()
def registry() -> None:
    """Check, clean up and tag what is registered."""


@registry.command()
@registry_option
@json_option
def builds(registry: Path | None, as_json: bool) -> None:
    """Show every build, with its number, its tags and whether it is current."""
    from klas_zoo.registry import Registry, upkeep
    from klas_zoo.units import format_size

    found = upkeep.builds(Registry.open(registry, create=False))
    if as_json:
        say_json([one.to_json() for one in found])
        return
    _table(
        "Builds",
        ("build", "family", "device", "done", "engines", "size", "tags", "state"),
        [
            (one.number, one.family, one.device, one.finished_at[:16].replace("T", " "), one.engines, format_size(one.size_bytes),
             " ".join(one.tags), "removed" if one.removed_at else "current" if one.current else "")
            for one in found
        ],
    )  # fmt: skip


@registry.command()
@click.option("--sizes-only", is_flag=True, help="Compare files with their sizes, not with their SHA-256.")
@registry_option
@json_option
def check(sizes_only: bool, registry: Path | None, as_json: bool) -> None:
    """Check every row and every file; exit 1 if any is damaged.

    Files that no build refers to are listed too, but are harmless: a build that was killed leaves some.
    """
    from klas_zoo.registry import Registry, checking
    from klas_zoo.units import format_size

    place = Registry.open(registry, create=False)
    checked: list[object] = []
    findings = checking.check(place, content=not sizes_only, on_engine=checked.append)
    damage = [one for one in findings if not one.harmless]
    if as_json:
        say_json({"engines": len(checked), "findings": [one.to_json() for one in findings]})
    else:
        for one in findings:
            where = f": {one.path} ({format_size(one.size_bytes)})" if one.path and one.harmless else ""
            say(f"{one.kind:10s} {one.what}{where}")
        # which refuses to delete anything while something is damaged
        advice = " klas-zoo registry gc deletes those." if findings and not damage else ""
        say(
            f"{len(checked)} engines checked: {len(damage)} damaged, dangling, unreadable or unverified; "
            f"{len(findings) - len(damage)} not needed.{advice}"
        )
    if damage:
        click.get_current_context().exit(1)


@registry.command()
@click.option("--old-builds", is_flag=True, help="First remove the builds that are neither current nor tagged.")
@click.option("--cache-unused", "unused_days", type=Number(min=0), metavar="DAYS", help="Also delete results of stages that no registered build was made from and that were not used for this many days; refused while a build runs.")
@click.option("--dry-run", is_flag=True, help="Only print what would be done.")
@registry_option
@json_option
def gc(old_builds: bool, unused_days: float | None, dry_run: bool, registry: Path | None, as_json: bool) -> None:
    """Delete files and packages that no build refers to; refused while something is damaged."""
    from klas_zoo.building.cache import Cache
    from klas_zoo.registry import Registry, upkeep
    from klas_zoo.units import format_size

    place = Registry.open(registry, create=False)
    removed, files = upkeep.collect(place, old_builds=old_builds, dry_run=dry_run)
    gone = {one.number for one in removed}
    unused = [] if unused_days is None else Cache(place.root / "cache").collect(
        lambda: upkeep.results_of_builds(place, but_not=gone), unused_s=unused_days * 86_400, dry_run=dry_run
    )  # fmt: skip
    size_bytes = sum(one.size_bytes for one in files) + sum(one.size_bytes for one in unused)
    if as_json:
        say_json(
            {"builds": [one.number for one in removed], "files": [str(one.path) for one in files],
             "results": [f"{one.stage}/{one.key}" for one in unused], "size_bytes": size_bytes, "dry_run": dry_run}
        )  # fmt: skip
        return
    would = "would be " if dry_run else ""
    for build in removed:
        say(f"build {build.number} of {build.family} for {build.device} {would}removed")
    for one in files:
        say(f"{one.path} {would}deleted")
    for result in unused:
        say(f"{result.stage} {result.key} of cache {would}deleted")
    counted = f"{len(files)} files and packages" + ("" if unused_days is None else f" and {len(unused)} results of stages")
    say(f"{counted}, {format_size(size_bytes)}, {would}deleted.")


@registry.command()
@click.argument("build_or_family")
@click.option("--device", help="Only of this one.")
@registry_option
@json_option
def remove(build_or_family: str, device: str | None, registry: Path | None, as_json: bool) -> None:
    """Remove a build by its number, or all builds of a family.

    Refused while a tag points to one of them. Files stay until klas-zoo registry gc.
    """
    from klas_zoo.registry import Registry, upkeep

    removed = upkeep.remove(Registry.open(registry, create=False), build_or_family, device=device)
    if as_json:
        say_json([one.to_json() for one in removed])
        return
    for one in removed:
        say(f"Removed build {one.number} of {one.family} for {one.device}: {one.engines} engines.")


@registry.command()
@click.argument("name", metavar="FAMILY@NAME")
@click.option("--device", help="Only on this one. Default: all that the family has a current build for.")
@click.option("--build", "build_id", type=click.IntRange(min=1, max=2**62), help="Point it at this build. Default: the current ones.")
@click.option("--delete", is_flag=True, help="Delete the tag; its history stays.")
@registry_option
@json_option
def tag(
    name: str, device: str | None, build_id: int | None, delete: bool, registry: Path | None, as_json: bool
) -> None:
    """Point a name such as deit@prod at builds, all devices in one step.

    The name is then a family for klas-zoo pick and list, whatever is built later.
    """
    from klas_zoo.errors import UsageError
    from klas_zoo.registry import Registry, tags

    if delete and build_id is not None:
        raise UsageError("--delete and --build contradict each other: pass one.")
    place = Registry.open(registry, create=False)
    if delete:
        moves = tags.delete_tag(place, name, device=device)
    else:
        moves = tags.move_tag(place, name, device=device, build_id=build_id)
    _show_moves(moves, as_json)


@registry.command()
@click.argument("name", metavar="FAMILY@NAME", required=False)
@registry_option
@json_option
def history(name: str | None, registry: Path | None, as_json: bool) -> None:
    """Show what a tag, or every tag, pointed to, the newest first."""
    from klas_zoo.registry import Registry, tags

    _show_moves(tags.history(Registry.open(registry, create=False), name), as_json)


def _show_moves(moves: Sequence[Move], as_json: bool) -> None:
    if as_json:
        say_json([move.to_json() for move in moves])
        return
    for move in moves:
        to = "deleted"
        if move.build_id is not None:
            to = f"build {move.build_id}, done {move.built_at}{' (removed since)' if move.removed else ''}"
        say(f"{move.moved_at}  {move.name} on {move.device}: {to}")
    if not moves:
        say("No tags yet: klas-zoo registry tag FAMILY@NAME sets one.")


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from klas_zoo.progress.tables import Column, new_table, show

    columns = [Column(heading=heading, name=heading in ("family", "device", "tags")) for heading in headings]
    show(new_table(title, columns, [([str(cell) for cell in row], "") for row in rows]))
