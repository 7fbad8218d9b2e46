"""Image files as RGB pixels: the one decoder of training, evaluation and serving. numpy and Pillow only.

Everything is converted as timm and torchvision do it, `Image.open(file).convert("RGB")`: alpha is dropped, a palette
is looked up, CMYK is converted by Pillow's formula, the first frame of an animation is taken, and the orientation
in EXIF is not applied. Two kinds of images differ, because Pillow clips them to white or black:

* 16 bits a pixel are scaled by 1 / 257 and rounded, so that 65535 becomes 255;
* floating-point values from 0 to 1 are scaled by 255 and rounded.

32-bit integers and other floating-point values have no range that a reader could know; they are refused.
"""

from __future__ import annotations

import io
import os
import stat
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from klas_zoo.errors import DataError

_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_SIXTEEN_BIT_FORMATS = ("PNG", "PPM")  # their 16-bit images have mode "I" in older versions of Pillow


class UnreadableImage(DataError):
    """A file or a row is not an image that can be decoded; the message is the reason alone."""


class _NoUserWarnings:
    """Ignores UserWarning while any thread is inside.

    Filters of warnings belong to the process: were each thread to set and restore its own, the first to leave would
    take them from the others, and the last would restore those of another thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._kept = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._kept = warnings.catch_warnings()
                self._kept.__enter__()
                warnings.simplefilter("ignore", UserWarning)
            self._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._kept.__exit__(None, None, None)


_QUIET = _NoUserWarnings()


def decode(source: Path | bytes) -> Image.Image:
    """An encoded image, by its path or its bytes, as RGB.

    Raises:
        UnreadableImage: it does not exist, is not a regular file, is damaged, or has pixels of unknown range.
    """
    try:
        # damaged metadata and transparent palettes: neither reaches the pixels
        with _QUIET, Image.open(io.BytesIO(source if isinstance(source, bytes) else _content(source))) as opened:
            return to_rgb(opened)
    except UnreadableImage:
        raise
    except Exception as error:  # Pillow's plugins raise nearly anything for damaged files
        raise UnreadableImage(_reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB, 8 bits a channel.

    Raises:
        UnreadableImage: integers of 32 bits, or floating-point values outside of 0 to 1.
    """
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in _SIXTEEN_BIT_FORMATS):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "I":
        raise UnreadableImage("its pixels are 32-bit integers of unknown range; convert it to 8 or 16 bits")
    if image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # not a number fails, too
            raise UnreadableImage(
                f"its pixels are floating-point values from {low:g} to {high:g}; only 0 to 1 can be read"
            )
        return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def check_channels(channels: int, found: str) -> None:
    """
    Raises:
        DataError: images do not become arrays of so many channels; `found` says where the number is from.
    """
    if channels not in (1, 3):
        raise DataError(
            f"Images are read as RGB, 3 channels, or for networks of 1 channel as grey; {found}. Networks of other "
            "channels can be profiled, and exported with --random-weights."
        )


def with_channels(image: Image.Image, channels: int) -> Image.Image:
    """An RGB image for a network of 3 channels, or of 1: its luma by ITU-R 601, as timm converts it."""
    return image.convert("L") if channels == 1 else image


def _content(path: Path) -> bytes:
    """A regular file's bytes. Opened without waiting: a pipe would keep the reader until somebody writes."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise UnreadableImage("it is not a regular file")
        return file.read()


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "it does not exist"
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image that Pillow can identify"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
