"""GPUs an engine can be built for, by the compute capability that decides whether it runs there.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from klas_zoo.errors import UnknownName


@dataclass(frozen=True, order=True)
class ComputeCapability:
    """NVIDIA's number for what a GPU can execute; `str` gives `8.0`."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"

    @property
    def sm(self) -> str:
        """As the libraries' constants and file names have it: `SM80`."""
        return f"SM{self.major}{self.minor}"

    @classmethod
    def parse(cls, text: str) -> ComputeCapability:
        """From a capability (`8.0`), its short form (`sm80`) or a GPU's name (`a100`).

        Raises:
            UnknownName: it is none of these.
        """
        written = text.strip().lower()
        if written in GPUS:
            written = GPUS[written]
        found = re.fullmatch(r"(\d+)\.(\d)", written) or re.fullmatch(r"sm_?(\d+)(\d)", written)
        if not found:
            raise UnknownName("GPU", text, GPUS, "A compute capability, such as 8.0, names any other.")
        return cls(int(found[1]), int(found[2]))


# https://developer.nvidia.com/cuda-gpus
GPUS = {
    "t4": "7.5", "rtx2080": "7.5",
    "a100": "8.0", "a30": "8.0",
    "a10": "8.6", "a40": "8.6", "a6000": "8.6", "rtx3080": "8.6", "rtx3090": "8.6",
    "orin": "8.7",
    "l4": "8.9", "l40": "8.9", "l40s": "8.9", "rtx4080": "8.9", "rtx4090": "8.9",
    "h100": "9.0", "h200": "9.0",
    "b200": "10.0",
    "rtx5080": "12.0", "rtx5090": "12.0",
}  # fmt: skip


def present_capability() -> ComputeCapability | None:
    """Of this machine's first GPU; None where torch finds none."""
    import torch

    if not torch.cuda.is_available():
        return None
    return ComputeCapability(*torch.cuda.get_device_capability(0))
