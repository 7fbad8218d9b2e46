"""Latencies of registered engines out of profiles, stored beside those the builds measured. Imports nothing heavy.

A profile holds a few networks that were measured and a model of the rest. Its latencies have their own
conditions (threads, options, clock, hardware): they stand beside a build's, and replace one only where all
conditions are equal.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path

from klas_zoo.cascades.definition import Cascade
from klas_zoo.errors import ProfileError
from klas_zoo.profiles.estimates import estimate, measurements
from klas_zoo.profiles.profile import Profile
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.registry import Registry, rows
from klas_zoo.registry.records import EngineRecord


def apply_profiles(registry: Registry, family: str | None = None, device: str | None = None) -> None:
    """Stores what the profiles beside a registry know of its engines, or of those of one family or device.

    Raises:
        ProfileError: a stored profile cannot be read; the others were applied.
        RegistryError: the registry cannot be written.
    """
    if (registry.root / "profiles").is_dir():
        with registry.changing() as connection:
            damaged = apply_to(connection, registry.root, family, device)
        if damaged:
            raise damaged[0]


def apply_to(
    connection: sqlite3.Connection, root: Path, family: str | None = None, device: str | None = None
) -> list[ProfileError]:
    """The same in an open transaction; returns why profiles were skipped."""
    store, damaged = ProfileStore.of(root), []
    held: dict[tuple[str, str], list[Profile]] = {}
    for path in store.paths(family, device):
        try:
            for profile in store.read(path):
                held.setdefault((profile.family, profile.device), []).append(profile)
        except ProfileError as error:
            damaged.append(error)
    for (name, where), profiles in held.items():
        found = connection.execute(
            f"SELECT engines.*, finished_at, {', '.join(rows.OF_A_BUILD)} FROM engines"
            " JOIN builds ON builds.id = engines.build_id WHERE family = ? AND device = ? AND removed_at IS NULL",
            (name, where),
        ).fetchall()
        for row in found:
            for latency in latencies_in(profiles, rows.read_engine(row, (), root)):
                rows.put_latency(connection, row["id"], latency, from_profile=True)
    return damaged


def latencies_in(profiles: Iterable[Profile], engine: EngineRecord) -> Iterator[LatencyRecord]:
    """The latencies that profiles of an engine's family and device have of it.

    Profiles of other networks under the same names, and those with another runtime or precision, are skipped.
    """
    route = engine.route
    if isinstance(route, Cascade):  # profiles know routes
        return
    for profile in profiles:
        same = (profile.runtime, profile.precision, profile.input_shape)
        if same != (engine.runtime, engine.precision, engine.input_shape):
            continue
        network = profile.network(route)
        if network is not None:
            if (network.macs, network.parameters) == (engine.macs, engine.parameters):
                yield from measurements(profile, network)
            continue
        model = profile.model
        if model is not None and model.covers(route) and model.macs(route) == engine.macs:
            yield estimate(profile, route)
