"""Classes of images that all lie in one folder, as ImageNet's validation images do, from a table or XML files.

Tables are comma-, semicolon- or tab-separated, with a header or none: the file name or its stem, and the class. Known
by name are `LOC_val_solution.csv` (Kaggle's form of ImageNet), `val_annotations.txt` (Tiny ImageNet), and
`val.csv`, `val_labels.csv`, `labels.csv` or `annotations.csv` in the folder of the images or the one above. XML files
are those of ImageNet and Pascal VOC: one for each image, beside it or in `Annotations/`; the first object is the class.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from xml.etree import ElementTree

from klas_zoo.data.classes import shown
from klas_zoo.errors import DataError

_KAGGLE = "LOC_val_solution.csv"
_TINY = "val_annotations.txt"
_IMAGE_COLUMNS = ("image", "imageid", "image_id", "file", "filename", "file_name", "path", "filepath", "id", "name")
_CLASS_COLUMNS = ("label", "class", "class_name", "synset", "wnid", "target", "category", "predictionstring")
_ABOVE = 3  # folders above the data set in which ImageNet's own layout keeps its annotations


def find_annotations(held: Path) -> Path | None:
    """The table, or the folder of XML files, that belongs to a folder of images; None: there is none."""
    near = (_TINY, f"{held.name}.csv", f"{held.name}_labels.csv", "labels.csv", "annotations.csv", _KAGGLE)
    for place in (held, held.parent):
        for name in near:
            if (place / name).is_file():
                return place / name
    if next(held.glob("*.xml"), None) is not None:
        return held
    absolute = held.absolute()
    for ancestor in absolute.parents[: _ABOVE + 1]:
        if (ancestor / _KAGGLE).is_file():
            return ancestor / _KAGGLE
        within = absolute.relative_to(ancestor)
        inside = Path(*within.parts[1:]) if within.parts[0] == "Data" else within
        for folder in (ancestor / "Annotations" / inside, ancestor / "Annotations" / held.name):
            if next(folder.glob("*.xml"), None) is not None:
                return folder
    return None


def classes_of(files: Iterable[str], annotations: Path) -> Iterator[tuple[str, str]]:
    """Every file with the name of its class.

    Raises:
        DataError: the annotations cannot be read, or do not name every file.
    """
    names = None if annotations.is_dir() else _table(annotations)
    for file in files:
        base = os.path.basename(file)
        stem = os.path.splitext(base)[0]
        if names is None:
            yield file, _class_in(annotations / f"{stem}.xml")
            continue
        name = names.get(base, names.get(stem))
        if name is None:
            raise DataError(f"{shown(file)} has no row in {annotations}.")
        yield file, name


def _table(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = text.partition("\n")[0]
        delimiter = next((one for one in "\t;" if one in first), ",")
        rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as a table: {error}.") from error
    header = [cell.strip().lower() for cell in rows[0]] if rows else []
    image = next((header.index(name) for name in _IMAGE_COLUMNS if name in header), None)
    label = next((header.index(name) for name in _CLASS_COLUMNS if name in header), None)
    if image is not None and label is not None:
        rows = rows[1:]
    else:
        image, label = 0, 1
    names: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if len(row) <= max(image, label) or not row[label].strip():
            raise DataError(f"Row {number} of {path} has no class.")
        # Kaggle's form has the box of the object after the class
        name = row[label].strip()
        names[os.path.basename(row[image].strip())] = name.split()[0] if path.name == _KAGGLE else name
    return names


def _class_in(path: Path) -> str:
    try:
        found = ElementTree.parse(path).findtext("object/name")
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist: every image needs its annotation.") from error
    except (OSError, ElementTree.ParseError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if not found:
        raise DataError(f"{path} names no object.")
    return found.strip()
