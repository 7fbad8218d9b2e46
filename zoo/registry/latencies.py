"""What is known of an engine's latency: measured by its build or in a profile, or predicted. Imports nothing heavy.

A measured latency always wins over a predicted one, the newer one over the older, and an
interpolation between measurements of the device over a roofline.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from klas_zoo.costs.estimates import estimate, measured
from klas_zoo.profiles.profile import Profile
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.profiles.store import ProfileStore
from klas_zoo.registry.records import EngineRecord


def with_profiles(engines: Sequence[EngineRecord], root: Path) -> list[EngineRecord]:
    """Engines with all that the profiles beside a registry tell of their latencies.

    Raises:
        ProfileError: a stored profile cannot be read.
    """
    if not (root / "profiles").is_dir():
        return list(engines)
    store = ProfileStore.of(root)
    held = {key: store.profiles(*key) for key in {(one.family, one.device) for one in engines}}
    return [replace(one, latencies=known_latencies(one, held[one.family, one.device])) for one in engines]


def known_latencies(engine: EngineRecord, profiles: Iterable[Profile]) -> tuple[LatencyRecord, ...]:
    """The best that is known of an engine, one record for each batch size.

    Args:
        profiles: of the engine's family and device; those of other networks under the same names, with
            another runtime or precision are passed over.
    """
    found: dict[int, list[LatencyRecord]] = {one.batch: [one] for one in engine.latencies}
    for profile in profiles:
        latency = latency_in(profile, engine)
        if latency is not None:
            found.setdefault(profile.batch, []).append(latency)
    return tuple(max(records, key=_rank) for _, records in sorted(found.items()))


def latency_in(profile: Profile, engine: EngineRecord) -> LatencyRecord | None:
    """What one profile tells of an engine; None where it tells nothing."""
    if (profile.runtime, profile.precision, profile.input_shape) != (
        engine.runtime,
        engine.precision,
        engine.input_shape,
    ):
        return None
    network = profile.network(engine.route)
    if network is not None:
        same = (network.macs, network.parameters) == (engine.macs, engine.parameters)
        return measured(profile, network) if same else None
    model = profile.model
    if model is None or not model.covers(engine.route) or model.macs(engine.route) != engine.macs:
        return None
    return estimate(profile, engine.route)


def _rank(latency: LatencyRecord) -> tuple[int, str]:
    return ("roofline", "interpolated", "measured").index(latency.origin), latency.measured_at
