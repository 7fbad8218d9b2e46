"""Engines and builds with invented numbers, for the tests of the registry and of picking."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from klas_zoo.exporters.records import Verification
from klas_zoo.hardware import describe_cpu
from klas_zoo.profiles.records import LatencyRecord
from klas_zoo.registry import Registry
from klas_zoo.registry.records import BuildRecord, NewEngine
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
        "hardware": describe_cpu(),
        "runtime": "onnxruntime",
        "runtime_version": "1.2.3",
        "provider": "CPUExecutionProvider",
        "precision": "fp32",
        "threads": 1,
        "batch": 1,
        "shape": (changes.get("batch", 1), 3, 8, 8),
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


def planned(
    size_bytes: int = 4,
    name: str = "tiny",
    top1: float = 70.0,
    latencies: float | tuple[LatencyRecord, ...] = 1.0,
    **changes: Any,
) -> NewEngine:
    """An engine whose file `register` writes."""
    file = Path("nowhere") / f"{name}.onnx"
    return NewEngine(file=file, size_bytes=size_bytes, **_facts(name, top1, latencies) | changes)


def build(**changes: Any) -> BuildRecord:
    facts: dict[str, Any] = {
        "command": "klas-zoo build deit-micro",
        "settings": {"stitches": 4, "seeds": [1, 2]},
        "versions": {"torch": "9.9"},
        "hardware": describe_cpu(),
        "started_at": "2026-01-02T03:04:05+00:00",
        "finished_at": "2026-01-02T03:14:05+00:00",
    }
    return BuildRecord(**OF_A_BUILD | facts | changes)


def register(registry: Registry, build: BuildRecord, engines: Sequence[NewEngine]) -> int:
    """Registers engines whose files are loose, as those of one package."""
    with tempfile.TemporaryDirectory() as folder:
        package, placed = Path(folder), []
        for one in engines:
            name = one.file.name
            if (package / name).exists():
                name = f"{len(placed)}-{name}"
            if one.file.is_relative_to("nowhere"):
                (package / name).write_bytes(str(one.route).encode())
            else:
                shutil.copyfile(one.file, package / name)
            placed.append(replace(one, file=package / name))
        write_manifest(package)
        return registry.register(build, placed)


def holding(root: Path, *engines: NewEngine) -> Registry:
    """A registry of these engines, a build for each family and device, in a folder that need not be there."""
    registry = Registry.open(root, create=True)
    builds: dict[tuple[str, str, str], list[NewEngine]] = {}
    for one in engines:
        builds.setdefault((one.family, one.device, one.weights), []).append(one)
    for (family, device, weights), members in builds.items():
        register(registry, build(family=family, device=device, weights=weights), members)
    return registry


def write_manifest(package: Path) -> None:
    """What the registry reads of a package's manifest: the list of its files."""
    files = {
        path.name: {"size_bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(package.iterdir())
        if path.name != "manifest.json"
    }
    (package / "manifest.json").write_text(json.dumps({"files": files}, sort_keys=True))


def filled_registry(root: Path) -> Registry:
    """Three engines, each larger and better than the one before: 1, 2 and 3 ms."""
    registry = Registry.open(root, create=True)
    with tempfile.TemporaryDirectory() as folder:
        engines = [
            new_engine(Path(folder) / f"{name}.made-up", name, top1=70.0 + 5 * index, latencies=1.0 + index)
            for index, name in enumerate(("tiny", "small", "base"))
        ]
        register(registry, build(), engines)
    return registry


def store(registry: Registry, content: bytes) -> Path:
    """Puts a package where the registry would store it, unknown to the database; returns its engine."""
    digest = hashlib.sha256(content).hexdigest()
    path = registry.root / "packages" / digest / "engine.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
