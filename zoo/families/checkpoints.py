"""Checkpoints as training scripts write them: tensors by name, whatever is wrapped around them.

Read are what timm's train.py, torchvision's references, Lightning and the official releases of DeiT, Swin, LeViT and
ConvNeXt write: a state dict under a key, running averages beside it, prefixes of wrappers, settings and counters.
No code in a file is ever run. Objects that such files hold beside their weights (argparse.Namespace, numpy scalars,
paths) become inert placeholders; their own classes are never called, because even unpickling a numpy dtype can
corrupt memory.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from klas_zoo.errors import WeightsError, first_line
from klas_zoo.reading import is_plain_name

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".pth.tar", ".safetensors.index.json", ".bin.index.json")
IN_FOLDERS = ("model", "pytorch_model")
"""Stems of the weights in a folder of their own, as the Hugging Face hub has them."""
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "model_ema_state_dict", "ema")
KEYS = ("state_dict", "model", "model_state_dict", "model_state", "module", "net", "network", "weights", "params")
_INDEX = ".index.json"
_LOCK = threading.Lock()
_GLOBAL = re.compile(r"GLOBAL (\w+(?:\.\w+)*) was not")


class _Inert:
    """Stands in for an object that is not needed; nothing of it is called."""

    def __new__(cls, *args: object, **options: object) -> _Inert:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...
    def append(self, item: object) -> None: ...
    def extend(self, items: object) -> None: ...
    def __setitem__(self, key: object, item: object) -> None: ...


def _table(*factory: object) -> OrderedDict[Any, Any]:
    """Stands in for collections.defaultdict, of which only the items are read."""
    return OrderedDict()


_PLACEHOLDERS: list[Any] = [
    (_table, "collections.defaultdict"),
    *((_Inert, name)
    for name in (
        "argparse.Namespace", "types.SimpleNamespace", "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath",
        "pathlib.PurePosixPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "numpy.dtype",
        "numpy.ndarray", "datetime.datetime", "datetime.timedelta",
        *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
        *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
        *(f"builtins.{kind}" for kind in ("list", "dict", "tuple", "int", "float", "str", "bool")),
        *(f"numpy.dtypes.{kind}DType" for kind in ("Float64", "Float32", "Float16", "Int64", "Int32", "Bool", "Str")),
    )),
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Tensors by name, as the file has them, and what was done to find them."""

    path: Path
    state: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors of `read_checkpoint` alone."""
    return read_checkpoint(path).state


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Tensors by name from a safetensors file, a torch checkpoint, an index of several such files, or a folder of
    them; no code in a file is ever run.

    Where there are running averages of the weights (EMA), they are taken, as timm does.

    Raises:
        WeightsError: missing, truncated, not a checkpoint at all, or one that asks for code.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise WeightsError(f"Weights {path} do not exist.")
    if path.name.lower().endswith(_INDEX):
        return _from_index(path)
    notes: list[str] = []
    found = _read_file(path)
    found = _unwrap(found, notes)
    state = _tensors(found, path, notes)
    return Checkpoint(path=path, state=state, notes=tuple(notes))


def find_weights(folder: Path, stems: Iterable[str]) -> Path | None:
    """The checkpoint of an anchor in a folder: a file `<stem>` with a known suffix in any case of letters, or a
    folder `<stem>` that holds `model.safetensors` or the like.
    """
    try:
        names = {entry.name.lower(): Path(entry.path) for entry in os.scandir(folder)}
    except OSError:
        return None
    for stem in stems:
        for suffix in SUFFIXES:
            path = names.get(f"{stem}{suffix}".lower())
            if path is not None and path.is_file():
                return path
        place = names.get(stem.lower())
        if place is not None and place.is_dir() and (found := find_weights(place, IN_FOLDERS)) is not None:
            return found
    return None


def _in_folder(folder: Path) -> Path:
    found = find_weights(folder, IN_FOLDERS)
    if found is None:
        raise WeightsError(f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or an index.")
    return found


def _from_index(path: Path) -> Checkpoint:
    """Of weights in several files, as the Hugging Face hub splits them."""
    try:
        names = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
        files = sorted(set(names))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path} is not an index of weights: it needs a table 'weight_map'.") from error
    odd = next((name for name in files if not is_plain_name(name) or name.lower().endswith(_INDEX)), None)
    if odd is not None:
        raise WeightsError(f"{path} names {odd!r}, which is not a file beside it.")
    state: dict[str, Tensor] = {}
    for name in files:
        state |= read_checkpoint(path.with_name(name)).state
    missing = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"]) - state.keys())
    if missing:
        raise WeightsError(f"{path} promises {missing[0]}, which none of its {len(files)} files holds.")
    return Checkpoint(path=path, state=state, notes=(f"{len(files)} files",))


def _read_file(path: Path) -> Any:
    with path.open("rb") as file:
        head = file.read(512)
    if what := _other_kind(head):
        raise WeightsError(f"{path} is {what}")
    try:
        if _is_safetensors(head):
            return load_file(path)
        if path.suffix.lower() == ".safetensors":
            raise safetensors.SafetensorError("its header is damaged")
        # torch keeps what is allowed in one place for all threads
        with _LOCK, warnings.catch_warnings(), torch.serialization.safe_globals(_PLACEHOLDERS):
            warnings.simplefilter("ignore")  # about formats, which are checked below
            return torch.load(path, map_location="cpu", weights_only=True)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}): copy it again.") from error
    except pickle.UnpicklingError as error:
        wanted = _GLOBAL.findall(str(error))
        if wanted:
            raise WeightsError(
                f"{path} is a pickle that asks for {wanted[0]}, which could run code, so it is not read: save "
                "model.state_dict() instead, with torch.save or as safetensors."
            ) from error
        raise WeightsError(f"{path} is a pickle that would run code or is damaged: save a state dict.") from error
    except Exception as error:  # a damaged pickle raises nearly anything
        if "TorchScript" in str(error):
            raise WeightsError(f"{path} is a TorchScript archive: save its state_dict() instead.") from error
        raise WeightsError(f"{path} is not a whole torch checkpoint ({first_line(error)}).") from error


def _other_kind(head: bytes) -> str:
    """What a file is that people take for a checkpoint, and what to do; empty for one that may be one."""
    start = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the weights: fetch them with git lfs pull."
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, not weights: the download was answered by a page, such as one that asks to log in."
    if head.startswith(b"\x1f\x8b"):
        return "compressed by gzip: unpack it first."
    if head.startswith(b"\x89HDF"):
        return "an HDF5 file, as Keras writes it: convert it to a state dict of torch."
    return ""


def _is_safetensors(head: bytes) -> bool:
    """Whatever the suffix: the length of a JSON header, and its first character."""
    return len(head) > 9 and head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32


def _unwrap(found: Any, notes: list[str]) -> Any:
    """What lies under the keys that training scripts use, running averages first."""
    while isinstance(found, Mapping):
        taken = next((key for key in (*EMA_KEYS, *KEYS) if isinstance(found.get(key), Mapping) and found[key]), None)
        if taken is None:
            break
        others = [key for key in KEYS if isinstance(found.get(key), Mapping) and key != taken]
        if taken in EMA_KEYS:
            notes.append(f"EMA weights ({taken}{f', not {others[0]}' if others else ''})")
        else:
            notes.append(f"weights under {taken}")
        found = found[taken]
    return found


def _tensors(found: Any, path: Path, notes: list[str]) -> dict[str, Tensor]:
    if not isinstance(found, Mapping):
        raise WeightsError(f"{path} is not a state dict: expected tensors by name, found {_kind(found)}.")
    state = {str(name): value.detach() for name, value in found.items() if isinstance(value, Tensor)}
    others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if not state:
        known = ", ".join(others[:5]) or "nothing"
        raise WeightsError(f"{path} is not a state dict: expected tensors by name, found {known}.")
    if others:
        notes.append(f"not tensors, left out: {', '.join(others[:3])}{', …' if len(others) > 3 else ''}")
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            kind = "without data (on the device meta)" if tensor.is_meta else "sparse or quantised"
            raise WeightsError(f"{path} holds tensors that are {kind}, such as {name}: save ordinary ones.")
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in state.values() if tensor.is_floating_point()}
    if kinds and kinds != {"float32"}:
        notes.append(f"converted from {', '.join(sorted(kinds))}")
    return state


def _kind(found: Any) -> str:
    return "one tensor" if isinstance(found, Tensor) else f"a {type(found).__name__}"
