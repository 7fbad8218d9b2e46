"""What a build was made from, by whom and how fast: enough to do it again, and to see why another one differs."""

from __future__ import annotations

import platform
import socket
from collections.abc import Iterable
from typing import Any

from klas_zoo.building.context import BuildContext
from klas_zoo.building.pipeline import StageRecord

SCHEMA_VERSION = 1
_OF_A_STAGE = ("started_at", "finished_at", "seconds", "passes", "energy_joules", "checkpoints")


def manifest(context: BuildContext, key: str, stages: Iterable[StageRecord]) -> dict[str, Any]:
    """As JSON can hold it.

    Args:
        key: of the registered result; two builds of one key have the same weights.
        stages: that came before; what was kept has the times of the run that made it.
    """
    family, data, settings = context.family, context.data, context.settings
    return {
        "schema_version": SCHEMA_VERSION,
        "key": key,
        "anchors": {
            name: {"sha256": sha256, "checkpoint": family.checkpoints.get(name)}
            for name, sha256 in family.anchor_fingerprints.items()
        },
        "architecture_sha256": family.architecture,
        "data": {
            "description": data.description,
            "fingerprint": data.fingerprint,
            "train_fingerprint": data.train_fingerprint,
            "test_fingerprint": data.test_fingerprint,
        },
        "seeds": {"build": settings.seed, "selection": settings.selection.seed, "tuning": settings.tuning.seed},
        "machine": {
            "host": socket.gethostname(),
            "system": platform.platform(),
            "device": context.device.hardware,
            "processes": context.team.size,
        },
        "stages": [stage_json(one) for one in stages],
    }


def stage_json(stage: StageRecord) -> dict[str, Any]:
    """Its name, key and timings; energy in joules is null where it was not measured."""
    facts = {name: stage.facts[name] for name in _OF_A_STAGE if name in stage.facts}
    return {"stage": stage.name, "key": stage.key, "status": stage.status, **facts}
