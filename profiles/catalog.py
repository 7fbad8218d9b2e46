"""What is publicly known of devices, `devices.json`: peaks, memory, and their sources. Imports nothing heavy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from klas_zoo.errors import UnknownName

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")
BYTES_OF: Mapping[str, int] = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Of one number in memory, by precision."""
_FILE = Path(__file__).with_name("devices.json")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a figure can be read."""

    title: str
    url: str


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """A kind of device as its vendor describes it.

    Attributes:
        cuda_names: what CUDA calls it, without the vendor.
        compute_capability: None for what is no CUDA device.
        memory_gb, bandwidth_gb_s: of its own memory; None of the cpu, which is whichever this machine has.
        peak_tflops: by precision, dense, a multiply-add counted twice.
        sources: of each figure, by its name.
    """

    name: str
    aliases: tuple[str, ...]
    vendor: str
    kind: str
    cuda_names: tuple[str, ...]
    compute_capability: str | None
    memory_gb: float | None
    bandwidth_gb_s: float | None
    peak_tflops: Mapping[str, float]
    sources: Mapping[str, Source]

    def peak(self, precision: str) -> float | None:
        """TFLOPS in a precision; a device that cannot compute in it has none."""
        return self.peak_tflops.get(precision)

    def is_cuda_device(self, name: str) -> bool:
        """Whether a device that CUDA calls `name` is one of these."""
        return name.removeprefix("NVIDIA ").strip() in self.cuda_names


@cache
def catalog() -> Mapping[str, DeviceSpec]:
    """Every device of `devices.json` by its name, in the file's order."""
    return read_catalog(_FILE.read_text(encoding="utf-8"))


def read_catalog(text: str) -> dict[str, DeviceSpec]:
    """Devices by name from the text of a catalog.

    Raises:
        ValueError: two devices share a name, a figure is none or says not where it comes from.
    """
    table = json.loads(text)
    sources = {name: Source(**one) for name, one in table["sources"].items()}
    found: dict[str, DeviceSpec] = {}
    taken: set[str] = set()
    for entry in table["devices"]:
        spec = DeviceSpec(
            **{name: entry[name] for name in ("name", "vendor", "kind", "compute_capability")},
            **{name: entry[name] for name in ("memory_gb", "bandwidth_gb_s", "peak_tflops")},
            aliases=tuple(entry["aliases"]),
            cuda_names=tuple(entry["cuda_names"]),
            sources={figure: sources[named] for figure, named in entry["figures_from"].items()},
        )
        _check(spec)
        names = {spec.name, *spec.aliases}
        if names & taken:
            raise ValueError(f"two devices are called {', '.join(sorted(names & taken))}")
        taken |= names
        found[spec.name] = spec
    return found


def find_spec(name: str) -> DeviceSpec | None:
    """The device with that name or alias, whatever the case; None where the catalog has none."""
    lower = name.lower()
    return next((spec for spec in catalog().values() if lower in (spec.name, *spec.aliases)), None)


def canonical(name: str) -> str:
    """The name that stands for an alias; a name the catalog does not know stays as it is."""
    spec = find_spec(name)
    return spec.name if spec else name


def spec_of_cuda_device(name: str) -> DeviceSpec | None:
    """The catalog's entry for what CUDA calls `name`."""
    return next((spec for spec in catalog().values() if spec.is_cuda_device(name)), None)


def unknown(name: str, others: frozenset[str] = frozenset()) -> UnknownName:
    """The error for a device nobody knows; `others` are names that only profiles have."""
    names = {one for spec in catalog().values() for one in (spec.name, *spec.aliases)}
    return UnknownName("device", name, names | {"cuda"} | others, "klas-zoo devices lists them.")


def _check(spec: DeviceSpec) -> None:
    figures = {"memory_gb": spec.memory_gb, "bandwidth_gb_s": spec.bandwidth_gb_s}
    figures |= {f"peak_tflops.{precision}": peak for precision, peak in spec.peak_tflops.items()}
    for name, figure in figures.items():
        if figure is None and spec.kind == "cpu":
            continue
        if not isinstance(figure, (int, float)) or not 0 < figure < math.inf:
            raise ValueError(f"{spec.name}: {name} is above zero, not {figure!r}")
        if name.partition(".")[0] not in spec.sources:
            raise ValueError(f"{spec.name}: nobody says where {name} comes from")
    if not spec.peak_tflops.keys() <= set(PRECISIONS):
        raise ValueError(f"{spec.name}: a peak in {set(spec.peak_tflops) - set(PRECISIONS)}")
