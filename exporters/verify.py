"""Whether an engine computes what torch computes, on real images.

The tolerance lies between rounding and the smallest mistake. Measured on 2,000 CIFAR-10 images
with trained anchors of deit-micro, whose logits spread by 1.4, the largest difference was

    3e-6    onnxruntime against torch
    8e-6    torch with oneDNN against torch without
    1.3e-4  GELU's tanh approximation in one of eight blocks
    4e-4    one matrix rounded to fp16
    4e-2    all weights rounded to bf16

and 4e-6 with DeiT-S and DeiT-B at random weights times two, so 1e-4 leaves rounding a factor of 20.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from klas_zoo.errors import VerificationError
from klas_zoo.exporters.records import Verification
from klas_zoo.modes import evaluating
from klas_zoo.profiles.devices import first_line, open_session

TOLERANCE = 1e-4  # in units of the logits
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
    answer = torch.inference_mode()(module)
    with evaluating(module):
        return compare(
            engine,
            ((images, answer(images)) for images in batches),
            provider=provider,
            threads=threads,
            tolerance=tolerance,
            min_agreement=min_agreement,
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
        wanted = expected.detach().cpu().numpy()
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
    largest, tolerance = verification.max_abs_difference, verification.tolerance
    images = f"on {verification.images} images"
    if verification.passed:
        return f"The engine computes what torch computes: {images} logits differ by at most {largest:.2g}."
    missed = []
    if not math.isfinite(largest):
        missed.append("some logits are not finite")
    elif largest > tolerance:
        times = f"{largest / tolerance:.1f} times the {tolerance:g} that is allowed"
        missed.append(f"logits differ by up to {largest:.2g}, {times}")
    if verification.top1_agreement < verification.min_agreement:
        found, required = 100 * verification.top1_agreement, 100 * verification.min_agreement
        missed.append(f"the top class is the same for {found:.2f} % of them, {required:.2f} % are required")
    return f"The engine does not compute what torch computes: {images} {', and '.join(missed)}."
