"""Writes registry-v<n>.sql beside this file: a registry as this version writes it, for the tests of later versions."""

from __future__ import annotations

import sqlite3
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HARDWARE = "an abacus"
sys.path.insert(0, str(HERE.parent))

import made_up  # noqa: E402
import numpy as np  # noqa: E402

from klas_zoo.cascades.definition import Cascade  # noqa: E402
from klas_zoo.cascades.fitting import outcome_of  # noqa: E402
from klas_zoo.cascades.mixture import MixedLatency  # noqa: E402
from klas_zoo.cascades.records import CascadeFacts  # noqa: E402
from klas_zoo.profiles.records import CascadeLatency  # noqa: E402
from klas_zoo.registry import Registry, tags  # noqa: E402
from klas_zoo.registry.records import NewEngine  # noqa: E402
from klas_zoo.registry.schema import SCHEMA_VERSION, version_of  # noqa: E402
from klas_zoo.routes import Route  # noqa: E402


def fill(root: Path) -> None:
    """Two builds of one family and device, one with a cascade, and one of another device; the older one is tagged."""
    registry = Registry.open(root / "registry", create=True)
    old = _build(command="klas-zoo build --family deit-micro", finished_at="2026-01-01T00:00:00+00:00")
    made_up.register(registry, old, [made_up.new_engine(root / "old", "old", 60.0, (_latency(4.0),))])
    engines = [
        made_up.new_engine(root / name, name, 70.0 + 5 * i, (_latency(1.0 + i), _batch_8(5.0 + i)))
        for i, name in enumerate(("tiny", "small", "base"))
    ]
    made_up.register(registry, _build(), [*engines, _cascade(root / "cascades")])
    on_a100 = made_up.new_engine(root / "tiny", "tiny", latencies=(_latency(1.0),), device="a100")
    made_up.register(registry, _build(device="a100"), [on_a100])
    tags.now = lambda: "2026-01-03T00:00:00+00:00"
    tags.move_tag(registry, "deit-micro@prod")
    tags.move_tag(registry, "deit-micro@prod", build_id=1)
    tags.move_tag(registry, "deit-micro@gone")
    tags.delete_tag(registry, "deit-micro@gone")


def _cascade(file: Path) -> NewEngine:
    """1 ms where tiny answers, 4 ms for the fifth of the images that base answers."""
    form = "tiny ?p(T=1.5)<0.8 | base"
    cascade = Cascade.parse(form, lambda name: Route.anchor(name, 4))
    seen = outcome_of((np.arange(500) < 100).astype(int), 395, 2)
    mixed = MixedLatency.of([np.full(100, 1.0), np.full(100, 4.0)], seen.shares)
    latency = CascadeLatency(**{**vars(_latency(1.0)), **vars(mixed)})
    facts = CascadeFacts(heldout=seen, test=seen)
    return made_up.new_engine(file, "cascades", seen.top1, (latency,), route=cascade, cascade=facts, images=500)


def _build(**changes: Any) -> made_up.BuildRecord:
    return made_up.build(hardware=HARDWARE, **changes)


def _latency(p50_ms: float, **changes: Any) -> made_up.LatencyRecord:
    return made_up.latency(p50_ms, hardware=HARDWARE, **changes)


def _batch_8(p50_ms: float) -> made_up.LatencyRecord:
    return _latency(p50_ms, batch=8, shape=(8, 3, 8, 8))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        fill(Path(folder))
        with closing(sqlite3.connect(Path(folder) / "registry" / "registry.sqlite")) as connection:
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            lines = [
                f"-- A registry as version {SCHEMA_VERSION} of the schema wrote it.",
                "PRAGMA journal_mode = WAL;",
                f"PRAGMA application_id = {application};",
                f"PRAGMA user_version = {version_of(connection)};",
                *connection.iterdump(),
            ]
    (HERE / f"registry-v{SCHEMA_VERSION}.sql").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
