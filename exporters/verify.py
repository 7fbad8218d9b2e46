"""Whether an engine computes what torch computes, on real images.

The tolerance is in units of the logits and lies between rounding and the smallest mistake:
PLACEHOLDER
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from klas_zoo.errors import VerificationError
from klas_zoo.exporters.records import Verification
from klas_zoo.modes import evaluating
from klas_zoo.profiles.devices import first_line, open_session

TOLERANCE = 1e-3
MIN_AGREEMENT = 0.999


def verify(
    engine: Path,
    module: nn.Module,
    batches: Iterable[Tensor],
    *,
    provider: str,
    threads: int | None = None,
    tolerance: float = TOLERANCE,
    min_agreement: float = MIN_AGREEMENT,
) -> Verification:
    """Compares an engine with the network it was exported from. A difference is no error, but data.

    Args:
        batches: images (B, C, H, W), as the network takes them; one batch at a time is held.
        provider: onnxruntime's execution provider.
        threads: of onnxruntime; None: one for each physical core.

    Raises:
        VerificationError: there are no images, the engine does not run, or its answer has another
            shape than the network's.
        ExportError: onnxruntime cannot load the engine.
    """

    def answer(images: Tensor) -> Tensor:
        with evaluating(module), torch.inference_mode():
            logits: Tensor = module(images)
        return logits

    pairs = ((images, answer(images)) for images in batches)
    return compare(
        engine, pairs, provider=provider, threads=threads, tolerance=tolerance, min_agreement=min_agreement
    )


def compare(
    engine: Path,
    pairs: Iterable[tuple[Tensor, Tensor]],
    *,
    provider: str,
    threads: int | None = None,
    tolerance: float = TOLERANCE,
    min_agreement: float = MIN_AGREEMENT,
) -> Verification:
    """`verify` for logits that are there already: `pairs` are images (B, C, H, W) and logits (B, classes)."""
    session = open_session(engine, provider, threads)
    name = session.get_inputs()[0].name
    images_seen, agreeing, worst = 0, 0, 0.0
    for images, expected in pairs:
        try:
            found = session.run(None, {name: images.cpu().numpy()})[0]
        except Exception as error:  # onnxruntime's exceptions have no common class of their own
            raise VerificationError(f"onnxruntime cannot run {engine.name}: {first_line(error)}") from error
        wanted = expected.cpu().numpy()
        if found.shape != wanted.shape:
            raise VerificationError(
                f"{engine.name} answers images {tuple(images.shape)} with {found.shape}, torch with {wanted.shape}."
            )
        with np.errstate(invalid="ignore"):  # infinity minus infinity is NaN, which never passes
            worst = np.maximum(worst, np.abs(found - wanted).max())  # unlike max(), keeps a NaN
        agreeing += int((found.argmax(1) == wanted.argmax(1)).sum())
        images_seen += len(wanted)
    if images_seen == 0:
        raise VerificationError(f"There are no images to verify {engine.name} with.")
    return Verification(
        images=images_seen,
        max_abs_difference=float(worst),
        top1_agreement=agreeing / images_seen,
        tolerance=tolerance,
        min_agreement=min_agreement,
    )


def explain(verification: Verification) -> str:
    """One sentence: which limit was missed by how much, or that none was."""
    v = verification
    missed = []
    if not np.isfinite(v.max_abs_difference):
        missed.append("some logits are not finite")
    elif v.max_abs_difference > v.tolerance:
        missed.append(
            f"logits differ by up to {v.max_abs_difference:.2g}, {v.max_abs_difference / v.tolerance:.1f} times "
            f"the tolerance of {v.tolerance:.2g}"
        )
    if not v.top1_agreement >= v.min_agreement:
        missed.append(f"only {v.top1_agreement:.2%} of the top classes agree, {v.min_agreement:.2%} have to")
    verdict = "; ".join(missed) or f"logits differ by at most {v.max_abs_difference:.2g}"
    subject = "The engine is the same function as its network" if not missed else "The engine is another function"
    return f"{subject}: on {v.images} images {verdict}."
