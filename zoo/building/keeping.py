"""How results of stages are kept: numbers as JSON, weights as safetensors."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from klas_zoo.building.cache import Json


def write_tensors(module: nn.Module, file: Path) -> None:
    tensors: dict[str, Tensor] = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    try:
        save_file(tensors, file)
    except SafetensorError as error:
        # it tells of the disk in words only
        full = "No space left" in str(error) or "StorageFull" in str(error)
        raise OSError(errno.ENOSPC if full else errno.EIO, str(error), str(file)) from error


def write_json(value: Json, file: Path) -> None:
    file.write_text(json.dumps(value, sort_keys=True) + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
