"""Engines and builds that nobody made, for the tests of the registry and of picking."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klas_zoo.exporters.records import Verification
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.registry import Registry
from klas_zoo.registry.records import BuildRecord, EngineRecord, NewEngine
from klas_zoo.routes import Route

OF_A_BUILD: dict[str, Any] = {
    "family": "deit-micro",
    "device": "cpu",
    "weights": "pretrained",
    "dataset": "50 images of clouds",
    "data_fingerprint": "c10d5",
}


def verification(**changes: Any) -> Verification:
    facts: dict[str, Any] = {
        "images": 50,
        "max_abs_difference": 1e-5,
        "top1_agreement": 1.0,
        "tolerance": 1e-3,
        "min_agreement": 0.99,
    }
    return Verification(**facts | changes)


def latency(p50_ms: float = 1.0, **changes: Any) -> LatencyRecord:
    facts: dict[str, Any] = {
        "device": "cpu",
        "hardware": "an abacus",
        "runtime": "onnxruntime",
        "runtime_version": "1.2.3",
        "provider": "CPUExecutionProvider",
        "precision": "fp32",
        "threads": 1,
        "batch": 1,
        "shape": (1, 3, 8, 8),
        "runs": 30,
        "min_ms": p50_ms * 0.9,
        "p50_ms": p50_ms,
        "p90_ms": p50_ms * 1.1,
        "p99_ms": p50_ms * 1.5,
        "coefficient_of_variation": 0.02,
        "origin": "measured",
        "measured_at": "2026-01-02T03:04:05+00:00",
    }
    return LatencyRecord(**facts | changes)


def _facts(name: str, top1: float, latencies: float | tuple[LatencyRecord, ...]) -> dict[str, Any]:
    return OF_A_BUILD | {
        "route": Route.anchor(name, 4),
        "runtime": "onnxruntime",
        "precision": "fp32",
        "macs": 1_000_000,
        "parameters": 5_000,
        "top1": top1,
        "images": 50,
        "input_shape": (3, 8, 8),
        "verification": verification(),
        "latencies": latencies if isinstance(latencies, tuple) else (latency(latencies),),
    }


def new_engine(
    file: Path,
    name: str = "tiny",
    top1: float = 70.0,
    latencies: float | tuple[LatencyRecord, ...] = 1.0,
    **changes: Any,
) -> NewEngine:
    """An engine whose file is `file`; when that is missing, the engine's name is written to it."""
    if not file.exists():
        file.write_bytes(name.encode())
    return NewEngine(file=file, **_facts(name, top1, latencies) | changes)


def engine(
    path: Path,
    name: str = "tiny",
    top1: float = 70.0,
    latencies: float | tuple[LatencyRecord, ...] = 1.0,
    **changes: Any,
) -> EngineRecord:
    """A registered engine that no registry knows; `path` has to be there."""
    of_file = {"path": path, "sha256": "0" * 64, "size_bytes": path.stat().st_size}
    of_build = {"build_id": 1, "built_at": "2026-01-02T03:04:05+00:00"}
    return EngineRecord(**_facts(name, top1, latencies) | of_file | of_build | changes)


def build(**changes: Any) -> BuildRecord:
    facts: dict[str, Any] = {
        "command": "klas-zoo build deit-micro",
        "settings": {"stitches": 4, "seeds": [1, 2]},
        "versions": {"torch": "9.9"},
        "hardware": "an abacus",
        "started_at": "2026-01-02T03:04:05+00:00",
        "finished_at": "2026-01-02T03:14:05+00:00",
    }
    return BuildRecord(**OF_A_BUILD | facts | changes)


@dataclass(frozen=True)
class FixedRegistry(Registry):
    """Holds what it is told to hold, without a disk."""

    held: tuple[EngineRecord, ...] = ()

    def engines(self, family: str | None = None, device: str | None = None) -> list[EngineRecord]:
        return [e for e in self.held if family in (None, e.family) and device in (None, e.device)]


def filled_registry(root: Path) -> Registry:
    """Three engines, each dearer and better than the one before: 1, 2 and 3 ms."""
    registry = Registry.open(root, create=True)
    engines = [
        new_engine(root / f"{name}.made-up", name, top1=70.0 + 5 * index, latencies=1.0 + index)
        for index, name in enumerate(("tiny", "small", "base"))
    ]
    registry.register(build(), engines)
    return registry


def store(registry: Registry, content: bytes) -> Path:
    """Puts a file where the registry would keep it, and tells the database nothing of it."""
    path = registry.path_of(hashlib.sha256(content).hexdigest())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
