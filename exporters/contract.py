"""The records that every format shares: what is exported, what is opened, what becomes of it.

    export   a route of a supernet, or of a package   → Artifact, a file that computes one route
    open     an Artifact                              → OpenedEngine, images in and logits out; or CannotRunHere
    verify   `klas_zoo.exporters.verification`        → Verdict

A format brings `export` and `open`; verifying is the same for all. Errors name the stage that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from klas_zoo.errors import ExportError, KlasZooError, first_line
from klas_zoo.exporters.decoded_images import ReferenceLogits
from klas_zoo.exporters.limits import VerificationLimits
from klas_zoo.exporters.records import Verification

Outputs = Callable[[np.ndarray], np.ndarray]
"""Images (B, C, H, W), float32 → logits (B, classes)."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One route as a file; `route` is its name."""

    route: str
    format: str
    precision: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class OpenedEngine:
    """An engine that is ready to run.

    Attributes:
        outputs: what it computes.
        batch_sizes: the sizes to verify it with, by turns, one for each kind of batch it computes
            differently, such as a TensorRT profile; empty: it takes every size.
        confirm: called with what was found when it passed, where this machine's arithmetic is another than that of
            its target: adds what was found beyond it, or raises `CannotRunHere`.
    """

    outputs: Outputs
    batch_sizes: tuple[int, ...] = ()
    confirm: Callable[[Verification, ReferenceLogits, VerificationLimits], Verification] | None = None


OpenEngine = Callable[[Artifact], OpenedEngine]
"""Opens an engine; raises `CannotRunHere` where this machine cannot run it, `ExportError` where it does not load."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of an artifact: verified, refused, or `built, not run`, then `reason` says why."""

    artifact: Artifact
    status: Literal["verified", "refused", "built, not run", "to be compiled on the target"]
    verification: Verification | None
    reason: str = ""

    def to_json(self) -> dict[str, object]:
        return {
            "route": self.artifact.route,
            "status": self.status,
            "reason": self.reason,
            "verification": None if self.verification is None else asdict(self.verification),
        }


@contextmanager
def stage(name: str, what: str) -> Iterator[None]:
    """Turns whatever libraries raise into one error that names the stage; ours pass as they are."""
    try:
        yield
    except KlasZooError:
        raise
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"Cannot export {what}: it failed to {name} ({first_line(cause)}).") from error
