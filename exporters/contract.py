"""One contract for every format: export gives an artifact, verification gives differences as data.

    export   a route of a supernet, or of a package   → Artifact, a file that computes one route
    open     an Artifact                              → Answer, images in and logits out; or CannotRunHere
    verify   an Answer and what torch answers         → Verification, in which a difference is no error

A format brings `export` and `open`; verifying is the same for all. An artifact whose differences
are beyond the limits of its precision is refused; one that this machine cannot open is kept and
marked `built, not run`. Errors name the stage that failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from klas_zoo.errors import CannotRunHere, ExportError, KlasZooError, VerificationError
from klas_zoo.exporters.package import References
from klas_zoo.exporters.records import Verification, explain
from klas_zoo.profiles.devices import first_line

Answer = Callable[[np.ndarray], np.ndarray]
"""Images (B, C, H, W), float32 → logits (B, classes)."""
Compared = tuple[np.ndarray, np.ndarray, np.ndarray | None]
"""Images (B, C, H, W), the fp32 torch route's logits (B, classes), and labels (B,) where they are known."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """One route as a file; `route` is its name."""

    route: str
    format: str
    precision: str
    path: Path


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How far an engine may be from the fp32 torch route.

    Attributes:
        tolerance: of the largest difference of a logit, in units of the logits.
        relative: the same as a share of the spread (standard deviation) of torch's logits; the
            larger of the two is allowed.
        min_agreement: share of images, 0..1, with the same top class.
        min_cosine: of the logits of any image, -1..1.
        most_lost: points of top-1.
    """

    tolerance: float = 0.0
    relative: float = 0.0
    min_agreement: float = 0.0
    min_cosine: float | None = None
    most_lost: float | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of an artifact: verified, refused, or `built, not run`, then `reason` says why."""

    artifact: Artifact
    status: Literal["verified", "refused", "built, not run"]
    verification: Verification | None
    reason: str = ""

    def to_json(self) -> dict[str, object]:
        return {
            "route": self.artifact.route,
            "status": self.status,
            "reason": self.reason,
            "verification": None if self.verification is None else vars(self.verification),
        }


def judge(
    artifact: Artifact,
    open_artifact: Callable[[Artifact], Answer],
    compared: Iterable[Compared],
    limits: Limits,
) -> Verdict:
    """Opens an artifact, compares it with torch, and says whether it may be used.

    Raises:
        ExportError: it cannot be opened although what it was built for is here, or it cannot be run;
            the message names the stage.
    """
    try:
        with stage("open", artifact.route):
            answer = open_artifact(artifact)
    except CannotRunHere as error:
        return Verdict(artifact=artifact, status="built, not run", verification=None, reason=str(error))
    found = differences(artifact.route, answer, compared, limits)
    if found.passed:
        return Verdict(artifact=artifact, status="verified", verification=found)
    return Verdict(artifact=artifact, status="refused", verification=found, reason=explain(found))


def differences(name: str, answer: Answer, compared: Iterable[Compared], limits: Limits) -> Verification:
    """Differences between an engine and torch. However large they are, they are data.

    Raises:
        VerificationError: there are no images, the engine does not run, or its answer has another
            shape than torch's.
    """
    sums = _Sums()
    for images, wanted, labels in compared:
        try:
            found = answer(images)
        except Exception as error:  # runtimes' exceptions have no common class of their own
            raise VerificationError(f"Cannot verify {name}: it failed to run ({first_line(error)}).") from error
        if found.shape != wanted.shape:
            raise VerificationError(
                f"Cannot verify {name}: it answers images {images.shape} with {found.shape}, torch with {wanted.shape}."
            )
        sums.add(found.astype(np.float32), wanted.astype(np.float32), labels)
    if not sums.images:
        raise VerificationError(f"There are no images to verify {name} with.")
    return sums.verification(limits)


def of_references(references: References, route: str, batch: int = 8) -> Iterator[Compared]:
    """What a package keeps of a route, for `judge` and `differences`."""
    for start in range(0, len(references.images), batch):
        part = slice(start, start + batch)
        yield references.images[part], references.logits[route][part], None


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


class _Sums:
    """What differences add up to, batch by batch."""

    def __init__(self) -> None:
        self.images = self.agreeing = self.labelled = self.right = self.reference_right = 0
        self.worst, self.cosine = 0.0, 1.0
        self._moments = np.zeros(3)

    def add(self, found: np.ndarray, wanted: np.ndarray, labels: np.ndarray | None) -> None:
        """Logits (B, classes) of both, float32."""
        with np.errstate(invalid="ignore", over="ignore"):  # infinity minus infinity is NaN, which never passes
            self.worst = np.maximum(self.worst, np.abs(found - wanted).max())  # unlike max(), keeps a NaN
            norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
            cosines = (found * wanted).sum(1) / np.maximum(norms, np.finfo(np.float32).tiny)
            self.cosine = np.minimum(self.cosine, cosines.min())
        mine, theirs = found.argmax(1), wanted.argmax(1)
        self.images += len(wanted)
        self.agreeing += int((mine == theirs).sum())
        if labels is not None:
            self.labelled += len(labels)
            self.right += int((mine == labels).sum())
            self.reference_right += int((theirs == labels).sum())
        wide = wanted.astype(np.float64)
        self._moments += (wide.size, wide.sum(), (wide**2).sum())

    def verification(self, limits: Limits) -> Verification:
        count, total, squares = self._moments
        with np.errstate(invalid="ignore", over="ignore"):
            spread = float(np.sqrt(np.maximum(0.0, squares / count - (total / count) ** 2)))
        known = self.labelled == self.images
        return Verification(
            images=self.images,
            max_abs_difference=float(self.worst),
            top1_agreement=self.agreeing / self.images,
            tolerance=max(limits.tolerance, limits.relative * spread) if limits.relative else limits.tolerance,
            min_agreement=limits.min_agreement,
            cosine=float(self.cosine),
            min_cosine=limits.min_cosine,
            top1=100 * self.right / self.images if known else None,
            reference_top1=100 * self.reference_right / self.images if known else None,
            most_lost=limits.most_lost,
        )
