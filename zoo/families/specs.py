"""What a family is: an ordered list of anchors, written down in a small TOML file.

    name = "mine"
    input_shape = [3, 224, 224]
    num_classes = 100

    [[anchors]]                                 # cheapest first
    name = "tiny"
    model = "deit_tiny_patch16_224"             # any name timm knows
    checkpoint = "tiny.safetensors"             # relative to this file; left out: timm's own weights
    arguments = { drop_path_rate = 0.1 }        # passed to timm's constructor

Imports nothing heavy: listing families costs no torch.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, cast

from klas_zoo.errors import FamilyError, UnknownName
from klas_zoo.routes import DIRECTIONS, Direction

# a name becomes part of file names, route names and module keys
Weights = Literal["pretrained", "random"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Of a family or an anchor: it becomes part of file names and of routes."""
PRESETS = ("quick", "paper")
_IN_TOML = {str: "a string", int: "an integer", list: "an array", dict: "a table"}


@dataclass(frozen=True, kw_only=True)
class AnchorSpec:
    """One network of a family: how timm builds it and where its weights are.

    `checkpoint` None means timm's own pretrained weights, fetched from the model hub.
    """

    name: str
    model: str
    checkpoint: Path | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """A family as its file describes it; `anchors` are ordered from cheap to dear.

    `sample` is a folder of embedded images, for a family that brings its own; `direction` is the way its
    stitches run unless the user says so.
    """

    name: str
    description: str
    input_shape: tuple[int, int, int]
    num_classes: int
    anchors: tuple[AnchorSpec, ...]
    preset: str = "quick"
    direction: Direction = "up"
    sample: Path | None = None

    def anchor(self, name: str) -> AnchorSpec:
        for anchor in self.anchors:
            if anchor.name == name:
                return anchor
        raise UnknownName("anchor", name, [a.name for a in self.anchors])


def builtin_families() -> dict[str, FamilySpec]:
    """The families that come with klas-zoo, by name."""
    specs = map(read_family, _builtin_folder().glob("*.toml"))
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}


def find_family(name_or_path: str) -> FamilySpec:
    """A built-in family by its name, or a user's own by the path of its TOML file.

    Raises:
        UnknownName: neither a built-in family nor a file.
        FamilyError: the file is no family.
    """
    if name_or_path.endswith(".toml"):
        return read_family(Path(name_or_path))
    known = builtin_families()
    if name_or_path not in known:
        raise UnknownName("family", name_or_path, known, "A family of your own is named by its .toml file.")
    return known[name_or_path]


def read_family(path: Path) -> FamilySpec:
    """Reads a family file.

    Raises:
        FamilyError: it cannot be read, or a field is missing, unknown or of the wrong kind.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FamilyError(f"Family file {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FamilyError(f"Family file {path} is not TOML: {error}.") from error
    fields = _Fields(table, str(path))
    shape = tuple(fields.take("input_shape", list))
    if len(shape) != 3 or not all(type(size) is int and size > 0 for size in shape):
        raise FamilyError(f"{path}: input_shape is [channels, height, width], not {list(shape)}.")
    entries = fields.take("anchors", list)
    anchors = tuple(_read_anchor(entry, path, number) for number, entry in enumerate(entries, start=1))
    names = [anchor.name for anchor in anchors]
    if len(anchors) < 2 or len(set(names)) < len(names):
        raise FamilyError(f"{path}: a family needs two anchors or more, each of another name; found {names}.")
    sample = fields.take("sample", str, "")
    spec = FamilySpec(
        name=fields.name(),
        description=fields.take("description", str, ""),
        input_shape=shape,
        num_classes=fields.positive("num_classes"),
        anchors=anchors,
        preset=fields.one_of("preset", PRESETS, "quick"),
        direction=cast(Direction, fields.one_of("direction", DIRECTIONS, "up")),
        sample=path.parent / sample if sample else None,
    )
    fields.nothing_left()
    return spec


def _read_anchor(entry: object, path: Path, number: int) -> AnchorSpec:
    if not isinstance(entry, dict):
        raise FamilyError(f"{path}: every anchor is a table of its own, [[anchors]].")
    fields = _Fields(entry, f"{path}, anchor {number}")
    checkpoint = fields.take("checkpoint", str, "")
    anchor = AnchorSpec(
        name=fields.name(),
        model=fields.take("model", str),
        checkpoint=path.parent / checkpoint if checkpoint else None,
        arguments=fields.take("arguments", dict, {}),
    )
    fields.nothing_left()
    return anchor


class _Fields:
    """Takes typed fields out of a TOML table and says where and which field was wrong."""

    def __init__(self, table: dict[str, Any], where: str) -> None:
        self._left = dict(table)
        self._where = where

    def take(self, name: str, kind: type, default: Any = None) -> Any:
        value = self._left.pop(name, default)
        if value is None:
            raise FamilyError(f"{self._where}: the field {name} is missing.")
        if not isinstance(value, kind):
            raise FamilyError(f"{self._where}: {name} must be {_IN_TOML[kind]}, not {value!r}.")
        return value

    def name(self) -> str:
        name: str = self.take("name", str)
        if not NAME.fullmatch(name):
            raise FamilyError(f"{self._where}: a name is made of letters, digits, - and _, not '{name}'.")
        return name

    def positive(self, name: str) -> int:
        value = self.take(name, int)
        if isinstance(value, bool) or value < 1:
            raise FamilyError(f"{self._where}: {name} must be a number above zero, not {value!r}.")
        return int(value)

    def one_of(self, name: str, choices: tuple[str, ...], default: str) -> str:
        value: str = self.take(name, str, default)
        if value not in choices:
            raise FamilyError(f"{self._where}: {name} is one of {', '.join(choices)}, not '{value}'.")
        return value

    def nothing_left(self) -> None:
        if self._left:
            raise FamilyError(f"{self._where}: unknown fields {', '.join(sorted(map(str, self._left)))}.")


def _builtin_folder() -> Path:
    return Path(str(resources.files("klas_zoo") / "builtin"))
