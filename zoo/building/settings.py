"""What a build can be told, and the parts of it that determine results."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klas_zoo.selection.candidates import SelectionSettings
from klas_zoo.selection.probes import ProbeSettings
from klas_zoo.tuning.settings import TuningSettings


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Everything that determines a build, besides the family, the images and the device.

    `batch` is the number of images per forward pass outside tuning, `latency_batches` the batch
    sizes each engine is timed at, `threads` those of onnxruntime (None: one for each physical core).
    `workers` and `checkpoint_s`, the seconds between two checkpoints, change no result.
    """

    probes: ProbeSettings
    selection: SelectionSettings
    tuning: TuningSettings
    batch: int
    latency_batches: tuple[int, ...]
    threads: int | None
    workers: int
    seed: int
    checkpoint_s: float = 60.0


def plain(value: Any) -> Any:
    """Settings as JSON can hold them."""
    if hasattr(value, "__dataclass_fields__"):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
