"""Stages of a visit to a GPU, in order of value. Each is a function of a `Visit` and can be run again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gpu.card import device, memory
from gpu.elastic import elastic
from gpu.jobs import build, profiles, tuning
from gpu.latencies import compiled_latency, family_latency, onnx_latency, torch_latency
from gpu.opening import partition
from gpu.visit import Visit as Visit

STAGES: Mapping[str, Callable[[Visit], None]] = {
    "device": device, "partition": partition, "onnx": onnx_latency, "profiles": profiles, "build": build,
    "families": family_latency, "elastic": elastic, "memory": memory, "torch": torch_latency,
    "compile": compiled_latency, "tuning": tuning,
}  # fmt: skip
