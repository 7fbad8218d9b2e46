"""A check of all images before work starts: one damaged file must not end a build of days on its second day.

Every image is decoded once, in parallel. The result is cached under a fingerprint of the images, so a build that
is resumed does not check again; only images that were damaged are tried again, in case they were repaired.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from klas_zoo.data.opened import LabelledImages
from klas_zoo.errors import DataError
from klas_zoo.files import replacing, sealed, unsealed
from klas_zoo.pixels import UnreadableImage
from klas_zoo.processes.team import ALONE, Team

Advance = Callable[[int, str], None]
Damaged = dict[int, str]
_VERSION = 2  # 1: results without a SHA-256
_FEW = 512  # images that are checked sooner than processes start
_CHUNK = 32
_IN_MESSAGE = 3


@dataclass(frozen=True, kw_only=True)
class DamageCheck:
    """How images are checked.

    Attributes:
        allowed: damaged images that are skipped; more of them are an error.
        cache: the folder where results are kept; None: nowhere.
        processes: that decode; None: one for each core.
        team: of which only the first process checks.
        say: gets one line for every damaged image.
        watch: announces the pass: name, total and unit.
    """

    allowed: int = 0
    cache: Path | None = None
    processes: int | None = None
    team: Team = ALONE
    say: Callable[[str], None] = lambda line: None
    watch: Callable[[str, int, str], AbstractContextManager[Advance]] = (
        lambda name, total, unit: nullcontext(lambda images, text: None)
    )

    def without_damaged(self, sources: Sequence[LabelledImages]) -> list[LabelledImages]:
        """The same sources, less what cannot be decoded.

        Raises:
            DataError: more images than allowed are damaged; names the first ones.
        """
        found = self.team.broadcast(self._damaged(sources) if self.team.is_main else None)
        names = [
            (source.name(index), reason)
            for source, damaged in zip(sources, found, strict=True)
            for index, reason in damaged.items()
        ]
        if self.team.is_main:
            for name, reason in names:
                self.say(f"Damaged: {name}: {reason}.")
        if len(names) > self.allowed:
            total = sum(len(source.labels) for source in sources)
            listed = "; ".join(f"{name}: {reason}" for name, reason in names[:_IN_MESSAGE])
            more = f"; and {len(names) - _IN_MESSAGE:,} more" if len(names) > _IN_MESSAGE else ""
            raise DataError(
                f"{len(names):,} of {total:,} images cannot be read ({listed}{more}): repair or remove them, or pass "
                f"--skip-damaged {len(names)}."
            )
        return [Without(source, one) if one else source for source, one in zip(sources, found, strict=True)]

    def _damaged(self, sources: Sequence[LabelledImages]) -> list[Damaged]:
        found = [self._known(source) for source in sources]
        unknown = [place for place, known in enumerate(found) if known is None]
        if unknown:
            total = sum(len(sources[place].labels) for place in unknown)
            with self.watch("check images", total, "images") as advance:
                for place in unknown:
                    found[place] = self._checked(sources[place], lambda images: advance(images, ""))
        return [one or {} for one in found]

    def _known(self, source: LabelledImages) -> Damaged | None:
        """What an earlier check found, as far as it still holds; None: there was none."""
        if getattr(source, "in_memory", False):
            return {}
        before = _read(self._file(source)) if self.cache else None
        if before is None:
            return None
        return {index: reason for index in before if (reason := _reason(source, index)) is not None}

    def _checked(self, source: LabelledImages, on_images: Callable[[int], None]) -> Damaged:
        found = find_damaged(source, processes=self.processes, on_images=on_images)
        if self.cache is not None:
            with replacing(self._file(source)) as temporary:
                temporary.write_text(sealed({str(index): reason for index, reason in found.items()}))
        return found

    def _file(self, source: LabelledImages) -> Path:
        assert self.cache is not None
        return self.cache / f"images-{_key(source)}.json"


def find_damaged(
    source: LabelledImages, *, processes: int | None = None, on_images: Callable[[int], None] = lambda images: None
) -> Damaged:
    """The images of a source that cannot be decoded, each with the reason."""
    total = len(source.labels)
    processes = len(os.sched_getaffinity(0)) if processes is None else processes
    loader: DataLoader[Any] = DataLoader(
        _Reasons(source),
        batch_size=_CHUNK,
        num_workers=0 if total <= _FEW or processes == 1 else processes,
        collate_fn=list,
        prefetch_factor=None if total <= _FEW or processes == 1 else 8,
    )
    found: Damaged = {}
    first = 0
    for reasons in loader:
        found.update({first + place: reason for place, reason in enumerate(reasons) if reason is not None})
        first += len(reasons)
        on_images(len(reasons))
    return found


class Without:
    """A source less some of its images."""

    def __init__(self, source: LabelledImages, left_out: Damaged) -> None:
        self._source = source
        self._kept = [index for index in range(len(source.labels)) if index not in left_out]
        self.labels = [source.labels[index] for index in self._kept]

    def image(self, index: int) -> Image.Image:
        return self._source.image(self._kept[index])

    def name(self, index: int) -> str:
        return self._source.name(self._kept[index])

    def identity(self) -> Iterator[bytes]:
        yield from self._source.identity()


class _Reasons(Dataset[str | None]):
    """For every image why it cannot be decoded; None where it can."""

    def __init__(self, source: LabelledImages) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, index: int) -> str | None:
        return _reason(self.source, index)


def _reason(source: LabelledImages, index: int) -> str | None:
    try:
        source.image(index)
    except UnreadableImage as error:
        return str(error)
    return None


def _key(source: LabelledImages) -> str:
    """32 hexadecimal digits that differ where images or the decoder do."""
    digest = hashlib.sha256(f"{_VERSION} Pillow {PIL.__version__} {len(source.labels)}".encode())
    for part in source.identity():
        digest.update(part)
    return digest.hexdigest()[:32]


def _read(file: Path) -> Damaged | None:
    try:
        found = unsealed(file.read_bytes())
    except OSError:
        return None
    return None if found is None else {int(index): str(reason) for index, reason in found.items()}
