"""Takes the measurements that selectors ask for, each with as few forward passes as it needs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from klas_zoo.chains import Chain
from klas_zoo.data.loading import Batch, Data, batches
from klas_zoo.data.order import Draw, in_order, shuffled
from klas_zoo.errors import SelectionError
from klas_zoo.processes.team import ALONE, Team
from klas_zoo.routes import Seam
from klas_zoo.selection import pairs_of
from klas_zoo.selection.anchor_outputs import fit_stitches, measure_answers
from klas_zoo.selection.candidates import CostFunction, SelectionSettings, candidates_of
from klas_zoo.selection.cka import measure_cka
from klas_zoo.selection.measurements import SEAM_NEEDS, Measurements, Need, SelectionWarning
from klas_zoo.selection.pooled_features import MOST_BYTES, bytes_of, pool_features
from klas_zoo.selection.probes import Probes, ProbeSettings, train_probes
from klas_zoo.selection.selectors import find_selector
from klas_zoo.selection.similarity import Similarities, measure_outputs, measure_similarities

Advance = Callable[[int, str], None]
Progress = Callable[[str, int, str], AbstractContextManager[Advance]]


@dataclass(frozen=True, kw_only=True)
class TrainingOrder:
    """The training images by their positions in the split, of each process its share.

    Attributes:
        images: every image once, in order, with the positions (B,) of a batch.
        epochs: for each epoch of the probes, the positions (B,) of its batches.
        count: images in the split.
    """

    images: Callable[[], Iterable[tuple[Tensor, Batch]]]
    epochs: Callable[[], Iterable[Iterator[Tensor]]]
    count: int


@dataclass(frozen=True, kw_only=True)
class MeasurementImages:
    """Streams of batches, each started anew at every call, and how many images each has.

    Attributes:
        epochs: one stream over the training images for each epoch of the probes.
        fit: training images that stitching layers are fitted to.
        heldout: images that nothing has learned from; never those that report accuracy.
        order: the epochs by position, where every epoch shows the same images; their features may be stored then.
    """

    epochs: Callable[[], Iterable[Iterator[Batch]]]
    fit: Callable[[], Iterable[Batch]]
    heldout: Callable[[], Iterable[Batch]]
    epochs_count: int
    fit_count: int
    heldout_count: int
    order: TrainingOrder | None = None


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
) -> MeasurementImages:
    """The streams of one data set.

    Args:
        batch: images per forward pass, besides those of the probes.
        init_images: how many training images stitching layers are fitted to.
        team: each process gets its share of the epochs' batches; the other streams are whole.
    """
    wanted, count = min(init_images, len(data.train)), len(data.train)
    size = min(batch, wanted)
    stream = partial(batches, device=device, workers=workers)
    order = TrainingOrder(
        images=lambda: zip(
            map(_positions, in_order(count, batch, team)), stream(data.train, batch, team=team), strict=True
        ),
        epochs=lambda: (
            map(_positions, shuffled(count, min(probing.batch, count), seed + epoch, False, 0, team))
            for epoch in range(probing.epochs)
        ),
        count=count,
    )
    return MeasurementImages(
        epochs=lambda: (
            stream(data.train, probing.batch, shuffle_seed=seed + epoch, team=team)
            for epoch in range(probing.epochs)
        ),
        fit=lambda: islice(stream(data.train, size, shuffle_seed=seed), max(1, wanted // size)),
        heldout=lambda: stream(data.heldout, batch),
        epochs_count=probing.epochs * count,
        fit_count=wanted,
        heldout_count=len(data.heldout),
        order=None if data.train.random else order,
    )


def _positions(draws: list[Draw]) -> Tensor:
    return torch.tensor([draw.position for draw in draws])


@contextmanager
def _silent(name: str, total: int, unit: str) -> Iterator[Advance]:
    yield lambda work, remark: None


def warn_user(sentence: str) -> None:
    """The default without a listener."""
    warnings.warn(sentence, SelectionWarning, stacklevel=3)


def measure(
    chains: dict[str, Chain],
    needs: Set[Need],
    images: MeasurementImages,
    cost: CostFunction,
    settings: SelectionSettings,
    *,
    probing: ProbeSettings,
    probes: Mapping[str, Probes] | None = None,
    stage: Progress = _silent,
    warn: Callable[[str], None] = warn_user,
) -> Measurements:
    """Everything in `needs` but latency, which takes a device and not images.

    Several selectors can be measured at once: `needs` is the union of what they ask for, and seams
    are measured for the pairs of `settings`, or else those of the nearest outputs.

    Args:
        cost: multiply-adds of a route; says which stitches lie between their anchors.
        probes: those of every anchor, where they have been trained already.
        stage: called for each pass over the images, as klas_zoo.progress.listeners.Listener is.
        warn: given a sentence where the result may mean little.

    Raises:
        SelectionError: fewer training images than classes, images of one class only, activations
            that are not finite, or nothing to stitch.
    """
    found = Measurements()
    if "probes" in needs:
        trained = learn_probes(chains, images, probing, stage=stage) if probes is None else probes
        found = Measurements(probes=_compare(chains, trained, images, stage, warn))
    if not found.has("outputs") and (needs & {"outputs"} or (needs & SEAM_NEEDS and settings.pairs is None)):
        with stage("outputs", images.heldout_count, "images") as advance:
            distances = measure_outputs(chains, images.heldout(), on_batch=lambda n: advance(n, ""))
        found = replace(found, outputs=distances)
    if needs & SEAM_NEEDS:
        found = _measure_seams(found, chains, needs, seams_of(chains, found, cost, settings), images, stage)
    return found


def seams_of(
    chains: dict[str, Chain], found: Measurements, cost: CostFunction, settings: SelectionSettings
) -> list[Seam]:
    """The seams that `SEAM_NEEDS` are measured for: of the pairs and the direction of the settings."""
    pairs = pairs_of(find_selector("klas"), chains, found, cost, settings)
    found_for = partial(candidates_of, chains, cost=cost, buckets=settings.buckets, direction=settings.direction)
    return [one.seam for pair in pairs for one in found_for(pair)]


def learn_probes(
    chains: dict[str, Chain],
    images: MeasurementImages,
    probing: ProbeSettings,
    *,
    stage: Progress = _silent,
    team: Team = ALONE,
) -> dict[str, Probes]:
    """Trains the probes of every anchor on the training images.

    Args:
        team: each process has a share of every batch; all end with the same probes.

    Raises:
        SelectionError: fewer images than classes, images of one class only, activations that are not finite.
    """
    _check_images(chains, images, probing)
    streams, pooled_at = images.epochs, None
    order = images.order
    if order is not None and probing.epochs > 1 and bytes_of(chains, order.count) <= MOST_BYTES:
        with stage("features", order.count, "images") as advance:
            stored = pool_features(chains, order.images(), order.count, team=team, on_batch=lambda n: advance(n, ""))
        streams, pooled_at = lambda: map(stored.batches, order.epochs()), stored.at
    with stage("probes", images.epochs_count, "images") as advance:
        classes: set[int] = set()
        epochs = (_watch_classes(batches, classes) for batches in streams())
        probes = train_probes(
            chains, epochs, probing, pooled_at=pooled_at, team=team, on_batch=lambda n: advance(n * team.size, "")
        )
    if len(set().union(*team.gather(classes))) == 1:
        raise SelectionError("The training images are of one class only; there is nothing to tell apart.")
    return probes


def _compare(
    chains: dict[str, Chain],
    probes: Mapping[str, Probes],
    images: MeasurementImages,
    stage: Progress,
    warn: Callable[[str], None],
) -> Similarities:
    """Θ of the probes on the held-out images."""
    with stage("similarity", images.heldout_count, "images") as advance:
        similar = measure_similarities(chains, probes, images.heldout(), on_batch=lambda n: advance(n, ""))
    if similar.chance == 100:
        raise SelectionError("The held-out images are of one class only; there is nothing to tell apart.")
    for sentence in probe_warnings(similar):
        warn(sentence)
    return similar


def _watch_classes(batches: Iterable[Batch], classes: set[int]) -> Iterator[Batch]:
    for images, labels in batches:
        classes.update(labels.tolist())
        yield images, labels


def _measure_seams(
    found: Measurements,
    chains: dict[str, Chain],
    needs: Set[Need],
    seams: list[Seam],
    images: MeasurementImages,
    stage: Progress,
) -> Measurements:
    if "cka" in needs:
        with stage("CKA", images.heldout_count, "images") as advance:
            found = replace(found, cka=measure_cka(chains, seams, images.heldout(), on_batch=lambda n: advance(n, "")))
    if not needs & {"residual", "accuracy", "output_kl"}:
        return found
    with stage("fit candidates", images.fit_count, "images") as advance:
        supernet, residual = fit_stitches(chains, seams, images.fit(), on_batch=lambda n: advance(n, ""))
    found = replace(found, residual=residual)
    if needs & {"accuracy", "output_kl"}:
        with stage("run candidates", images.heldout_count, "images") as advance:
            answers = measure_answers(supernet, images.heldout(), on_batch=lambda n: advance(n, ""))
        found = replace(found, accuracy=answers.accuracy, output_kl=answers.output_kl)
    return found


def probe_warnings(similar: Similarities) -> list[str]:
    """A sentence for each anchor whose probes tell no more than the most frequent class would.

    At chance is what lies within two standard errors of it.
    """
    chance = similar.chance / 100
    limit = 100 * (chance + 2 * math.sqrt(chance * (1 - chance) / similar.images))
    sentences = []
    for name, accuracy in similar.probe_accuracy.items():
        bad = [str(block) for block, top1 in enumerate(accuracy[:-1].tolist(), start=1) if top1 <= limit]
        if bad:
            which = f"block {bad[0]}" if len(bad) == 1 else f"blocks {', '.join(bad)}"
            sentences.append(
                f"Probes of {name} after {which} are at chance on the held-out images (at most {limit:.1f} %): "
                "scores of stitches there mean little; train the probes longer or give more images."
            )
    return sentences


def _check_images(chains: dict[str, Chain], images: MeasurementImages, probing: ProbeSettings) -> None:
    classes = next(iter(chains.values())).classes
    count = images.epochs_count // max(1, probing.epochs)
    if count < classes:
        raise SelectionError(
            f"{count} training images are fewer than the {classes} classes: probes cannot learn a class they never see."
        )
