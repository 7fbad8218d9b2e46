"""What a family is: an ordered list of anchors, written down in a small TOML file.

    name = "mine"
    input_shape = [3, 224, 224]
    num_classes = 100
    weights_license = "mit"                     # optional; of the anchors' weights

    [[anchors]]                                 # smallest first
    name = "tiny"
    model = "deit_tiny_patch16_224"             # any name timm knows
    checkpoint = "tiny.safetensors"             # relative to this file; left out: timm's own weights
    arguments = { drop_path_rate = 0.1 }        # passed to timm's constructor

`model` may also be `hf-hub:owner/name` or `local-dir:folder`. Where timm prepares the images of the anchors
differently, `images = { crop_pct = 0.95, interpolation = "bicubic" }` states how they are prepared for all.

Imports nothing heavy: listing families costs no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from klas_zoo.errors import FamilyError, UnknownName
from klas_zoo.reading import Positive, read
from klas_zoo.routes import Direction

# a name becomes part of file names, route names and module keys
Weights = Literal["pretrained", "random"]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
"""Of a family or an anchor: it becomes part of file names and of routes."""
FRAME_FIELDS = ("crop_pct", "crop_mode", "interpolation")
IMAGE_FIELDS = (*FRAME_FIELDS, "mean", "std")
"""Of timm's data configuration: what a family file may state for all anchors."""
_CHOICES = {
    "interpolation": ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"),
    "crop_mode": ("center", "squash", "border"),
}
_LOCAL = "local-dir:"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, kw_only=True)
class AnchorSpec:
    """One network of a family: how timm builds it and where its weights are.

    `checkpoint` None means timm's own pretrained weights, fetched from the model hub.
    """

    name: str
    model: str
    checkpoint: Path | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_name(self.name)


@dataclass(frozen=True, kw_only=True)
class FamilySpec:
    """A family as its file describes it; `anchors` are ordered from small to large.

    `weights_license` is that of the anchors' weights, as their source states it. `dominated`, a clause, states
    that plain networks are both faster and more accurate than all stitches of the family, and where that
    was compared; empty where it is not known.
    `sample` is a folder of embedded images, for a family that brings its own; `direction` is the way its
    stitches run, and `buckets` the number of cost buckets of two anchors, unless the user states another; `images`
    overrides fields of timm's data configuration for all anchors; `supernet` is a file of stitches that are tuned
    already (`klas_zoo.tuning.shipped`); `quick_steps` are the optimiser steps of the preset `quick`, for a family
    whose networks are too large for the preset's own number;
    `path` is its file, None for built-in families.
    """

    name: str
    input_shape: tuple[Positive, Positive, Positive]
    num_classes: Positive
    anchors: tuple[AnchorSpec, ...]
    description: str = ""
    preset: Literal["quick", "paper"] = "quick"
    direction: Direction = "up"
    buckets: Positive = 20
    sample: Path | None = None
    images: dict[str, Any] = field(default_factory=dict)
    supernet: Path | None = None
    quick_steps: Positive | None = None
    weights_license: str = ""
    dominated: str = ""
    path: Path | None = None

    @property
    def argument(self) -> str:
        """What `--family` takes for it."""
        return self.name if self.path is None else str(self.path)

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_images(self.images, self.input_shape[0])
        names = [anchor.name for anchor in self.anchors]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ValueError(f"a family needs two anchors or more, each of another name; found {names}")

    def anchor(self, name: str) -> AnchorSpec:
        for anchor in self.anchors:
            if anchor.name == name:
                return anchor
        raise UnknownName("anchor", name, [a.name for a in self.anchors])


def builtin_families() -> dict[str, FamilySpec]:
    """The families that come with klas-zoo, by name."""
    specs = map(read_family, _builtin_folder().glob("*.toml"))
    return {spec.name: spec for spec in sorted(specs, key=lambda spec: spec.name)}


def find_family(name_or_path: str | Path) -> FamilySpec:
    """A built-in family by its name, or a user's own by the path of its TOML file.

    Raises:
        UnknownName: neither a built-in family nor a file.
        FamilyError: the file is no family.
    """
    name_or_path = str(name_or_path)
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
        content = path.read_bytes()
    except OSError as error:
        raise FamilyError(f"Family file {path} cannot be read: {error.strerror}.") from error

    def beside(kind: type, value: object) -> Path:
        if not isinstance(value, str) or not value:
            raise ValueError(f"expected the path of a file, got {value!r}")
        if "://" in value:
            raise ValueError(f"{value} is a URL: download the file, and give its path")
        return path.parent / Path(value).expanduser()

    content = content.removeprefix(_BOM)  # which some editors write, and TOML does not know
    spec = read(content, FamilySpec, f"Family file {path}", FamilyError, form="TOML", hook=beside)
    own = None if path.parent == _builtin_folder() else path
    return replace(spec, path=own, anchors=tuple(_with_folder_beside(anchor, path) for anchor in spec.anchors))


def _with_folder_beside(anchor: AnchorSpec, path: Path) -> AnchorSpec:
    """A folder that describes a model lies relative to the family file, as checkpoints do."""
    if not anchor.model.startswith(_LOCAL):
        return anchor
    folder = path.parent / Path(anchor.model.removeprefix(_LOCAL)).expanduser()
    return replace(anchor, model=f"{_LOCAL}{folder}")


def _check_images(found: dict[str, Any], channels: int) -> None:
    odd = next((name for name in found if name not in IMAGE_FIELDS), None)
    if odd is not None:
        raise ValueError(f"images takes {', '.join(IMAGE_FIELDS)}, not {odd}")
    crop = found.get("crop_pct", 1.0)
    if type(crop) not in (int, float) or not 0 < crop <= 1:
        raise ValueError(f"crop_pct is a share above 0 and up to 1, not {crop!r}")
    for name, choices in _CHOICES.items():
        if name in found and found[name] not in choices:
            raise ValueError(f"{name} is one of {', '.join(choices)}, not {found[name]!r}")
    for name in ("mean", "std"):
        values = found.get(name, [1.0] * channels)
        plain = isinstance(values, list) and all(type(one) in (int, float) and math.isfinite(one) for one in values)
        if not plain or len(values) != channels or (name == "std" and min(values) <= 0):
            raise ValueError(f"{name} is a number for each of the {channels} channels, not {values!r}")


def _check_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise ValueError(f"a name is made of letters, digits, - and _, not '{name}'")


def _builtin_folder() -> Path:
    return Path(str(resources.files("klas_zoo") / "builtin"))
