"""Accuracy of engines on labelled images, measured with the engines themselves. Needs no torch.

Images are decoded once for several engines; each engine gets them in batches that it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from klas_zoo.catalogue.targets import Target, targets_of
from klas_zoo.confidence import share_interval
from klas_zoo.cores import physical_cores
from klas_zoo.data.arrays import ImageArray
from klas_zoo.data.folders import FolderOfImages
from klas_zoo.data.sources import LabelledImages, fingerprint, open_test_images
from klas_zoo.errors import DataError, ExportError, UsageError
from klas_zoo.exporters.contract import OpenedEngine
from klas_zoo.pixels import UnreadableImage
from klas_zoo.preprocess import Preprocess

LEVEL = 0.95
"""Of the confidence intervals."""
_AT_ONCE = 8  # engines that are open at once
_BATCH_BYTES = 16 * 2**20  # of images
Interval = tuple[float, float]
Listener = Callable[[int, int], None]
"""Called with how many images of how many are done."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Accuracy of one engine.

    Attributes:
        top1, top5: per cent, 0..100; top5 None for fewer than six classes.
        top1_interval, top5_interval: two-sided confidence intervals at `LEVEL` by Clopper and Pearson (1934), per
            cent: what true accuracies so many images are compatible with.
        data_fingerprint: accuracies compare where it is equal.
        notes: about the order of classes, and what was skipped.
    """

    engine: str
    route: str
    runtime: str
    precision: str
    images: int
    num_classes: int
    top1: float
    top1_interval: Interval
    top5: float | None
    top5_interval: Interval | None
    dataset: str
    data_fingerprint: str
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, object]:
        return asdict(self) | {"level": LEVEL}

    def __str__(self) -> str:
        text = f"top-1 {self.top1:.2f} % ({_range(self.top1_interval)})"
        if self.top5 is not None and self.top5_interval is not None:
            text += f", top-5 {self.top5:.2f} % ({_range(self.top5_interval)})"
        return text


def evaluate(
    target: str | Path,
    *,
    data: str | Path | None = None,
    registry: str | Path | None = None,
    family: str | None = None,
    device: str | None = None,
    routes: Sequence[str] = (),
    runtime: str | None = None,
    provider: str | None = None,
    threads: int | None = None,
    classes: Sequence[str] | None = None,
    preprocess: Preprocess | None = None,
    workers: int | None = None,
    listener: Listener = lambda done, images: None,
) -> list[Evaluation]:
    """Top-1 and top-5 of the engines of a package, of an engine's file, or of a registered route.

    Args:
        target: the folder of a package of any format, an engine's file, or the name of a registered route.
        data: a folder with a folder for each class, or a data set as `klas-zoo build` takes it, whose test images are
            used. None: the images that the family embeds, for one that does.
        registry, family, device: where to look a route up.
        routes: of a package only these.
        runtime: that executes them. Default: of a registered engine its own, else the format's.
        provider: of the runtime; None: the one it uses by default.
        threads: that compute one operator; None: one for each physical core.
        classes: names of the engine's classes in its order, where the data name them; see
            `klas_zoo.data.classes.read_classes`.
        preprocess: how images are prepared, for a file outside of a package; elsewhere it is known.
        workers: threads that decode images; None: one for each physical core.

    Raises:
        UsageError: there is no such target, or it is not known how its images are prepared.
        DataError: the images cannot be read, or their classes are not the engine's.
        ExportError: an engine does not load or run here.
        PackageError, RegistryError: the package or the registry cannot be read.
    """
    found = targets_of(
        target, registry=registry, family=family, device=device, routes=routes, runtime=runtime, provider=provider,
        threads=threads, preprocess=preprocess,
    )  # fmt: skip
    images = TestImages.open(data, found, classes)
    return evaluate_targets(found, images, workers=workers, listener=listener)


@dataclass(frozen=True, kw_only=True)
class TestImages:
    """Labelled images that engines are evaluated on."""

    source: LabelledImages
    description: str
    data_fingerprint: str
    notes: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    __test__ = False  # no class of tests

    @classmethod
    def open(
        cls, data: str | Path | None, targets: Sequence[Target], classes: Sequence[str] | None = None
    ) -> TestImages:
        """The images of a data set, or of the family that all targets are of.

        Raises:
            UsageError: neither; or engines with different numbers of classes.
            DataError: the images cannot be read, or their classes are not the engines'.
        """
        counts = {one.num_classes for one in targets}
        if len(counts) > 1:
            listed = ", ".join(map(str, sorted(counts)))
            raise UsageError(f"The engines have {listed} classes: evaluate them one by one.")
        notes: tuple[str, ...] = ()
        names: tuple[str, ...] = ()
        if data is None:
            source, description = _embedded({one.family for one in targets}), "its embedded images"
        else:
            opened = open_test_images(data, counts.pop(), classes)
            source, description, notes, names = opened.test, opened.description, opened.notes, opened.classes
        if not len(source.labels):
            raise DataError(f"{description}: there are no test images.")
        most = max(source.labels)
        if most >= targets[0].num_classes:
            raise DataError(
                f"{description} has classes numbered up to {most}, but {targets[0].name} has {targets[0].num_classes} "
                "classes."
            )
        return cls(
            source=source, description=description, data_fingerprint=fingerprint(source), notes=tuple(notes),
            classes=tuple(names),
        )  # fmt: skip

    def batches(self, preprocess: Preprocess, size: int, workers: int | None) -> Iterator[np.ndarray]:
        """All images in order, (B, C, H, W) float32; the last batch ends short."""
        # others read from one open file
        parallel = isinstance(self.source, (FolderOfImages, ImageArray))
        with ThreadPoolExecutor(workers or physical_cores(), "decode") as pool:
            for start in range(0, len(self.source.labels), size):
                numbers = range(start, min(start + size, len(self.source.labels)))
                if parallel:
                    yield np.stack(list(pool.map(lambda n: preprocess(self._image(n)), numbers)))
                else:
                    yield np.stack(list(pool.map(preprocess, [self._image(n) for n in numbers])))

    def labelled(self, preprocess: Preprocess, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Batches with their classes (B,)."""
        labels, start = np.asarray(self.source.labels), 0
        for batch in self.batches(preprocess, size, None):
            yield batch, labels[start : start + len(batch)]
            start += len(batch)

    def prepared(self, preprocess: Preprocess, numbers: Sequence[int]) -> np.ndarray:
        """Some images, (B, C, H, W) float32.

        Raises:
            DataError: one cannot be read.
        """
        return np.stack([preprocess(self._image(number)) for number in numbers])

    def _image(self, number: int) -> Image.Image:
        try:
            return self.source.image(number)
        except UnreadableImage as error:
            raise DataError(f"Image {self.source.name(number)} cannot be read: {error}.") from error


