"""Which number each class of a data set has: folders and tables have names, a family only has numbers.

A checkpoint says nothing about the order of its classes, and a wrong order makes every accuracy chance. timm numbers
classes in natural order (`2` before `10`, upper and lower case alike), torchvision in that of the characters. The
natural order is used here; where the two differ, the difference is reported and remembered, so that
`klas_zoo.building.label_check` can try the other one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unicodedata import normalize

from klas_zoo.errors import DataError

IMAGENET = "imagenet-1k"
_DIGITS = re.compile(r"([0-9]+)")
_SYNSET = re.compile(r"n[0-9]{8}")


@dataclass(frozen=True, kw_only=True)
class Numbering:
    """The family's number of each class.

    Attributes:
        numbers: of the classes, in the order in which they were given.
        names: by number; empty where the data set does not name its classes.
        notes: sentences for the user.
        alternatives: another order by its name: the number there of each number here.
    """

    numbers: list[int]
    names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    alternatives: dict[str, list[int]] = field(default_factory=dict)


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts as timm does: digits by their value, letters without their case. Equal ones by their characters."""
    parts: list[str | int] = list(_DIGITS.split(name.lower()))
    parts[1::2] = [int(part) for part in parts[1::2]]
    return parts, name


def number_classes(
    names: Sequence[str], num_classes: int | None, where: str, listed: Sequence[str] | None = None
) -> Numbering:
    """Numbers the classes of a data set.

    As many as the family has are numbered from 0 in natural order. Fewer are numbered only if they are ImageNet's
    synsets. A list overrides both.

    Args:
        names: of the classes found, in any order.
        num_classes: of the family; None: as many as there are.
        where: the images in a few words, for messages.
        listed: every class of the family in its order, see `read_classes`.

    Raises:
        DataError: it cannot be known which of the family's classes these are.
    """
    num_classes = len(names) if num_classes is None else num_classes
    if listed is not None:
        return _by_list(names, num_classes, where, listed)
    counts = f"{where} has {len(names)} classes, the family has {num_classes}"
    if len(names) == num_classes:
        return _in_natural_order(names)
    if len(names) > num_classes:
        raise DataError(f"{counts}: {_examples(names)}. Remove what is not a class, or take another family.")
    synsets = _imagenet_numbers()
    if num_classes != len(synsets):
        raise DataError(
            f"{counts}: which of them these are is unknown. Pass --classes FILE with all {num_classes} names in the "
            "order of the checkpoint."
        )
    odd = next((name for name in names if name not in synsets), None)
    if odd is not None:
        raise DataError(
            f"{counts}: which of ImageNet's these are is known only if they are named by synset, such as "
            f"n01440764; '{shown(odd)}' is none of the thousand. Pass --classes FILE with all names in order."
        )
    return Numbering(numbers=[synsets[name] for name in names], names=tuple(synsets))


def read_classes(place: str | Path) -> tuple[str, ...]:
    """The classes of a family in the order of its checkpoints.

    Args:
        place: `imagenet-1k` for ImageNet's synsets; or a JSON file with a list of names, or with an object of name
            and number (or number and name); or a text file with one name a line. Of lines that begin with a synset,
            such as those of `LOC_synset_mapping.txt`, the synset is taken.

    Raises:
        DataError: the file cannot be read, or its names are not all different.
    """
    if str(place) == IMAGENET:
        return tuple(_imagenet_numbers())
    path = Path(place)
    try:
        text = path.read_text(encoding="utf-8-sig")
        names = _from_json(json.loads(text)) if path.suffix.lower() == ".json" else _from_lines(text)
    except OSError as error:
        raise DataError(f"--classes {path} cannot be read: {error.strerror}.") from error
    except ValueError as error:  # of JSON and of UTF-8, too
        raise DataError(f"--classes {path} is not a list of class names: {error}.") from error
    names = tuple(normalize("NFC", name) for name in names)
    if len(set(names)) < len(names) or not names:
        twice = next((name for name in names if names.count(name) > 1), None)
        raise DataError(f"--classes {path} {f'has {twice!r} twice' if twice is not None else 'has no names'}.")
    return names


def shown(name: str) -> str:
    """A file or class name that can be printed on one line: what is not UTF-8 or not printable as \\xe9."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def _in_natural_order(names: Sequence[str]) -> Numbering:
    natural, text = sorted(names, key=natural_key), sorted(names)
    place = {name: number for number, name in enumerate(natural)}
    if natural == text:
        return Numbering(numbers=[place[name] for name in names], names=tuple(natural))
    number = next(number for number, name in enumerate(natural) if text[number] != name)
    note = (
        f"Classes are numbered in natural order, as timm does: number {number} is '{shown(natural[number])}'. In "
        f"alphabetical order, as torchvision does, it would be '{shown(text[number])}'. Pass --classes FILE to state "
        "the order of the checkpoints."
    )
    there = {name: number for number, name in enumerate(text)}
    return Numbering(
        numbers=[place[name] for name in names],
        names=tuple(natural),
        notes=(note,),
        alternatives={"alphabetical order": [there[name] for name in natural]},
    )


def _by_list(names: Sequence[str], num_classes: int, where: str, listed: Sequence[str]) -> Numbering:
    if len(listed) != num_classes:
        raise DataError(f"--classes names {len(listed)} classes, the family has {num_classes}.")
    place = {name: number for number, name in enumerate(listed)}
    odd = [name for name in names if name not in place]
    if odd:
        raise DataError(
            f"{where} has classes that --classes does not name: {_examples(odd)}. It names {_examples(listed)}."
        )
    return Numbering(numbers=[place[name] for name in names], names=tuple(listed))


def _from_json(found: object) -> tuple[str, ...]:
    if isinstance(found, dict):
        if all(type(value) is int for value in found.values()):
            found = {number: name for name, number in found.items()}
        elif all(isinstance(key, str) and key.isdecimal() for key in found):
            # ImageNet's published class index: {"0": ["n01440764", "tench"], …}
            found = {int(key): value[0] if isinstance(value, list) and value else value for key, value in found.items()}
        if sorted(map(str, found)) != sorted(map(str, range(len(found)))):
            raise ValueError("its numbers are not 0, 1, 2, …")
        found = [found[number] for number in range(len(found))]
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError("expected a list of texts, or an object of names and numbers")
    return tuple(found)


def _from_lines(text: str) -> tuple[str, ...]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and all(_SYNSET.match(line) for line in lines):
        return tuple(line[:9] for line in lines)
    return tuple(lines)


def _imagenet_numbers() -> dict[str, int]:
    from timm.data import ImageNetInfo  # not at the top: evaluating on images of all classes needs no torch

    return {synset: number for number, synset in enumerate(ImageNetInfo(IMAGENET).label_names())}


def _examples(names: Sequence[str]) -> str:
    some = ", ".join(shown(name) for name in sorted(names, key=natural_key)[:5])
    return f"{some}, …" if len(names) > 5 else some
