"""A cascade in one process: batches go from stage to stage, and only the images that a stage is unsure of go on.

Counts say how many images each stage has answered. The share that goes on was fitted on held-out images; where the
shares of the last images are not compatible with it, images have changed, and so have mean latency and accuracy.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from klas_zoo.cascades.calibration import confidence
from klas_zoo.cascades.definition import Cascade
from klas_zoo.cascades.records import Interval as Interval
from klas_zoo.confidence import lower_share, upper_share
from klas_zoo.errors import UsageError
from klas_zoo.exporters.cascade_graphs import cascade_graphs
from klas_zoo.runtimes import CPU_PROVIDER
from klas_zoo.runtimes.ort import OnnxGraph

DRIFT_LEVEL = 0.999
"""Of the one-sided bounds of the observed share that have to lie outside of the expected interval."""
_WINDOW = 1_000  # images
_LEAST = 200  # images before anything is said
_CHECK_EVERY = 50  # images


class DriftWarning(UserWarning):
    """Images are others than those that thresholds were fitted on."""


@dataclass(frozen=True, kw_only=True)
class CascadeCounters:
    """What a cascade did so far.

    Attributes:
        images: answered by each stage.
        milliseconds: that each stage has computed, confidence and selection of images included.
        recent: of the last thousand images, the share that goes on behind each stage but the last; NaN before there
            is one.
        expected: the interval of that share by held-out images; empty where it is not known.
        drifted: stages, from 0, whose recent share is not compatible with the expected one.
    """

    images: tuple[int, ...]
    milliseconds: tuple[float, ...]
    recent: tuple[float, ...]
    expected: tuple[Interval, ...] = ()
    drifted: tuple[int, ...] = field(default=())

    @property
    def escalated(self) -> tuple[float, ...]:
        """Of all images so far, the share that goes on behind each stage but the last."""
        total = max(1, sum(self.images))
        return tuple(sum(self.images[stage + 1 :]) / total for stage in range(len(self.images) - 1))


class CascadeRunner:
    """Runs one cascade of a package's ONNX engines. Safe to use from many threads.

    Args:
        engines: the content of each route's file by its name.
        folder: of the weights they read.
        expected: intervals of the shares that go on, one for each stage but the last, as
            `FittedCascade.heldout.escalated_intervals`; None: no drift is looked for.

    Raises:
        UsageError: not one interval for each stage but the last, or intervals that are none.
        ExportError: an engine cannot be cut or opened, or a stage belongs to other weights than the one before.
    """

    def __init__(
        self,
        cascade: Cascade,
        engines: Mapping[str, bytes],
        folder: Path,
        *,
        provider: str = CPU_PROVIDER,
        threads: int | None = None,
        options: Mapping[str, str] | None = None,
        spinning: bool | None = None,
        expected: Sequence[Interval] | None = None,
    ) -> None:
        _check_expected(cascade, expected)
        self.cascade, self.expected, self._provider = cascade, tuple(expected or ()), provider
        self._continues: list[bool] = []
        self._graphs: list[OnnxGraph] = []
        for graph in cascade_graphs(cascade, engines):
            self._continues.append(graph.continues)
            self._graphs.append(
                OnnxGraph(
                    graph.model.SerializeToString(), folder, provider=provider, threads=threads, options=options,
                    spinning=spinning,
                )
            )  # fmt: skip
        stages = len(cascade.stages)
        self._lock = threading.Lock()
        self._images, self._ms = [0] * stages, [0.0] * stages
        self._recent: deque[int] = deque(maxlen=_WINDOW)  # the stage that answered
        self._unchecked = 0
        self._drifted: tuple[int, ...] = ()

    def run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images (B, C, H, W), float32 → logits (B, classes) of the stage that answers each, and its number (B,).

        Raises:
            ExportError: onnxruntime failed.
        """
        logits, exits, took = self._run(images)
        self._count(exits, took)
        return logits, exits

    def path(self, images: np.ndarray, stages: int) -> np.ndarray:
        """Executes the first `stages` stages for all images, whatever they are sure of; nothing is counted.

        Returns:
            Logits of the last of them, (B, classes).
        """
        return self._path(images, stages)

    def release_memory(self) -> None:
        """See `klas_zoo.runtimes.Session`; costs a run of one image through every stage, which is not counted."""
        if self._provider == CPU_PROVIDER:
            shape = self._graphs[0].raw.get_inputs()[0].shape[1:]
            self._path(np.zeros((1, *shape), np.float32), len(self._graphs), releasing=True)

    def _path(self, images: np.ndarray, stages: int, **options: bool) -> np.ndarray:
        inputs = [images]
        for number, graph in enumerate(self._graphs[:stages]):
            outputs = graph.run(inputs if self._continues[number] else [images], **options)
            self._sure(number, outputs[0])
            inputs = outputs[1:]
        found: np.ndarray = outputs[0].astype(np.float32, copy=False)
        return found

    @property
    def threads(self) -> int:
        """As in `klas_zoo.runtimes.Session`."""
        return self._graphs[0].threads

    @property
    def options(self) -> str:
        """As in `klas_zoo.runtimes.Session`."""
        return self._graphs[0].options

    @property
    def raw(self) -> list[Any]:
        """onnxruntime's sessions, one for each stage."""
        return [graph.raw for graph in self._graphs]

    def close(self) -> None:
        """Frees the engines' memory; the cascade cannot be used afterwards."""
        self._graphs = []

    def counters(self) -> CascadeCounters:
        with self._lock:
            exits = np.asarray(self._recent)
            recent = tuple(
                float((exits > stage).mean()) if len(exits) else float("nan") for stage in range(len(self._images) - 1)
            )
            return CascadeCounters(
                images=tuple(self._images), milliseconds=tuple(self._ms), recent=recent, expected=self.expected,
                drifted=self._drifted,
            )  # fmt: skip

    def _run(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[float]]:
        exits = np.zeros(len(images), dtype=np.int64)
        left, features, logits = np.arange(len(images)), [images], np.empty(0)
        took = [0.0] * len(self._graphs)
        for number, graph in enumerate(self._graphs):
            started = time.perf_counter()
            if not self._continues[number] and number:
                features = [images[left]]
            outputs = graph.run(features)
            if number:
                logits[left], exits[left] = outputs[0], number
            else:
                logits = outputs[0].astype(np.float32, copy=False)
            unsure = np.flatnonzero(~self._sure(number, outputs[0]))
            if len(unsure) == len(left):  # as of one image: nothing to select
                features = outputs[1:]
            else:
                left, features = left[unsure], [one[unsure] for one in outputs[1:]]
            took[number] = 1e3 * (time.perf_counter() - started)
            if not len(left):
                break
        return logits, exits, took

    def _sure(self, number: int, logits: np.ndarray) -> np.ndarray:
        stage = self.cascade.stages[number]
        if stage.threshold is None:
            return np.ones(len(logits), dtype=bool)
        found: np.ndarray = confidence(logits, self.cascade.measure, stage.temperature) >= stage.threshold
        return found

    def _count(self, exits: np.ndarray, took: Sequence[float]) -> None:
        with self._lock:
            for number, count in enumerate(np.bincount(exits, minlength=len(self._images))):
                self._images[number] += int(count)
                self._ms[number] += took[number]
            self._recent.extend(exits.tolist())
            self._unchecked += len(exits)
            if not self.expected or self._unchecked < _CHECK_EVERY or len(self._recent) < _LEAST:
                return
            self._unchecked = 0
            before, self._drifted = self._drifted, self._drift()
            new = [number for number in self._drifted if number not in before]
            sentences = [self._sentence(number) for number in new]
        for sentence in sentences:
            warnings.warn(sentence, DriftWarning, stacklevel=4)

    def _drift(self) -> tuple[int, ...]:
        total = len(self._recent)
        found = []
        for number, (low, high) in enumerate(self.expected):
            passed = sum(one > number for one in self._recent)
            # a bound is on its side of the share, and takes longer to compute than a small engine
            above = passed > high * total and lower_share(passed, total, DRIFT_LEVEL) > high
            if above or (passed < low * total and upper_share(passed, total, DRIFT_LEVEL) < low):
                found.append(number)
        return tuple(found)

    def _sentence(self, number: int) -> str:
        passed = sum(one > number for one in self._recent) / len(self._recent)
        low, high = self.expected[number]
        return (
            f"The cascade {self.cascade} passes on {100 * passed:.1f} % of the last {len(self._recent)} images behind "
            f"{self.cascade.stages[number].route}, where {100 * low:.1f} to {100 * high:.1f} % were expected: images "
            "are others than those its thresholds were fitted on. Fit it again."
        )


def _check_expected(cascade: Cascade, expected: Sequence[Interval] | None) -> None:
    if expected is None:
        return
    if len(expected) != len(cascade.stages) - 1:
        raise UsageError(
            f"{cascade} has {len(cascade.stages) - 1} stage{'s' if len(cascade.stages) > 2 else ''} that images go on "
            f"from, and {len(expected)} expected shares were given: give one interval for each."
        )
    for low, high in expected:
        if not 0 <= low <= high <= 1:
            raise UsageError(f"An expected share is an interval within 0 to 1, not {low:g} to {high:g}.")
