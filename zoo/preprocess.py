"""Images as the anchors expect them, without torch: what timm's evaluation transform does, in numpy and Pillow.

The steps, the rounding of sizes and the order of floating-point operations are those of torchvision's Resize,
CenterCrop, ToTensor and Normalize and of timm's ResizeKeepRatio and CenterCropOrPad, so that results are equal
bit for bit with the same version of Pillow; `tests/test_preprocess.py` compares them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from klas_zoo.errors import DataError
from klas_zoo.pixels import UnreadableImage, check_channels, decode, to_rgb, with_channels

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
    "lanczos": Image.Resampling.LANCZOS,
}
_CROP_MODES = ("center", "squash", "border")
DEFAULT_CROP_PCT = 0.875
DEFAULT_INTERPOLATION = "bilinear"
"""What timm's create_transform uses where a configuration has no such field."""
Picture = Image.Image | np.ndarray | bytes | str | Path
Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """From an image file to the array that an engine takes. Thread-safe, and needs no torch.

    Attributes:
        input_size: (C, H, W): C is 3 for RGB, or 1 for grey.
        mean, std: of each channel, on the scale of 0 to 1.
        interpolation: nearest, bilinear, bicubic, box, hamming or lanczos.
        crop_pct: the share of the resized image that the crop keeps.
        crop_mode: `center` scales the shorter edge and crops; `squash` scales both edges; `border` scales the longer
            edge and fills up with the mean.
        crop_border_pixels: that are cut off every edge before anything else; None or 0: none.

    Raises:
        DataError: a field is missing or has no meaning; names it.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = DEFAULT_INTERPOLATION
    crop_pct: float = DEFAULT_CROP_PCT
    crop_mode: str = "center"
    crop_border_pixels: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", _numbers("input_size", self.input_size, int, 3))
        check_channels(self.input_size[0], f"input_size is {list(self.input_size)}")
        for name in ("mean", "std"):
            object.__setattr__(self, name, _numbers(name, getattr(self, name), float, self.input_size[0]))
        if min(self.std) <= 0 or min(self.input_size) < 1:
            raise DataError(f"std and input_size must be above zero, not {self.std} and {list(self.input_size)}.")
        if self.interpolation not in _FILTERS:
            raise DataError(f"interpolation is one of {', '.join(_FILTERS)}, not '{self.interpolation}'.")
        if self.crop_mode not in _CROP_MODES:
            raise DataError(f"crop_mode is one of {', '.join(_CROP_MODES)}, not '{self.crop_mode}'.")
        if not (isinstance(self.crop_pct, (int, float)) and 0 < self.crop_pct <= 2):
            raise DataError(f"crop_pct is a share above 0, mostly up to 1, not {self.crop_pct!r}.")

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> Preprocess:
        """Of timm's data configuration, as packages, reports and the registry hold it; other fields are ignored.

        Raises:
            DataError: a field is missing or has no meaning; names it.
        """
        missing = [name for name in ("input_size", "mean", "std") if facts.get(name) is None]
        if missing:
            raise DataError(f"These preprocessing facts lack {', '.join(missing)}: {sorted(facts)}.")
        known = {name: facts[name] for name in cls.__dataclass_fields__ if facts.get(name) is not None}
        return cls(**known)

    def to_json(self) -> dict[str, Any]:
        """The fields, as JSON can hold them."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}

    def __call__(self, picture: Picture) -> np.ndarray:
        """One image as (C, H, W) float32.

        Args:
            picture: a path, the bytes of an image file, a PIL image, or an array (H, W, 3) uint8.

        Raises:
            DataError: it cannot be read; says why.
        """
        image = with_channels(_opened(picture), self.input_size[0])
        if self.crop_border_pixels:
            image = _trimmed(image, self.crop_border_pixels)
        pixels = np.atleast_3d(np.asarray(self._framed(image)))
        scaled = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        scaled -= np.asarray(self.mean, np.float32)[:, None, None]
        scaled /= np.asarray(self.std, np.float32)[:, None, None]
        return np.ascontiguousarray(scaled)

    def batch(self, pictures: Iterable[Picture]) -> np.ndarray:
        """Several images as (B, C, H, W) float32."""
        return np.stack([self(picture) for picture in pictures])

    def _framed(self, image: Image.Image) -> Image.Image:
        """Resized and cropped to (H, W)."""
        height, width = self.input_size[1:]
        target = (math.floor(height / self.crop_pct), math.floor(width / self.crop_pct))
        if self.crop_mode == "squash":
            return _center_crop(self._resized(image, target), (height, width))
        if self.crop_mode == "border":
            fill = tuple(round(255 * value) for value in self.mean)
            framed = self._resized(image, _keeping_ratio(image, target, max))
            return _center_crop(framed, (height, width), fill if len(fill) > 1 else fill[0])
        if target[0] == target[1]:
            return _center_crop(self._resized(image, _shorter_edge(image, target[0])), (height, width))
        return _center_crop(self._resized(image, _keeping_ratio(image, target, min)), (height, width))

    def _resized(self, image: Image.Image, size: Size) -> Image.Image:
        height, width = size
        if (width, height) == image.size:
            return image
        return image.resize((width, height), _FILTERS[self.interpolation])


def _opened(picture: Picture) -> Image.Image:
    try:
        if isinstance(picture, Image.Image):
            return to_rgb(picture)
        if isinstance(picture, np.ndarray):
            return _from_array(picture)
        return decode(Path(picture) if isinstance(picture, str) else picture)
    except UnreadableImage as error:
        named = f"Image {picture}" if isinstance(picture, (str, Path)) else "The image"
        raise DataError(f"{named} cannot be read: {error}.") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise UnreadableImage(f"an array must be (H, W, 3) uint8, not {array.shape} {array.dtype}")
    return Image.fromarray(np.ascontiguousarray(array))


def _shorter_edge(image: Image.Image, size: int) -> Size:
    """(height, width) with the shorter edge of `size`; torchvision truncates the other one."""
    width, height = image.size
    if width <= height:
        return int(size * height / width), size
    return size, int(size * width / height)


def _keeping_ratio(image: Image.Image, target: Size, choose: Any) -> Size:
    """(height, width) by one ratio for both edges; timm rounds both."""
    width, height = image.size
    ratio = choose(height / target[0], width / target[1])
    return round(height / ratio), round(width / ratio)


def _trimmed(image: Image.Image, border: int) -> Image.Image:
    width, height = image.size
    left, top = min(border, width), min(border, height)
    return image.crop((left, top, left + max(0, width - 2 * border), top + max(0, height - 2 * border)))


def _center_crop(image: Image.Image, size: Size, fill: tuple[int, ...] | int = 0) -> Image.Image:
    height, width = size
    short_w, short_h = max(0, width - image.size[0]), max(0, height - image.size[1])
    if short_w or short_h:
        border = (short_w // 2, short_h // 2, (short_w + 1) // 2, (short_h + 1) // 2)
        image = ImageOps.expand(image, border=border, fill=fill)
    top, left = round((image.size[1] - height) / 2), round((image.size[0] - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _numbers(name: str, value: Any, kind: type, count: int) -> tuple[Any, ...]:
    try:
        found = tuple(kind(one) for one in value)
    except (TypeError, ValueError, OverflowError):
        found = ()
    if len(found) != count or not all(math.isfinite(one) for one in found):
        raise DataError(f"{name} is {'one number' if count == 1 else 'three numbers'}, not {value!r}.")
    return found
