"""Images in Parquet files or on the Hugging Face hub, through the library `datasets`.

The library only maps rows from the disk. It would decode images by itself, turn them by their EXIF orientation and
fail on damaged metadata; here they are decoded as those in folders are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from klas_zoo.data.classes import Numbering, number_classes
from klas_zoo.data.opened import Opened
from klas_zoo.errors import DataError
from klas_zoo.hub import quick_when_offline
from klas_zoo.pixels import UnreadableImage, decode

_HUB = "hf:"
_HELD = ("validation", "val", "valid", "test")
_CLASS_COLUMNS = ("label", "labels", "class", "cls", "target", "fine_label", "category")
_IMAGE_COLUMNS = ("image", "img", "jpg", "png", "picture")
Class = int | str


def hub_name(place: Path | str) -> str | None:
    """The data set that `hf:owner/name` names; None for any other place."""
    text = str(place)
    return text.removeprefix(_HUB) if text.startswith(_HUB) else None


def open_parquet(
    train: Sequence[Path], test: Sequence[Path], name: str, num_classes: int | None, listed: Sequence[str] | None
) -> Opened:
    """
    Raises:
        DataError: the library is not installed, or the files hold no images with classes.
    """
    found = _load("parquet", data_files={"train": [*map(str, train)], "test": [*map(str, test)]})
    sizes = [[f"{path.name}:{path.stat().st_size}".encode() for path in paths] for paths in (train, test)]
    tables = [Table(found[split], name, identity, num_classes) for split, identity in zip(found, sizes, strict=True)]
    return _numbered(tables, f"Parquet files in {name}", num_classes, listed)


def open_hub(name: str, num_classes: int | None, listed: Sequence[str] | None) -> Opened:
    """As `open_parquet`, of a data set on the hub, or of one in the library's own cache."""
    with quick_when_offline() as online:
        try:
            found = _load(name)
        except DataError as error:
            if online or error.__cause__ is None or isinstance(error.__cause__, ImportError):
                raise
            raise DataError(
                f"hf:{name} is not in the cache of datasets, and the Hugging Face hub cannot be reached: pass a folder "
                "or Parquet files as --data."
            ) from error
    held = next((one for one in _HELD if one in found), None)
    if "train" not in found or held is None:
        raise DataError(f"hf:{name} has the splits {', '.join(found)}: a train and a validation or test are needed.")
    tables = [
        Table(found[one], name, [str(found[one]._fingerprint).encode()], num_classes) for one in ("train", held)
    ]
    return _numbered(tables, f"{name} of the hub", num_classes, listed)


class Table:
    """Rows of an image and its class, mapped from the disk by Arrow.

    Attributes:
        values: the class of each row as it is written there.
        names: of the classes by number, where the file has them.
        labels: the number of each row's class, once `number` was called.
    """

    def __init__(self, rows: Any, name: str, identity: Sequence[bytes], num_classes: int | None) -> None:
        import datasets

        self._name, self._identity = name, identity
        self._image = _image_column(rows, name)
        label = _class_column(rows, name, num_classes)
        self._rows = rows.cast_column(self._image, datasets.Image(decode=False))
        self.values = _values(rows, label, name)
        self.names: tuple[str, ...] = tuple(getattr(rows.features[label], "names", ()))
        self.labels: list[int] = []

    def number(self, numbers: dict[Class, int] | None) -> None:
        """Gives every class its number; None: the values are the numbers."""
        self.labels = [value if numbers is None else numbers[value] for value in self.values]  # type: ignore[misc]

    def image(self, index: int) -> Image.Image:
        found = self._rows[index][self._image]
        if not found or (found.get("bytes") is None and not found.get("path")):
            raise UnreadableImage("its row has no image")
        return decode(found["bytes"] if found.get("bytes") is not None else Path(found["path"]))

    def name(self, index: int) -> str:
        return f"number {index} of {self._name}"

    def identity(self) -> Iterator[bytes]:
        yield from self._identity


def _numbered(
    tables: Sequence[Table], description: str, num_classes: int | None, listed: Sequence[str] | None
) -> Opened:
    train, test = tables
    numbering = Numbering(numbers=[], names=train.names if len(train.names) == (num_classes or -1) else ())
    numbers: dict[Class, int] | None = None
    if train.names and listed is not None:
        numbering = number_classes(train.names, num_classes, description, listed)
        numbers = dict(enumerate(numbering.numbers))
    elif any(isinstance(value, str) for value in (*train.values[:1], *test.values[:1])):
        names = sorted({str(value) for value in train.values})
        odd = next((value for value in test.values if value not in set(names)), None)
        if odd is not None:
            raise DataError(f"{description}: test images have a class {odd!r} that no training image has.")
        numbering = number_classes(names, num_classes, description, listed)
        numbers = dict(zip(names, numbering.numbers, strict=True))
    for table in tables:
        table.number(numbers)
    return Opened(train, test, description, numbering.names, numbering.notes, numbering.alternatives)


def _values(rows: Any, label: str, name: str) -> list[Class]:
    values = rows.select_columns([label]).with_format("arrow")[:][label].to_pylist()
    for row, value in enumerate(values):
        if value is None:
            raise DataError(f"Row {row} of {name} has no class ('{label}' is null).")
        if isinstance(value, float) and value.is_integer():
            values[row] = int(value)
        elif not isinstance(value, (int, str)):
            raise DataError(f"Row {row} of {name} has no class: '{label}' is {value!r}, not a number or a name.")
    kinds = {type(value) for value in values}
    if kinds == {str} and all(value.isdecimal() for value in values):
        values, kinds = [int(value) for value in values], {int}
    if len(kinds) > 1:
        raise DataError(f"{name} mixes numbers and names of classes in '{label}'.")
    if kinds == {int} and min(values) < 0:
        raise DataError(f"{name} has images without a class ({min(values)} in '{label}').")
    return values


def _image_column(rows: Any, name: str) -> str:
    kinds = _kinds(rows)
    found = [column for column, kind in kinds.items() if kind == "Image"]
    # bytes that no metadata calls an image
    found = found or [column for column in _IMAGE_COLUMNS if column in kinds][:1]
    return _only(found, "an image", kinds, name)


def _class_column(rows: Any, name: str, num_classes: int | None) -> str:
    """The one column of classes; of several the one with as many classes as the family has."""
    kinds = _kinds(rows)
    found = [column for column, kind in kinds.items() if kind == "ClassLabel"]
    if len(found) > 1:
        fitting = [column for column in found if rows.features[column].num_classes == num_classes]
        return _only(fitting, "a class", kinds, name)
    return _only(found or [column for column in _CLASS_COLUMNS if column in kinds][:1], "a class", kinds, name)


def _kinds(rows: Any) -> dict[str, str]:
    return {column: type(feature).__name__ for column, feature in rows.features.items()}


def _only(found: Sequence[str], what: str, kinds: dict[str, str], name: str) -> str:
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
