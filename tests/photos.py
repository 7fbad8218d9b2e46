"""Image files of odd sizes, modes and metadata, made from photographs that installed packages bring along."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

_SHIPPED = {
    "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",),
    "sklearn": ("datasets/images/china.jpg", "datasets/images/flower.jpg"),
    "skimage": ("data/astronaut.png", "data/chelsea.png", "data/coffee.png"),
}
_MODES = ("RGB", "RGB", "RGB", "L", "LA", "RGBA", "P", "PA", "1", "CMYK", "YCbCr", "I;16", "F")
_ORIENTATION = 0x0112


def photographs() -> list[Image.Image]:
    """At least the one that comes with matplotlib."""
    found = []
    for package, files in _SHIPPED.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            continue
        for file in files:
            path = Path(spec.origin).parent / file
            if path.is_file():
                with Image.open(path) as opened:
                    found.append(opened.convert("RGB"))
    return found


def odd_images(folder: Path, count: int, *, seed: int = 0) -> Iterator[tuple[Path, str]]:
    """Writes `count` files and yields each with its mode: crops of photographs, from 1 to 700 pixels an edge."""
    draw, sources = random.Random(seed), photographs()
    for number in range(count):
        image = _a_crop(draw, draw.choice(sources))
        mode = _MODES[number % len(_MODES)]
        yield _save(folder / f"{number:04d}", _in_mode(image, mode), mode, draw), mode


def _a_crop(draw: random.Random, photo: Image.Image) -> Image.Image:
    width, height = (draw.choice((draw.randint(1, 40), draw.randint(30, 300))) for _ in range(2))
    left, top = draw.randrange(photo.width - width + 1), draw.randrange(photo.height - height + 1)
    image = photo.crop((left, top, left + width, top + height))
    stretch = draw.choice((1.0, 1.0, 2.3))
    return image.resize((max(1, int(width * stretch)), max(1, int(height * stretch))))


def _in_mode(image: Image.Image, mode: str) -> Image.Image:
    grey = np.asarray(image.convert("L"))
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257)
    if mode == "F":
        return Image.fromarray(grey.astype(np.float32) / 255)
    if mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image.putalpha(Image.fromarray(255 - grey))
        return image if mode == "RGBA" else image.convert("LA") if mode == "LA" else image.quantize(60)
    return image.convert(mode)


def _save(stem: Path, image: Image.Image, mode: str, draw: random.Random) -> Path:
    if mode in ("CMYK", "YCbCr"):
        suffix, options = draw.choice(((".jpg", {"quality": 90}), (".tif", {})))
    elif mode == "F":
        suffix, options = ".tif", {}
    elif mode == "RGB":
        exif = Image.Exif()
        exif[_ORIENTATION] = draw.randint(1, 8)
        suffix, options = draw.choice(
            ((".jpg", {"exif": exif}), (".JPEG", {"exif": exif, "progressive": True}), (".webp", {"exif": exif}),
             (".png", {}), (".bmp", {}), (".ppm", {}))
        )  # fmt: skip
    else:
        suffix, options = ".png", {}
    path = stem.with_suffix(suffix)
    image.save(path, **options)
    return path
