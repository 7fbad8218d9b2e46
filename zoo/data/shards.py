"""Images in WebDataset's tar files, read at any place and in any order.

WebDataset's own reader streams whole shards; which process sees which image then hangs on how many
shards, processes and workers there are, and an interrupted epoch cannot be gone on with. So only the
headers of the shards are read here, once, and images where they lie. How samples are named is
WebDataset's: its own functions say which files of a shard belong together.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from klas_zoo.errors import DataError

_IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "bmp")
_LABELS = ("cls", "json")


@dataclass(frozen=True)
class _Sample:
    """Where an image's bytes lie: a shard by its number, the first byte and how many."""

    shard: int
    name: str
    offset: int
    size: int


def split_files(folder: Path, held: str, suffix: str) -> tuple[list[Path], list[Path]] | None:
    """Files `train*` and `val*` (or `test*`, as `held` says) of a folder, in order; None if there are not both."""
    train, test = (sorted(folder.glob(f"{start}*{suffix}")) for start in ("train", held))
    return (train, test) if train and test else None


def open_shards(train: Sequence[Path], test: Sequence[Path], name: str) -> tuple[Shards, Shards, str]:
    """Training images, test images, and what they are in a few words.

    Raises:
        DataError: the library is not installed, a shard is damaged, or a sample lacks its image or its label.
    """
    return Shards(train), Shards(test), f"shards in {name}"


class Shards:
    """Samples of an image (`.jpg`, `.png` …) and its class (`.cls`, or `label` in `.json`)."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)
        self._samples: list[_Sample] = []
        self.labels: list[int] = []
        for number, path in enumerate(self._paths):
            try:
                self._index(number, path)
            except (tarfile.TarError, OSError, EOFError) as error:
                raise DataError(f"{path} is no whole tar file: {error}.") from error

    def image(self, index: int) -> Image.Image:
        sample = self._samples[index]
        # opened each time: a file that forked workers share would be read at one another's places
        with self._paths[sample.shard].open("rb") as shard:
            shard.seek(sample.offset)
            with Image.open(io.BytesIO(shard.read(sample.size))) as opened:
                return opened.convert("RGB")

    def name(self, index: int) -> str:
        sample = self._samples[index]
        return f"{sample.name} in {self._paths[sample.shard]}"

    def identity(self) -> Iterator[bytes]:
        for path in self._paths:
            yield f"{path.name}:{path.stat().st_size}".encode()

    def _index(self, number: int, path: Path) -> None:
        split_name = _webdataset_names()
        files: dict[str, dict[str, tarfile.TarInfo]] = {}
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                base, extension = split_name(member.name) if member.isfile() else (None, None)
                if base is not None and extension is not None:
                    files.setdefault(base, {})[extension.lower()] = member
            for base, parts in files.items():
                image = next((parts[one] for one in _IMAGES if one in parts), None)
                label = next((parts[one] for one in _LABELS if one in parts), None)
                if image is None or label is None:
                    raise DataError(
                        f"Sample {base} of {path} has {', '.join(f'.{one}' for one in parts)}: it needs an image "
                        f"(.{', .'.join(_IMAGES)}) and a class (.cls, or .json with a label)."
                    )
                self._samples.append(_Sample(number, image.name, image.offset_data, image.size))
                self.labels.append(_label(shard, label, base, path))


def _label(shard: tarfile.TarFile, member: tarfile.TarInfo, base: str, path: Path) -> int:
    content = shard.extractfile(member)
    text = content.read() if content else b""
    try:
        found = json.loads(text)["label"] if member.name.endswith(".json") else int(text)
        if type(found) is not int or found < 0:
            raise ValueError(f"{found!r} is no class")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"The class of sample {base} in {path} is not a number from 0 on: {error}.") from error
    return found


def _webdataset_names():  # type: ignore[no-untyped-def]  # the library has no types
    try:
        from webdataset.tariterators import base_plus_ext
    except ImportError as error:
        raise DataError("Shards need WebDataset: pip install 'klas-zoo[webdataset]'.") from error
    return base_plus_ext
