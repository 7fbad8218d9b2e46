"""A tuned supernet that comes with a family: one safetensors file beside the anchors' weights.

What tuning changed little is stored as little. A matrix of an anchor is there as its difference from the anchor's own
weights, int8 with a scale for every row (`<name>.delta`, `<name>.scale`); the difference is small, and so is the
rounding. Everything else is fp16 under its own name: stitching layers, routes' own tensors, biases and norms. A
tensor that is missing is the anchor's. The header says which routes there are, which anchors they belong to
(by the fingerprint of their weights), which of these run with the weights they came with, and how accurate all are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from klas_zoo.chains import Chain
from klas_zoo.errors import WeightsError
from klas_zoo.routes import Route
from klas_zoo.supernet import Supernet
from klas_zoo.tensors import write_tensors

SCHEMA_VERSION = 1
_HEADER = "klas_zoo"


@dataclass(frozen=True, kw_only=True)
class ShippedSupernet:
    """A file and its header.

    Attributes:
        anchors: fingerprint of each anchor's weights.
        originals: anchors that run with the weights they came with.
        top1: of every route on `images`, in per cent.
    """

    path: Path
    anchors: Mapping[str, str]
    originals: tuple[str, ...]
    top1: Mapping[Route, float]
    images: str

    @classmethod
    def read(cls, path: Path) -> ShippedSupernet:
        """
        Raises:
            WeightsError: it cannot be read, or a newer version wrote it.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})[_HEADER])
            if header["schema_version"] > SCHEMA_VERSION:
                raise WeightsError(f"{path} was written by a newer klas-zoo: upgrade klas-zoo.")
            return cls(
                path=path, anchors=header["anchors"], originals=tuple(header["originals"]), images=header["images"],
                top1={Route.from_json(route): top1 for route, top1 in header["routes"]},
            )  # fmt: skip
        except (safetensors.SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise WeightsError(f"{path} cannot be read as a family's tuned supernet ({error}).") from error

    @property
    def routes(self) -> tuple[Route, ...]:
        return tuple(self.top1)

    def load(self, chains: Mapping[str, Chain], fingerprints: Mapping[str, str]) -> Supernet:
        """The supernet, of copies of the anchors that it was tuned from, in evaluation mode.

        Raises:
            WeightsError: the anchors have other weights, or the file is damaged.
        """
        if dict(fingerprints) != dict(self.anchors):
            raise WeightsError(
                f"{self.path} was tuned from other weights than these anchors have: pass --preset quick."
            )
        copies = {name: copy.deepcopy(chain) for name, chain in chains.items()}
        try:
            state = unpacked(load_file(self.path), anchor_state(copies))
            supernet = Supernet.of_state(copies, self.routes, state)
            supernet.load_state_dict(state)
        except (safetensors.SafetensorError, RuntimeError, KeyError, OSError) as error:
            raise WeightsError(f"{self.path} is not the supernet of this family: install klas-zoo again.") from error
        for name in self.originals:
            supernet.keep_original(name, copy.deepcopy(chains[name]))
        return supernet.eval()


def write_shipped(
    path: Path, supernet: Supernet, chains: Mapping[str, Chain], header: Mapping[str, Any]
) -> None:
    """Writes a tuned supernet as its difference from the anchors that it was tuned from.

    Args:
        header: `anchors`, `originals`, `images` and `routes` as `ShippedSupernet` has them.

    Raises:
        OSError: the file cannot be written.
    """
    state = {name: one for name, one in supernet.state_dict().items() if not name.startswith("originals.")}
    text = json.dumps({"schema_version": SCHEMA_VERSION, **header}, sort_keys=True)
    write_tensors(packed(state, anchor_state(chains)), path, metadata={_HEADER: text})


def anchor_state(chains: Mapping[str, Chain]) -> dict[str, Tensor]:
    """Tensors of anchors by their names in a supernet."""
    return {
        f"chains.anchor_{anchor}.{name}": tensor
        for anchor, chain in chains.items()
        for name, tensor in chain.state_dict().items()
    }


def packed(state: Mapping[str, Tensor], anchors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A supernet's state as the tensors of a file."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        base = anchors.get(name)
        if base is not None and torch.equal(base, tensor):
            continue
        if base is None or tensor.ndim < 2 or not tensor.is_floating_point():
            found[name] = tensor.half() if tensor.is_floating_point() else tensor
            continue
        rows = (tensor - base).flatten(1)
        # rounded up to what fp16 holds, so that no value exceeds 127
        scale = (rows.abs().amax(1) / 127 * (1 + 2**-10)).clamp_min(2**-24).half()
        found[f"{name}.scale"] = scale
        found[f"{name}.delta"] = (rows / scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
    return found


def unpacked(file: Mapping[str, Tensor], anchors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file as a supernet's state, fp32."""
    state = {name: tensor.detach().clone() for name, tensor in anchors.items()}
    for name, tensor in file.items():
        if name.endswith(".delta"):
            owner = name.removesuffix(".delta")
            rows = tensor.float() * file[f"{owner}.scale"].float()[:, None]
            state[owner] = state[owner] + rows.view_as(state[owner]).to(state[owner].device)
        elif not name.endswith(".scale"):
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
    return state
