"""Images in Parquet files or on the Hugging Face hub, through the library `datasets`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from klas_zoo.errors import DataError

_HUB = "hf:"


def hub_name(place: Path) -> str | None:
    """The data set that `hf:owner/name` names; None for any other place."""
    text = str(place)
    return text.removeprefix(_HUB) if text.startswith(_HUB) else None


def open_parquet(train: Sequence[Path], test: Sequence[Path], name: str) -> tuple[Table, Table, str]:
    """Training images, test images, and what they are in a few words.

    Raises:
        DataError: the library is not installed, or the files hold no images with classes.
    """
    found = _load("parquet", data_files={"train": [*map(str, train)], "test": [*map(str, test)]})
    sizes = [[f"{path.name}:{path.stat().st_size}".encode() for path in paths] for paths in (train, test)]
    return Table(found["train"], name, sizes[0]), Table(found["test"], name, sizes[1]), f"Parquet files in {name}"


def open_hub(name: str) -> tuple[Table, Table, str]:
    """As `open_parquet`, of a data set on the hub, or of one in the library's own cache."""
    found = _load(name)
    held = next((one for one in ("validation", "val", "test") if one in found), None)
    if "train" not in found or held is None:
        raise DataError(f"hf:{name} has the splits {', '.join(found)}: a train and a validation or test are needed.")
    parts = (Table(found[one], name, [str(found[one]._fingerprint).encode()]) for one in ("train", held))
    return (*parts, f"{name} of the hub")  # type: ignore[return-value]


class Table:
    """Rows of an image and its class, mapped from the disk by Arrow."""

    def __init__(self, rows: Any, name: str, identity: Sequence[bytes]) -> None:
        self._rows, self._name, self._identity = rows, name, identity
        self._image = _column(rows, name, "an image", lambda kind: kind == "Image")
        self._label = _column(rows, name, "a class", lambda kind: kind == "ClassLabel", ("label", "labels", "class"))
        self.labels: list[int] = [int(one) for one in rows.with_format("numpy")[self._label][:]]
        if min(self.labels, default=0) < 0:
            raise DataError(f"{name} has images without a class (-1 in '{self._label}').")

    def image(self, index: int) -> Image.Image:
        found: Image.Image = self._rows[index][self._image]
        return found

    def name(self, index: int) -> str:
        return f"number {index} of {self._name}"

    def identity(self) -> Iterator[bytes]:
        yield from self._identity


def _column(rows: Any, name: str, what: str, fits: Any, names: Sequence[str] = ()) -> str:
    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    found = [column for column, kind in kinds.items() if fits(kind)] or [one for one in names if one in kinds]
    if len(found) != 1:
        listed = ", ".join(f"{column} ({kind})" for column, kind in kinds.items())
        raise DataError(f"{name} needs one column with {what}; it has {listed}.")
    return found[0]


def _load(*what: str, **options: Any) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError("Parquet files need Hugging Face datasets: pip install 'klas-zoo[datasets]'.") from error
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*what, **options)
    except Exception as error:  # readers, the hub's client and its transport raise errors without a base of their own
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"datasets cannot load {options.get('data_files') or what[0]}: {first}.") from error
