"""Tags: names such as `deit@prod` for builds of a family, one for each device and machine; they move in one step.

A tag points, on each device, to the builds of its newest operation. Moves are never changed, so that they are the
tag's history too; they are ordered by their number, because clocks go backwards.
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
POINTS = """
    SELECT tag_moves.family, tag, tag_moves.device, build_id FROM tag_moves JOIN (
        SELECT family, tag, device, max(operation) AS operation FROM tag_moves GROUP BY family, tag, device
    ) USING (family, tag, device, operation) WHERE build_id IS NOT NULL
"""
"""Where each tag points now: rows of `family`, `tag`, `device`, `build_id`."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One move of a tag on one device; `build_id` is None where the tag was deleted.

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
    """A condition on `builds` in SQL and its parameters: the current builds, or those a tag points to.

    Raises:
        UnknownName: there is no such tag.
        AbsentDevice: see `registered_device`.
    """
    names: dict[str, object] = {
        "family": storable(family), "device": storable(registered_device(connection, device)),
    }  # fmt: skip
    which = "builds.current"
    if family is not None and "@" in family:
        names["family"], _, names["tag"] = (storable(family) or "").partition("@")
        points = connection.execute(POINTS).fetchall()
        known = {f"{point['family']}@{point['tag']}" for point in points}
        if family not in known:
            raise UnknownName("tag", family, known, "A tag is set with klas-zoo registry tag.")
        which = f"builds.id IN (SELECT build_id FROM ({POINTS}) AS points WHERE points.tag = :tag)"
    return (
        f"{which} AND (:family IS NULL OR builds.family = :family) AND (:device IS NULL OR builds.device = :device)",
        names,
    )


def registered_device(connection: sqlite3.Connection, device: str | None) -> str | None:
    """The name under which a device is registered: as it is, of what it is an alias, or of the GPU here for `cuda`.

    Raises:
        AbsentDevice: `cuda` on a machine without a GPU.
    """
    if device is None:
        return None
    if connection.execute("SELECT 1 FROM builds WHERE device = ? LIMIT 1", (storable(device),)).fetchone():
        return device
    from klas_zoo.profiles.devices import device_name  # not at the top: a pick seldom needs it

    return device_name(device)


def storable(name: str | None) -> str | None:
    """A name as SQLite takes it: without half a surrogate pair, which no registered name has."""
    return name.encode(errors="replace").decode() if name is not None else None


def tags_of_builds(connection: sqlite3.Connection) -> dict[int, tuple[str, ...]]:
    """The tags that point to each build."""
    found: dict[int, tuple[str, ...]] = {}
    for point in connection.execute(f"{POINTS} ORDER BY family, tag"):
        name = f"{point['family']}@{point['tag']}"
        found[point["build_id"]] = (*found.get(point["build_id"], ()), name)
    return found


def move_tag(
    registry: Registry, name: str, *, device: str | None = None, build_id: int | None = None
) -> list[Move]:
    """Points a tag at a build, or at the current builds of its family; all of its devices at once.

    Builds of other machines that the tag pointed to stay tagged, unless they are replaced by one of their machine.

    Args:
        name: `deit@prod`; it need not exist yet.
        device: only this one's current builds; other devices keep what the tag points to.
        build_id: this build instead of the current ones.

    Raises:
        UsageError: no such name, build or device; or a build of another family, or without engines.
        RegistryError: the registry cannot be written.
    """
    family, tag = _parsed(name)
    with registry.changing() as connection:
        device = registered_device(connection, device)
        if build_id is not None:
            builds = [_build(connection, build_id, family, device)]
        else:
            builds = connection.execute(
                "SELECT id, device, hardware FROM builds WHERE family = ? AND current AND (? IS NULL OR device = ?)"
                " ORDER BY device, id",
                (family, device, device),
            ).fetchall()
            if not builds:
                raise _no_build(connection, family, device)
        replaced = {(build["device"], machine_of(build["hardware"])) for build in builds}
        devices = {build["device"] for build in builds}
        kept = [
            build
            for build in _pointed_to(connection, family, tag)
            if build["device"] in devices and (build["device"], machine_of(build["hardware"])) not in replaced
        ]
        operation = _next_operation(connection)
        for build in kept:
            _insert(connection, operation, family, tag, build["device"], build["id"])
        moves = [_insert(connection, operation, family, tag, build["device"], build["id"]) for build in builds]
        return [_read(connection, number) for number in moves]


def delete_tag(registry: Registry, name: str, *, device: str | None = None) -> list[Move]:
    """Deletes a tag, on one device or on all; its history stays.

    Raises:
        UnknownName: there is no such tag, or not on that device.
        RegistryError: the registry cannot be written.
    """
    family, tag = _parsed(name)
    with registry.changing() as connection:
        device = registered_device(connection, device)
        points = connection.execute(POINTS).fetchall()
        devices = sorted({p["device"] for p in points if (p["family"], p["tag"]) == (family, tag)})
        if not devices:
            raise UnknownName("tag", name, {f"{p['family']}@{p['tag']}" for p in points})
        if device is not None and device not in devices:
            raise UnknownName(f"device of {name}", device, devices)
        operation = _next_operation(connection)
        moves = [_insert(connection, operation, family, tag, one, None) for one in devices if device in (None, one)]
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
            f"'{name[:140]}' is not a tag: write FAMILY@NAME, such as deit@prod, of letters, digits, - and _."
        )
    return family, tag


def _build(connection: sqlite3.Connection, build_id: int, family: str, device: str | None) -> sqlite3.Row:
    row: sqlite3.Row | None = connection.execute(
        "SELECT id, family, device, hardware, removed_at FROM builds WHERE id = ?", (build_id,)
    ).fetchone()
    if row is None:
        raise UsageError(f"There is no build {build_id}: klas-zoo registry builds lists them.")
    if row["family"] != family or device not in (None, row["device"]):
        raise UsageError(
            f"Build {build_id} is of {row['family']} for {row['device']}: pass that name, or another build."
        )
    if row["removed_at"] is not None:
        raise UsageError(f"The engines of build {build_id} were removed ({row['removed_at']}): pass another build.")
    return row


def _no_build(connection: sqlite3.Connection, family: str, device: str | None) -> UsageError:
    current = connection.execute("SELECT family, device FROM builds WHERE current").fetchall()
    families = {row["family"] for row in current}
    if family not in families:
        return UnknownName("family", family, families, "A tag is FAMILY@NAME; the family has to be registered.")
    return UnknownName("device", str(device), {row["device"] for row in current if row["family"] == family})


def machine_of(hardware: str) -> str:
    """A description of hardware without its driver, which is updated."""
    return hardware.partition(", driver ")[0]


def _pointed_to(connection: sqlite3.Connection, family: str, tag: str) -> list[sqlite3.Row]:
    return connection.execute(
        f"SELECT builds.id, builds.device, hardware FROM builds JOIN ({POINTS}) AS points ON build_id = builds.id"
        " WHERE points.family = ? AND points.tag = ? ORDER BY builds.id",
        (family, tag),
    ).fetchall()


def _next_operation(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(operation), 0) + 1 FROM tag_moves").fetchone()[0])


def _insert(
    connection: sqlite3.Connection, operation: int, family: str, tag: str, device: str, build_id: int | None
) -> int:
    number = connection.execute(
        "INSERT INTO tag_moves (family, tag, device, build_id, moved_at, operation) VALUES (?, ?, ?, ?, ?, ?)",
        (family, tag, device, build_id, now(), operation),
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
