"""Images in WebDataset's tar files, read at any place and in any order.

WebDataset's own reader streams whole shards; which process sees which image then depends on how many
shards, processes and workers there are, and an interrupted epoch cannot be resumed. So only the
headers of the shards are read here, once, and images where they lie. How samples are named is
WebDataset's: its own functions decide which files of a shard belong together.
"""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from klas_zoo.data.folders import split_folders
from klas_zoo.data.opened import Opened
from klas_zoo.data.scanning import readable_suffixes
from klas_zoo.errors import DataError
from klas_zoo.pixels import UnreadableImage, decode

_LABELS = ("cls", "json")
_SPLIT = re.compile(r"(?<![a-z])(train|validation|valid|val|test|eval)", re.IGNORECASE)
_HELD = ({"val", "validation", "valid"}, {"test"}, {"eval"})
_GZIP = b"\x1f\x8b"
_SHOWN = 6  # files of a sample in a message


@dataclass(frozen=True)
class _Sample:
    """Where an image's bytes lie: a shard by its number, the first byte and how many."""

    shard: int
    name: str
    offset: int
    size: int


def split_files(folder: Path, suffix: str) -> tuple[list[Path], list[Path]] | None:
    """Training files and those of validation or testing, in order; None if there are not both.

    They lie in the folder or in `data/` with the split in their names (`train-0000.tar`,
    `imagenet1k-validation-00.tar`), or in folders `train/` and `val/`.
    """
    for place in (folder, folder / "data"):
        found: dict[str, list[Path]] = {}
        for path in sorted(place.glob(f"*{suffix}")):
            if match := _SPLIT.search(path.stem):
                found.setdefault(match[1].lower(), []).append(path)
        held = next((some for names in _HELD if (some := [p for n in sorted(names) for p in found.get(n, [])])), None)
        if held and "train" in found:
            return found["train"], held
    folders = split_folders(folder)
    train, held = (sorted(place.glob(f"*{suffix}")) for place in folders) if folders else ([], [])
    return (train, held) if train and held else None


def open_shards(train: Sequence[Path], test: Sequence[Path], name: str) -> Opened:
    """
    Raises:
        DataError: the library is not installed, a shard is damaged, or a sample lacks its image or its label.
    """
    return Opened(Shards(train), Shards(test), f"shards in {name}")


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
                with path.open("rb") as shard:
                    zipped = shard.read(2) == _GZIP
                if zipped:
                    raise DataError(
                        f"{path} is compressed by gzip, and images are read from the middle of shards: unpack it first."
                    ) from error
                raise DataError(f"{path} is no whole tar file: {error}.") from error

    def image(self, index: int) -> Image.Image:
        sample = self._samples[index]
        try:
            # opened each time: a file that forked workers share would be read at one another's places
            with self._paths[sample.shard].open("rb") as shard:
                shard.seek(sample.offset)
                content = shard.read(sample.size)
        except OSError as error:
            raise UnreadableImage(error.strerror or str(error)) from error
        return decode(content)

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
                if base is None or extension is None:
                    continue
                parts = files.setdefault(base, {})
                if extension.lower() in parts:
                    raise DataError(f"{path} has the sample {base} twice, as .{extension}: keys must differ.")
                parts[extension.lower()] = member
            images = [suffix.removeprefix(".") for suffix in readable_suffixes()]
            for base, parts in files.items():
                image = next((parts[one] for one in parts if one in images), None)
                label = next((parts[one] for one in _LABELS if one in parts), None)
                if image is None or label is None:
                    raise DataError(_incomplete(base, path, list(parts)))
                self._samples.append(_Sample(number, image.name, image.offset_data, image.size))
                self.labels.append(_label(shard, label, base, path))


def _incomplete(base: str, path: Path, parts: list[str]) -> str:
    listed = ", ".join(f".{one}" for one in parts[:_SHOWN]) + (", …" if len(parts) > _SHOWN else "")
    dotted = " A key ends at the first dot of its name." if any("." in one for one in parts) else ""
    return (
        f"Sample {base} of {path} has {listed}: it needs an image (.jpg, .png, .webp …) and a class (.cls, or .json "
        f"with a label).{dotted}"
    )


def _label(shard: tarfile.TarFile, member: tarfile.TarInfo, base: str, path: Path) -> int:
    content = shard.extractfile(member)
    text = content.read() if content else b""
    try:
        if member.name.lower().endswith(".json"):
            found = json.loads(text)
            if not isinstance(found, dict) or "label" not in found:
                raise ValueError("its .json has no 'label'")
            found = found["label"]
        else:
            found = int(text)
        if type(found) is not int or found < 0:
            raise ValueError(f"{found!r} is no class")
    except (ValueError, RecursionError) as error:
        raise DataError(f"The class of sample {base} in {path} is not a number from 0 on: {error}.") from error
    return found


def _webdataset_names():  # type: ignore[no-untyped-def]  # the library has no types
    try:
        from webdataset.tariterators import base_plus_ext
    except ImportError as error:
        raise DataError("Shards need WebDataset: pip install 'klas-zoo[webdataset]'.") from error
    return base_plus_ext
