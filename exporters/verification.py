"""Whether engines compute what the fp32 torch routes compute: the one comparison, for every format.

Every engine is opened once, runs over all images, and is closed before the next one is opened; what
it is compared with was computed before, once for all (`reference_logits`). A difference is no error
but data: `klas_zoo.exporters.limits` says how large it may be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import numpy as np

from klas_zoo.errors import CannotRunHere, ExportError, VerificationError, first_line
from klas_zoo.exporters.contract import Artifact, OpenedEngine, OpenEngine, Verdict, stage
from klas_zoo.exporters.decoded_images import DecodedImages, Listener, ReferenceLogits
from klas_zoo.exporters.limits import FEW, LEVEL, VerificationLimits
from klas_zoo.exporters.records import Verification, explain
from klas_zoo.memory import return_freed

_BATCH_BYTES = 4 * 2**20  # of images, between 8 and 64 of them


def verify_engines(
    artifacts: Sequence[Artifact],
    open_engine: OpenEngine,
    reference: ReferenceLogits,
    limits: Callable[[Artifact], VerificationLimits],
    *,
    parallel: int = 1,
    listener: Listener = lambda stage, route: None,
) -> list[Verdict]:
    """Compares every artifact with its route, and says whether it may be used.

    An engine that does not load, does not run, or gives logits of another shape is refused; one that
    this machine cannot run is `built, not run`.

    Args:
        open_engine: called once for each artifact.
        reference: has the logits of every artifact's route.
        limits: of an artifact.
        parallel: engines that run at once, each in a thread; runtimes compute outside of Python's lock.
            Whoever opens them gives each its share of the processor's cores.

    Raises:
        VerificationError: there are no images.
        KlasZooError: the runtime itself cannot be used.
    """
    if not len(reference.images):
        raise VerificationError("There are no images to verify with.")

    def judge(artifact: Artifact) -> Verdict:
        found = _verdict(artifact, open_engine, reference, limits(artifact))
        return_freed()
        listener("verify", artifact.route)
        return found

    if parallel <= 1:
        return [judge(one) for one in artifacts]
    with ThreadPoolExecutor(parallel, "verify") as pool:
        return list(pool.map(judge, artifacts))


def compare(name: str, engine: OpenedEngine, reference: ReferenceLogits, limits: VerificationLimits) -> Verification:
    """Differences between an engine and the route `name` of the reference. However large, they are data.

    Raises:
        VerificationError: there are no images, the engine does not run, or its logits have another
            shape than torch's.
    """
    images = reference.images
    if not len(images):
        raise VerificationError(f"There are no images to verify {name} with.")
    expected, labels = reference.logits[name], images.labels
    sums = _Sums()
    start = 0
    for batch, count in _batches(images, engine.batch_sizes):
        part = slice(start, start + count)
        try:
            found = engine.outputs(batch)[:count]
        except Exception as error:  # runtimes' exceptions have no common class of their own
            raise VerificationError(f"Cannot verify {name}: it failed to run ({first_line(error)}).") from error
        if found.shape != expected[part].shape:
            raise VerificationError(
                f"Cannot verify {name}: its logits for {count} images have the shape {found.shape}, "
                f"torch's {expected[part].shape}."
            )
        sums.add(found.astype(np.float32), expected[part], None if labels is None else labels[part])
        start += count
    return sums.verification(limits)


def _verdict(
    artifact: Artifact, open_engine: OpenEngine, reference: ReferenceLogits, limits: VerificationLimits
) -> Verdict:
    try:
        with stage("open", artifact.route):
            engine = open_engine(artifact)
        found = compare(artifact.route, engine, reference, limits)
        if found.passed and engine.confirm is not None:
            found = engine.confirm(found, reference, limits)
    except CannotRunHere as error:
        return Verdict(artifact=artifact, status="built, not run", verification=None, reason=str(error))
    except ExportError as error:
        return Verdict(artifact=artifact, status="refused", verification=None, reason=str(error))
    if found.passed:
        return Verdict(artifact=artifact, status="verified", verification=found)
    return Verdict(artifact=artifact, status="refused", verification=found, reason=explain(found))


def _batches(images: DecodedImages, sizes: tuple[int, ...]) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of the sizes by turns, and how many of each count; the last one repeats its last image.

    Without sizes the last batch ends short.
    """
    usual = min(64, max(8, _BATCH_BYTES // (4 * int(np.prod(images.shape)))))
    start = 0
    for size in cycle(sizes or (usual,)):
        batch = images.read(start, start + size)
        count = len(batch)
        if sizes and count < size:
            batch = np.concatenate([batch, np.repeat(batch[-1:], size - count, axis=0)])
        yield batch, count
        start += count
        if start >= len(images):
            return


class _Sums:
    """What differences add up to, batch by batch."""

    def __init__(self) -> None:
        self.images = self.agreeing = self.labelled = 0
        self.right = self.reference_right = self.newly_wrong = self.newly_right = 0
        self.worst, self.cosine = 0.0, 1.0
        self._moments = np.zeros(3)

    def add(self, found: np.ndarray, expected: np.ndarray, labels: np.ndarray | None) -> None:
        """Logits (B, classes) of both, float32."""
        with np.errstate(invalid="ignore", over="ignore"):  # infinity minus infinity is NaN, which never passes
            self.worst = np.maximum(self.worst, np.abs(found - expected).max())  # unlike max(), keeps a NaN
            norms = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
            cosines = (found * expected).sum(1) / np.maximum(norms, np.finfo(np.float32).tiny)
            cosines[(found == expected).all(1)] = 1  # also of zeros, which have no direction
            self.cosine = np.minimum(self.cosine, cosines.min())
        top, expected_top = found.argmax(1), expected.argmax(1)
        self.images += len(expected)
        self.agreeing += int((top == expected_top).sum())
        if labels is not None:
            right, reference_right = top == labels, expected_top == labels
            self.labelled += len(labels)
            self.right += int(right.sum())
            self.reference_right += int(reference_right.sum())
            self.newly_wrong += int((reference_right & ~right).sum())
            self.newly_right += int((right & ~reference_right).sum())
        wide = expected.astype(np.float64)
        self._moments += (wide.size, wide.sum(), (wide**2).sum())

    def verification(self, limits: VerificationLimits) -> Verification:
        count, total, squares = self._moments
        with np.errstate(invalid="ignore", over="ignore"):
            spread = float(np.sqrt(np.maximum(0.0, squares / count - (total / count) ** 2)))
        known = self.labelled == self.images
        many = self.images >= FEW
        return Verification(
            images=self.images,
            max_abs_difference=float(self.worst),
            top1_agreement=self.agreeing / self.images,
            tolerance=max(limits.tolerance, limits.relative * spread),
            min_agreement=limits.min_agreement if many else 0.0,
            cosine=float(self.cosine),
            min_cosine=limits.min_cosine,
            top1=100 * self.right / self.images if known else None,
            reference_top1=100 * self.reference_right / self.images if known else None,
            most_lost=limits.most_lost if many else None,
            level=LEVEL,
            newly_wrong=self.newly_wrong if known else None,
            newly_right=self.newly_right if known else None,
        )
