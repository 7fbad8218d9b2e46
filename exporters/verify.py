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

from collections.abc import Iterable
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn

from klas_zoo.errors import CannotRunHere, ExportError
from klas_zoo.exporters.contract import Answer, Artifact, Limits, differences
from klas_zoo.exporters.records import Verification, explain
from klas_zoo.modes import evaluating
from klas_zoo.profiles.devices import open_session

__all__ = ["answer_of", "compare", "explain", "open_artifact", "verify"]

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
    return differences(
        engine.name,
        answer_of(session),
        ((images.cpu().numpy(), logits.detach().cpu().numpy(), None) for images, logits in pairs),
        Limits(tolerance=tolerance, min_agreement=min_agreement),
    )


def answer_of(session: onnxruntime.InferenceSession) -> Answer:
    """A session of one input and one output as a function."""
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def open_artifact(artifact: Artifact, *, provider: str, threads: int | None) -> Answer:
    """Opens an ONNX artifact in onnxruntime.

    Weights are read where the file is mapped, not packed once more: the same products, in less memory.

    Raises:
        CannotRunHere: the provider cannot compute in the artifact's precision.
        ExportError: onnxruntime cannot load it.
    """
    try:
        return answer_of(open_session(artifact.path, provider, threads, {"session.disable_prepacking": "1"}))
    except ExportError as error:
        # onnxruntime's processor kernels know fp16 by casting to fp32 and back, and bf16 not at all
        if artifact.precision == "bf16" and "NOT_IMPLEMENTED" in str(error):
            raise CannotRunHere(f"onnxruntime's {provider} does not compute in bf16.") from error
        raise
