"""The fp32 logits of every route, which engines are compared with: computed by torch in one pass over the images.

They are then used for every engine, of every precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from klas_zoo.chains import evaluating
from klas_zoo.errors import VerificationError
from klas_zoo.exporters.decoded_images import DecodedImages as DecodedImages
from klas_zoo.exporters.decoded_images import Listener as Listener
from klas_zoo.exporters.decoded_images import ReferenceLogits as ReferenceLogits
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet

Labelled = Callable[[], Iterable[tuple[Tensor, Tensor | None]]]
"""Gives batches of images (B, C, H, W), float32, and labels (B,) if they are known; the same ones each time."""


def reference_logits(
    supernet: Supernet,
    routes: Sequence[Route],
    images: Labelled,
    *,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
    listener: Listener = lambda stage, route: None,
) -> ReferenceLogits:
    """The logits of every route in fp32; steps that routes begin with alike are computed once.

    Args:
        device: that torch computes on. The supernet is moved there, and back afterwards.
        folder: see `DecodedImages`.

    Raises:
        VerificationError: there are no images.
        DataError: an image cannot be read.
        OSError: the temporary file cannot be written.
    """
    found: dict[str, list[np.ndarray]] = {str(route): [] for route in routes}
    held = DecodedImages(folder)
    with evaluating(supernet), _moved(supernet, device), full_precision():
        for batch, labels in images():
            held.append(batch.cpu().numpy(), None if labels is None else labels.cpu().numpy())
            # only here: parameters moved, or networks made by `images`, in inference mode could not be trained
            with torch.inference_mode():
                for route, logits in supernet.forward_all(batch.to(device, torch.float32), routes):
                    found[str(route)].append(logits.float().cpu().numpy())
            listener("torch", "")
    if not len(held):
        raise VerificationError("There are no images to verify with: pass --data DIR.")
    return ReferenceLogits(images=held, logits={name: np.concatenate(parts) for name, parts in found.items()})


@contextmanager
def full_precision() -> Iterator[None]:
    """Has CUDA compute products and convolutions in fp32, not in TF32, which keeps 10 of 23 bits."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def _moved(supernet: Supernet, device: torch.device | str) -> Iterator[None]:
    home = next(supernet.parameters()).device
    supernet.to(device)
    try:
        yield
    finally:
        supernet.to(home)
