"""The tuned supernet inside a package of fp32 ONNX graphs, without storing its weights a second time.

The exporter renames, transposes and folds tensors, but most of a supernet's tensors are in the weights file of its
graphs byte for byte, as they are or transposed. The manifest says where; the few others (small ones, folded
ones, stitching layers of routes without an engine) are in a file beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from klas_zoo.errors import DamagedPackage
from klas_zoo.exporters.manifest import StoredTensor
from klas_zoo.exporters.package import Package
from klas_zoo.exporters.weights import WeightsFile

SUPERNET = "supernet.safetensors"


def store_supernet(supernet: nn.Module, weights: WeightsFile, folder: Path) -> dict[str, StoredTensor]:
    """Finds a supernet's tensors among the weights of its graphs; the others are written to `SUPERNET`.

    Returns:
        where each tensor that was found is, by its name in the supernet.

    Raises:
        OSError: the file cannot be written.
    """
    found: dict[str, StoredTensor] = {}
    others: dict[str, Tensor] = {}
    for name, tensor in supernet.state_dict().items():
        plain = tensor.detach().cpu().contiguous()
        place = _place(plain, weights) if plain.dtype == torch.float32 else None
        if place is None:
            others[name] = plain
        else:
            found[name] = place
    # not save_file, which makes the file readable for its owner only
    (folder / SUPERNET).write_bytes(save(others))
    return found


def _place(tensor: Tensor, weights: WeightsFile) -> StoredTensor | None:
    shape = tuple(tensor.shape)
    offset = weights.find(_digest(tensor))
    if offset is not None:
        return StoredTensor(offset=offset, shape=shape, transposed=False)
    if tensor.ndim == 2 and (offset := weights.find(_digest(tensor.T.contiguous()))) is not None:
        return StoredTensor(offset=offset, shape=shape, transposed=True)
    return None


def _digest(tensor: Tensor) -> bytes:
    return hashlib.sha256(tensor.numpy().tobytes()).digest()


def moved(tensors: Mapping[str, StoredTensor], offsets: Mapping[int, int]) -> dict[str, StoredTensor]:
    """The same after tensors of the weights file got other offsets."""
    return {name: replace(one, offset=offsets[one.offset]) for name, one in tensors.items()}


def read_supernet(package: Package) -> dict[str, Tensor]:
    """Every tensor of the supernet by its name; most are mapped from the weights file, not copied.

    Raises:
        DamagedPackage: the package has no supernet, or a tensor reaches beyond its file.
    """
    stored = package.manifest.supernet
    if stored is None:
        raise DamagedPackage(f"{package.folder} holds no supernet.")
    path, size = package.weights, package.weights.stat().st_size
    # a private mapping: whoever trains on changes neither the file nor another process's view
    content = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    try:
        state = load_file(package.folder / stored.file)
    except Exception as error:  # what its Rust part raises has no common class
        raise DamagedPackage(f"{package.folder / stored.file} is no safetensors file ({error}).") from error
    for name, one in stored.tensors.items():
        count = 4 * torch.Size(one.shape).numel()
        if one.offset + count > size:
            raise DamagedPackage(f"{package.folder}: {name} reaches beyond the end of {path.name}.")
        flat = content[one.offset : one.offset + count].view(torch.float32)
        state[name] = flat.view(one.shape[::-1]).T.contiguous() if one.transposed else flat.view(one.shape)
    return state
