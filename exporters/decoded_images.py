"""Images and logits that engines are compared with, once they are there. Needs no torch.

Images stay in memory up to `MOST_BYTES`, the rest lies in an unnamed temporary file: decoding a JPEG
takes ten times as long as reading its pixels back.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

MOST_BYTES = 512 * 2**20

Listener = Callable[[str, str], None]
"""Called with the stage and the route as each is done."""


class DecodedImages:
    """Images (N, C, H, W), float32, and their labels, appended batch by batch and read at any place.

    Args:
        folder: where a temporary file is made when memory does not hold them. Default: the system's.
        most_bytes: that are held in memory.

    Reading is safe from several threads. The file has no name and is gone with this object.
    """

    def __init__(self, folder: Path | None = None, most_bytes: int = MOST_BYTES) -> None:
        self._folder, self._left = folder, most_bytes
        self._parts: list[np.ndarray | int] = []  # images, or where in the file they are
        self._starts = [0]
        self._labels: list[np.ndarray | None] = []
        self._file: IO[bytes] | None = None
        self.shape: tuple[int, ...] = ()

    def append(self, images: np.ndarray, labels: np.ndarray | None) -> None:
        """
        Args:
            images: (B, C, H, W), of one shape throughout.
            labels: (B,), or None where they are not known.

        Raises:
            OSError: the temporary file cannot be written.
        """
        images = np.ascontiguousarray(images, np.float32)
        self.shape = images.shape[1:]
        if images.nbytes <= self._left:
            self._left -= images.nbytes
            self._parts.append(images)
        else:
            self._left = 0
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - closed with this object
                weakref.finalize(self, self._file.close)
            self._parts.append(self._file.tell())
            self._file.write(images.data)
            self._file.flush()
        self._starts.append(len(self) + len(images))
        self._labels.append(labels)

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def labels(self) -> np.ndarray | None:
        """(N,); None unless all are known."""
        known = [one for one in self._labels if one is not None]
        return np.concatenate(known) if known and len(known) == len(self._labels) else None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Images `start` to `stop`, (stop - start, C, H, W), float32."""
        stop = min(stop, len(self))
        found = []
        part = bisect_right(self._starts, start) - 1
        while start < stop:
            first, end = self._starts[part], min(stop, self._starts[part + 1])
            found.append(self._read(self._parts[part], start - first, end - first))
            start, part = end, part + 1
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _read(self, part: np.ndarray | int, start: int, stop: int) -> np.ndarray:
        if isinstance(part, np.ndarray):
            return part[start:stop]
        assert self._file is not None
        found = np.empty((stop - start, *self.shape), np.float32)
        offset = part + start * found[:1].nbytes
        if os.preadv(self._file.fileno(), [found.data.cast("B")], offset) != found.nbytes:
            raise OSError("The temporary file with the decoded images was cut short.")
        return found


@dataclass(frozen=True, kw_only=True)
class ReferenceLogits:
    """The fp32 logits of routes: (N, classes) of every route by its name, for images in order."""

    images: DecodedImages
    logits: Mapping[str, np.ndarray]

    @classmethod
    def of_arrays(
        cls, images: np.ndarray, logits: Mapping[str, np.ndarray], labels: np.ndarray | None = None
    ) -> ReferenceLogits:
        """From images (N, C, H, W) and logits that are there already, as those that a package stores."""
        held = DecodedImages(most_bytes=images.nbytes)
        held.append(images, labels)
        return cls(images=held, logits=logits)
