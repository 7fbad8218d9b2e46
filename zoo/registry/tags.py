"""Tags: names such as `deit@prod` for builds of a family, one for each device; they move in one step.

Where a tag points is told by its newest move. Moves are never changed, so that they are the tag's
history too; they are ordered by their number, because clocks go backwards.
"""

from __future__ import annotations

import re
import sqlite3
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from klas_zoo.errors import UnknownName, UsageError

if TYPE_CHECKING:
    from klas_zoo.registry import Registry

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# where each tag points now; a name that nobody took away
_POINTS = """
    SELECT family, tag, device, build_id FROM tag_moves
    WHERE id IN (SELECT max(id) FROM tag_moves GROUP BY family, tag, device) AND build_id IS NOT NULL
"""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move of a tag on one device; `build_id` is None where the tag was taken away.

    Attributes:
        built_at: when that build was done.
        removed: whether its engines were removed since.
    """

    number: int
    name: str
    device: str
    build_id: int | None
    moved_at: str
    built_at: str | None
    removed: bool

    def to_json(self) -> dict[str, object]:
        return asdict(self)


def builds_of(
    connection: sqlite3.Connection, family: str | None, device: str | None
) -> tuple[str, dict[str, object]]:
    """A condition on `builds` in SQL, with its parameters: the current ones, or those a tag points to.

    Raises:
        UnknownName: there is no such tag.
    """
    names: dict[str, object] = {"family": family, "device": device}
    which = "builds.current"
    if family is not None and "@" in family:
        names["family"], _, names["tag"] = family.partition("@")
        points = connection.execute(_POINTS).fetchall()
        known = {f"{point['family']}@{point['tag']}" for point in points}
        if family not in known:
            raise UnknownName("tag", family, known, "A tag is set with klas-zoo registry tag.")
        which = f"builds.id IN (SELECT build_id FROM ({_POINTS}) AS points WHERE points.tag = :tag)"
    return (
        f"{which} AND (:family IS NULL OR builds.family = :family) AND (:device IS NULL OR builds.device = :device)",
        names,
    )


def tags_of_builds(connection: sqlite3.Connection) -> dict[int, tuple[str, ...]]:
    """The tags that point to each build."""
    found: dict[int, tuple[str, ...]] = {}
    for point in connection.execute(f"{_POINTS} ORDER BY family, tag"):
        name = f"{point['family']}@{point['tag']}"
        found[point["build_id"]] = (*found.get(point["build_id"], ()), name)
    return found


def move_tag(
    registry: Registry, name: str, *, device: str | None = None, build_id: int | None = None
) -> list[Move]:
    """Points a tag at a build, or at the current builds of its family; all of its devices at once.

    Args:
        name: `deit@prod`; it need not be there yet.
        device: only this one's current build; other devices keep what the tag points to.
        build_id: this build instead of a current one.

    Raises:
        UsageError: no such name, build or device; or a build of another family, or without engines.
        RegistryError: the registry cannot be written.
    """
    family, tag = _parsed(name)
    with registry.changing() as connection:
        if build_id is not None:
            builds = [_build(connection, build_id, family, device)]
        else:
            builds = connection.execute(
                "SELECT id, device FROM builds WHERE family = ? AND current AND (? IS NULL OR device = ?)"
                " ORDER BY device",
                (family, device, device),
            ).fetchall()
            if not builds:
                raise _no_build(connection, family, device)
        moves = [_insert(connection, family, tag, build["device"], build["id"]) for build in builds]
        return [_read(connection, number) for number in moves]


def delete_tag(registry: Registry, name: str, *, device: str | None = None) -> list[Move]:
    """Takes a tag away, from one device or from all; its history stays.

    Raises:
        UnknownName: there is no such tag, or not on that device.
        RegistryError: the registry cannot be written.
    """
    family, tag = _parsed(name)
    with registry.changing() as connection:
        points = connection.execute(_POINTS).fetchall()
        devices = sorted(p["device"] for p in points if (p["family"], p["tag"]) == (family, tag))
        if not devices:
            raise UnknownName("tag", name, {f"{p['family']}@{p['tag']}" for p in points})
        if device is not None and device not in devices:
            raise UnknownName(f"device of {name}", device, devices)
        moves = [_insert(connection, family, tag, one, None) for one in devices if device in (None, one)]
        return [_read(connection, number) for number in moves]


def history(registry: Registry, name: str | None = None) -> list[Move]:
    """Every move of a tag, or of all tags; the newest first.

    Raises:
        UnknownName: no such tag was ever set.
        RegistryError: the registry cannot be read.
    """
    with registry.reading() as connection:
        moves = [_move(row) for row in connection.execute(f"{_MOVES} ORDER BY tag_moves.id DESC")]
    found = [move for move in moves if name in (None, move.name)]
    if name is not None and not found:
        raise UnknownName("tag", name, {move.name for move in moves}, "A tag is set with klas-zoo registry tag.")
    return found


_MOVES = """
    SELECT tag_moves.*, builds.finished_at, builds.removed_at
    FROM tag_moves LEFT JOIN builds ON builds.id = tag_moves.build_id
"""


def _parsed(name: str) -> tuple[str, str]:
    from klas_zoo.families.specs import NAME  # not at the top: picking only looks names up

    family, at, tag = name.partition("@")
    if not at or not NAME.fullmatch(family) or not _TAG.fullmatch(tag):
        raise UsageError(
            f"'{name[:140]}' is no tag: write FAMILY@NAME, such as deit@prod, of letters, digits, - and _."
        )
    return family, tag


def _build(connection: sqlite3.Connection, build_id: int, family: str, device: str | None) -> sqlite3.Row:
    row: sqlite3.Row | None = connection.execute(
        "SELECT id, family, device, removed_at FROM builds WHERE id = ?", (build_id,)
    ).fetchone()
    if row is None:
        raise UsageError(f"There is no build {build_id}: klas-zoo registry builds shows those there are.")
    if row["family"] != family or device not in (None, row["device"]):
        raise UsageError(f"Build {build_id} is of {row['family']} for {row['device']}: name it so, or another build.")
    if row["removed_at"] is not None:
        raise UsageError(f"The engines of build {build_id} were removed ({row['removed_at']}): name another build.")
    return row


def _no_build(connection: sqlite3.Connection, family: str, device: str | None) -> UsageError:
    current = connection.execute("SELECT family, device FROM builds WHERE current").fetchall()
    families = {row["family"] for row in current}
    if family not in families:
        return UnknownName("family", family, families, "A tag is FAMILY@NAME; the family has to be registered.")
    return UnknownName("device", str(device), {row["device"] for row in current if row["family"] == family})


def _insert(connection: sqlite3.Connection, family: str, tag: str, device: str, build_id: int | None) -> int:
    number = connection.execute(
        "INSERT INTO tag_moves (family, tag, device, build_id, moved_at) VALUES (?, ?, ?, ?, ?)",
        (family, tag, device, build_id, now()),
    ).lastrowid
    assert number is not None
    return number


def _read(connection: sqlite3.Connection, number: int) -> Move:
    return _move(connection.execute(f"{_MOVES} WHERE tag_moves.id = ?", (number,)).fetchone())


def _move(row: sqlite3.Row) -> Move:
    return Move(
        number=row["id"],
        name=f"{row['family']}@{row['tag']}",
        device=row["device"],
        build_id=row["build_id"],
        moved_at=row["moved_at"],
        built_at=row["finished_at"],
        removed=row["removed_at"] is not None,
    )


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
