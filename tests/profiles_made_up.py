"""Profiles that nobody measured, for tests."""

from __future__ import annotations

from typing import Any

from klas_zoo.profiles.profile import (
    AnchorModel,
    LatencyModel,
    MeasuredNetwork,
    PredictionError,
    Profile,
    Statistics,
)
from klas_zoo.routes import Route


def statistics(p50_ms: float = 1.0, **changes: Any) -> Statistics:
    p50_ms = round(p50_ms, 4)
    facts: dict[str, Any] = {
        "runs": 60,
        "min_ms": round(0.9 * p50_ms, 4),
        "p50_ms": p50_ms,
        "p90_ms": round(1.1 * p50_ms, 4),
        "p95_ms": round(1.2 * p50_ms, 4),
        "p99_ms": round(1.5 * p50_ms, 4),
        "coefficient_of_variation": 0.02,
    }
    return Statistics(**facts | changes)


def anchor_model(block_ms: float = 1.0, depth: int = 4, width: int = 8) -> AnchorModel:
    return AnchorModel(
        stem_ms=0.25,
        block_ms=(block_ms,) * depth,
        head_ms=0.125,
        stem_macs=1_000,
        block_macs=(10_000,) * depth,
        head_macs=500,
        vectors=(16,) * (depth + 1),
        widths=(width,) * (depth + 1),
    )


def latency_model(**changes: Any) -> LatencyModel:
    facts: dict[str, Any] = {
        "anchors": {"tiny": anchor_model(1.0, width=8), "base": anchor_model(4.0, width=16)},
        "seam_ms": 0.5,
        "seam_ms_per_gmac": {"tiny": 100.0, "base": 100.0},
        "error": PredictionError(
            checked=5, median_percent=1.0, p90_percent=2.5, largest_percent=3.0, method="made up"
        ),
    }
    return LatencyModel(**facts | changes)


def network(route: Route, p50_ms: float = 1.0, model: LatencyModel | None = None, **changes: Any) -> MeasuredNetwork:
    macs = (model or latency_model()).macs(route)
    facts: dict[str, Any] = {"route": route, "macs": macs, "parameters": 5_000, "latency": statistics(p50_ms)}
    return MeasuredNetwork(**facts | changes)


def profile(**changes: Any) -> Profile:
    model = latency_model()
    facts: dict[str, Any] = {
        "family": "toy",
        "family_sha256": "f" * 64,
        "input_shape": (3, 8, 8),
        "device": "cpu",
        "hardware": "an abacus",
        "kind": "cpu",
        "compute_capability": None,
        "runtime": "onnxruntime",
        "runtime_version": "1.2.3",
        "provider": "CPUExecutionProvider",
        "precision": "fp32",
        "batch": 1,
        "threads": 1,
        "origin": "measured",
        "measured_at": "2026-01-02T03:04:05+00:00",
        "networks": tuple(
            network(route, model.predict_ms(route))
            for route in (
                Route.anchor("tiny", 4),
                Route.anchor("base", 4),
                Route.stitch("tiny", 2, "base", 2, 4),
            )
        ),
        "model": model,
        "options": {},
        "method": {"rounds": 3},
        "conditions": {"load_before": 0.1},
        "versions": {"python": "3.11"},
    }
    return Profile(**facts | changes)
