"""The settings of a build, and those of them that determine results."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from klas_zoo.errors import UsageError
from klas_zoo.selection.candidates import SelectionSettings
from klas_zoo.selection.probes import ProbeSettings
from klas_zoo.tuning.settings import PRESETS, TuningSettings

LARGEST_SEED = 2**63 - 1
"""What torch's and numpy's generators take."""


@dataclass(frozen=True, kw_only=True)
class BuildSettings:
    """Everything that determines a build, besides the family, the images and the device.

    `batch` is the number of images per forward pass outside tuning, `latency_batches` the batch
    sizes each engine is timed at, `threads` those of the runtime (None: one for each physical core),
    `precisions` and `runtimes` what engines are made in (None: what pays on the device).
    `opset` is the newest whose operators graphs may use (None: as old as possible for CPUs, 23 for GPUs).
    `shipped` takes the tuned supernet that comes with the family instead of selecting and tuning stitches.
    `cascades` fits cascades of the engines on held-out images, and registers them with the engines.
    `workers` and `checkpoint_s`, the seconds between two checkpoints, change no result. The defaults are those of
    `klas-zoo build` with the preset `quick`; `tuning` has a seed of its own.

    Raises:
        UsageError: a number is negative, not finite, or beyond what generators take.
    """

    probes: ProbeSettings = field(default_factory=ProbeSettings)
    selection: SelectionSettings = field(default_factory=SelectionSettings)
    tuning: TuningSettings = field(default_factory=lambda: PRESETS["quick"])
    batch: int = 100
    latency_batches: tuple[int, ...] = (1,)
    threads: int | None = None
    workers: int = 0
    seed: int = 0
    checkpoint_s: float = 60.0
    precisions: tuple[str, ...] | None = None
    runtimes: tuple[str, ...] | None = None
    opset: int | None = None
    shipped: bool = False
    cascades: bool = True

    def __post_init__(self) -> None:
        for name, value in _numbers(self):
            if not math.isfinite(value) or value < 0:
                raise UsageError(f"{name} must be a number from 0 on, not {value}.")
            if name.endswith("seed") and value > LARGEST_SEED:
                raise UsageError(f"{name} must be at most {LARGEST_SEED}, not {value}.")
        if self.batch < 1 or not self.latency_batches:
            raise UsageError("batch must be 1 or more, and latency_batches must name a size.")


def _numbers(settings: Any, within: str = "") -> Iterator[tuple[str, float]]:
    """Every number of settings and of the settings in them, by its name."""
    for one in fields(settings):
        value = getattr(settings, one.name)
        if is_dataclass(value):
            yield from _numbers(value, f"{within}{one.name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{within}{one.name}", value


def plain(value: Any) -> Any:
    """Settings as JSON can hold them."""
    if hasattr(value, "__dataclass_fields__"):
        return plain(asdict(value))
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
