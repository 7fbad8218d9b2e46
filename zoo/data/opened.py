"""What every source of images is, and what opening one gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from PIL import Image


class LabelledImages(Protocol):
    """RGB images, their labels, and a name for each to use in messages."""

    @property
    def labels(self) -> Sequence[int]: ...
    def image(self, index: int) -> Image.Image:
        """
        Raises:
            UnreadableImage: it cannot be decoded.
        """
        ...

    def name(self, index: int) -> str: ...
    def identity(self) -> Iterator[bytes]:
        """What distinguishes these images from others, small to read: the pixels, or names and sizes of files."""
        ...


class Opened(NamedTuple):
    """A data set.

    Attributes:
        description: what it is in a few words.
        classes: names by number; empty where they are unknown.
        notes: sentences for the user, about the order of classes and what was skipped.
        alternatives: another order of the classes by its name: the number there of each number here.
    """

    train: LabelledImages
    test: LabelledImages
    description: str
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    alternatives: Mapping[str, Sequence[int]] = {}