def evaluate_targets(
    targets: Sequence[Target], images: TestImages, *, workers: int | None = None,
    listener: Listener = lambda done, images: None,
) -> list[Evaluation]:  # fmt: skip
    """Accuracy of engines that take images prepared alike.

    Raises:
        DataError: an image cannot be read.
        ExportError: an engine does not load or run here, or gives another number of classes than it should.
    """
    found = []
    total = len(images.source.labels) * len(targets)
    for first in range(0, len(targets), _AT_ONCE):
        group = targets[first : first + _AT_ONCE]
        with ExitStack() as stack:
            hits = [_Hits(one, stack.enter_context(one.opened())) for one in group]
            shape = group[0].preprocess.input_size
            size = max(1, min(64, _BATCH_BYTES // (4 * int(np.prod(shape)))))
            labels, start = np.asarray(images.source.labels), 0
            for batch in images.batches(group[0].preprocess, size, workers):
                for one in hits:
                    one.add(batch, labels[start : start + len(batch)])
                start += len(batch)
                listener(first * len(labels) + start * len(group), total)
        found += [one.evaluation(images) for one in hits]
    return found


class _Hits:
    """How many images an engine classifies correctly, counted batch by batch."""

    def __init__(self, target: Target, engine: OpenedEngine) -> None:
        self._target, self._engine = target, engine
        self._top1 = self._top5 = self._images = 0

    def add(self, batch: np.ndarray, labels: np.ndarray) -> None:
        """Images (B, C, H, W) and their classes (B,)."""
        logits = np.concatenate(list(self._outputs(batch)))
        expected = (len(batch), self._target.num_classes)
        if logits.shape != expected:
            raise ExportError(
                f"{self._target.name} gives logits of shape {logits.shape} for {len(batch)} images, not {expected}."
            )
        true = logits[np.arange(len(labels)), labels]
        # of equal logits the class with the smaller number comes first, as in argmax; a NaN is never right
        before = (logits > true[:, None]) | ((logits == true[:, None]) & (np.arange(expected[1]) < labels[:, None]))
        rank = np.where(np.isnan(logits).any(axis=1), expected[1], before.sum(axis=1))
        self._top1 += int((rank < 1).sum())
        self._top5 += int((rank < 5).sum())
        self._images += len(labels)

    def _outputs(self, batch: np.ndarray) -> Iterator[np.ndarray]:
        size = next(iter(self._engine.batch_sizes), len(batch))
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            missing = size - len(part) if self._engine.batch_sizes else 0
            padded = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
            yield self._engine.outputs(padded)[: len(part)]

    def evaluation(self, images: TestImages) -> Evaluation:
        target, count = self._target, self._images
        five = target.num_classes > 5
        return Evaluation(
            engine=target.name, route=target.route, runtime=target.runtime, precision=target.precision, images=count,
            num_classes=target.num_classes, top1=100 * self._top1 / count, top1_interval=_interval(self._top1, count),
            top5=100 * self._top5 / count if five else None,
            top5_interval=_interval(self._top5, count) if five else None, dataset=images.description,
            data_fingerprint=images.data_fingerprint, notes=images.notes,
        )  # fmt: skip


def _interval(hits: int, images: int) -> Interval:
    low, high = share_interval(hits, images, LEVEL)
    return 100 * low, 100 * high


def _range(interval: Interval) -> str:
    return f"{interval[0]:.2f} to {interval[1]:.2f}"


def _embedded(families: set[str]) -> LabelledImages:
    from klas_zoo.data.arrays import open_sample
    from klas_zoo.families.specs import builtin_families

    known = builtin_families()
    sample = known[next(iter(families))].sample if len(families) == 1 and families <= set(known) else None
    if sample is None:
        raise UsageError("Which images? Pass --data DIR.")
    return open_sample(sample)[1]
