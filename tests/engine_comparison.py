"""An ONNX file compared with the network it was exported from, for the tests of whatever writes one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from klas_zoo.chains import evaluating
from klas_zoo.exporters.contract import Artifact
from klas_zoo.exporters.limits import VerificationLimits, limits_for
from klas_zoo.exporters.onnx_session import open_onnx
from klas_zoo.exporters.records import Verification
from klas_zoo.exporters.reference_logits import ReferenceLogits
from klas_zoo.exporters.verification import compare
from klas_zoo.runtimes import CPU_PROVIDER


def artifact_of(file: Path) -> Artifact:
    return Artifact(route=file.name, format="onnx", precision="fp32", path=file)


def compare_with(
    file: Path,
    images: Iterable[Tensor],
    logits: Iterable[Tensor],
    limits: VerificationLimits | None = None,
    labels: np.ndarray | None = None,
) -> Verification:
    """Images and logits in batches, of which the limits are those of fp32 by default."""
    stacked = torch.cat([*logits]).detach().numpy()
    reference = ReferenceLogits.of_arrays(torch.cat([*images]).numpy(), {file.name: stacked}, labels)
    engine = open_onnx(artifact_of(file), provider=CPU_PROVIDER, threads=1)
    return compare(file.name, engine, reference, limits or limits_for("fp32", "pretrained"))


def compare_network(file: Path, network: nn.Module, images: list[Tensor]) -> Verification:
    with evaluating(network), torch.inference_mode():
        return compare_with(file, images, [network(batch) for batch in images])
