"""GPUs an engine can be built for, by the compute capability that decides whether it runs there.

Imports nothing heavy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from klas_zoo import hardware
from klas_zoo.profiles.catalog import find_spec, unknown
from klas_zoo.profiles.devices import device_name


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
        """From a capability (`8.0`), its short form (`sm80`) or the name of a device (`a100`, `cuda`).

        Raises:
            AbsentDevice: `cuda`, and this machine has no GPU.
            UnknownName: it is none of these, or no CUDA device.
        """
        written = text.strip().lower()
        spec = find_spec(device_name(written))
        if spec and spec.compute_capability:
            written = spec.compute_capability
        found = re.fullmatch(r"(\d+)\.(\d)", written) or re.fullmatch(r"sm_?(\d+)(\d)", written)
        if not found:
            raise unknown(text)
        return cls(int(found[1]), int(found[2]))


def present_capability() -> ComputeCapability | None:
    """Of this machine's first GPU; None where torch finds none."""
    found = hardware.present_capability()
    return ComputeCapability.parse(found) if found else None
