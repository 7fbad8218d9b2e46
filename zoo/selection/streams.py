"""The streams of batches that selection and initialisation read."""

from __future__ import annotations

from functools import partial
from itertools import islice

import torch

from klas_zoo.data.loading import Data, batches
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.selection.measuring import Images
from klas_zoo.selection.probes import ProbeSettings


def images_of(
    data: Data,
    *,
    probing: ProbeSettings,
    batch: int,
    init_images: int,
    seed: int,
    device: torch.device | str = "cpu",
    workers: int = 0,
    team: Team = ALONE,
) -> Images:
    """The streams of one data set.

    Args:
        batch: images per forward pass, besides those of the probes.
        init_images: how many training images stitching layers are fitted to.
        team: each process gets its share of the epochs' batches; the other streams are whole.
    """
    wanted = min(init_images, len(data.train))
    size = min(batch, wanted)
    stream = partial(batches, device=device, workers=workers)
    return Images(
        epochs=lambda: (
            stream(data.train, probing.batch, shuffle_seed=seed + epoch, team=team)
            for epoch in range(probing.epochs)
        ),
        fit=lambda: islice(stream(data.train, size, shuffle_seed=seed), max(1, wanted // size)),
        heldout=lambda: stream(data.heldout, batch),
        epochs_count=probing.epochs * len(data.train),
        fit_count=wanted,
        heldout_count=len(data.heldout),
    )
