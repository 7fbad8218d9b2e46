"""What is publicly known of devices, `devices.json`: peaks, memory, and their sources. Imports nothing heavy."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from klas_zoo.errors import UnknownName

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "int8")
BYTES_OF: Mapping[str, int] = {"fp32": 4, "tf32": 4, "fp16": 2, "bf16": 2, "int8": 1}
"""Of one number in memory, by precision."""
_FILE = Path(__file__).with_name("devices.json")


@dataclass(frozen=True, kw_only=True)
class SpecSource:
    """Where a figure can be read."""

    title: str
    url: str


@dataclass(frozen=True, kw_only=True)
class Mig:
    """Slices of a card (multi-instance GPU), by what the vendor's guide says of them.

    Attributes:
        compute: share of the card's streaming multiprocessors in one of its compute slices, the `1` of `1g.5gb`.
        slices: compute slices that there are.
        memory: memory slices that there are; each has the same share of memory and bandwidth.
    """

    compute: float
    slices: int
    memory: int


@dataclass(frozen=True, kw_only=True)
class DeviceSpec:
    """A kind of device as its vendor describes it.

    Attributes:
        cuda_names: what CUDA calls it, without the vendor.
        family: the word that names of its kind have in common, such as `A100`; None: only `cuda_names` count.
        form: `PCIe` or `NVL` where cards of that form differ from the others of the family, else empty.
        processors: streaming multiprocessors, where CUDA gives several devices one name.
        compute_capability: None for what is no CUDA device.
        memory_gb, bandwidth_gb_s: of its own memory; None of the cpu, which is whichever this machine has.
        peak_tflops: by precision, dense, a multiply-add counted twice.
        mig: how a card of this kind is divided; None where it cannot be.
        sources: of each figure, by its name.
    """

    name: str
    aliases: tuple[str, ...]
    vendor: str
    kind: str
    cuda_names: tuple[str, ...]
    family: str | None
    form: str
    processors: int | None
    compute_capability: str | None
    memory_gb: float | None
    bandwidth_gb_s: float | None
    peak_tflops: Mapping[str, float]
    sources: Mapping[str, SpecSource]
    mig: Mig | None = None

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
        ValueError: two devices share a name, a figure is not a positive number or has no source.
    """
    table = json.loads(text)
    sources = {name: SpecSource(**one) for name, one in table["sources"].items()}
    found: dict[str, DeviceSpec] = {}
    taken: set[str] = set()
    for entry in table["devices"]:
        spec = DeviceSpec(
            **{name: entry[name] for name in ("name", "vendor", "kind", "compute_capability")},
            **{name: entry[name] for name in ("memory_gb", "bandwidth_gb_s", "peak_tflops")},
            aliases=tuple(entry["aliases"]),
            cuda_names=tuple(entry["cuda_names"]),
            family=entry.get("family"),
            form=entry.get("form", ""),
            processors=entry.get("processors"),
            sources={figure: sources[named] for figure, named in entry["figures_from"].items()},
            mig=Mig(**entry["mig"]) if "mig" in entry else None,
        )
        _check(spec)
        names = {spec.name, *spec.aliases}
        if names & taken:
            raise ValueError(f"two devices are called {', '.join(sorted(names & taken))}")
        taken |= names
        found[spec.name] = spec
    return found


def find_spec(name: str) -> DeviceSpec | None:
    """The device with that name or alias, whatever the case; None where the catalog has none.

    `a100-mig-3g.20gb` is a slice of an a100.
    """
    lower, _, size = name.lower().partition("-mig-")
    found = next((spec for spec in catalog().values() if lower in (spec.name, *spec.aliases)), None)
    return _slice(found, size) if found and size else found


def canonical(name: str) -> str:
    """The name that stands for an alias; a name the catalog does not know stays as it is."""
    spec = find_spec(name)
    return spec.name if spec else name


def spec_of_cuda_device(
    name: str, memory_bytes: float | None = None, processors: int | None = None
) -> DeviceSpec | None:
    """The catalog's entry for what CUDA calls `name`; None of a device it has no figures of.

    A name that no entry has is matched by family, form and memory: an `A100-SXM-64GB` is neither of the two
    A100 in the catalog, and `Tesla V100-PCIE-32GB` is that of 32 GB. Of a MIG slice, the card has to be known by name.
    """
    name, _, size = name.partition(" MIG ")
    if size:
        whole = [spec for spec in catalog().values() if spec.is_cuda_device(name)]
        return _slice(whole[0], size) if whole else None
    exact = [spec for spec in catalog().values() if spec.is_cuda_device(name)]
    if len(exact) < 2:
        return exact[0] if exact else _by_family(name, memory_bytes)
    # CUDA calls every Orin "Orin"
    return next((spec for spec in exact if spec.processors == processors and _fits(spec, memory_bytes)), None)


def _slice(whole: DeviceSpec, size: str) -> DeviceSpec | None:
    """`3g.20gb`, or `1c.3g.20gb` for a part of its multiprocessors; None where there is no such slice of the card."""
    found = re.fullmatch(r"(?:(\d)c\.)?(\d)g\.(\d+)gb(?:\+.*)?", size)
    if whole.mig is None or found is None or whole.memory_gb is None or whole.bandwidth_gb_s is None:
        return None
    slices, gb = int(found[2]), int(found[3])
    memory = max(round(gb / whole.memory_gb * whole.mig.memory), 1) / whole.mig.memory
    if not 1 <= int(found[1] or slices) <= slices <= whole.mig.slices or memory > 1:
        return None
    compute = whole.mig.compute * int(found[1] or slices)
    return replace(
        whole, name=f"{whole.name}-mig-{size}", aliases=(), cuda_names=(), memory_gb=gb, mig=None,
        bandwidth_gb_s=whole.bandwidth_gb_s * memory,
        peak_tflops={name: peak * compute for name, peak in whole.peak_tflops.items()},
    )  # fmt: skip


def _by_family(name: str, memory_bytes: float | None) -> DeviceSpec | None:
    words = re.split(r"[\s_-]+", name.lower())
    form = next((form for form in ("pcie", "nvl") if form in words), "")
    alike = [spec for spec in catalog().values() if spec.family and spec.family.lower() in words]
    of_form = [spec for spec in alike if spec.form.lower() == form] or [spec for spec in alike if not spec.form]
    return next((spec for spec in of_form if memory_bytes is not None and _fits(spec, memory_bytes)), None)


def _fits(spec: DeviceSpec, memory_bytes: float | None) -> bool:
    """Whether a device's memory is what the vendor sells: a driver keeps a little, and GB may mean GiB."""
    if memory_bytes is None or spec.memory_gb is None:
        return memory_bytes is None
    return 0.9 < memory_bytes / (spec.memory_gb * 1e9) < 1.08


def unknown(name: str, others: frozenset[str] = frozenset()) -> UnknownName:
    """The error for an unknown device; `others` are names that only profiles have."""
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
            raise ValueError(f"{spec.name}: {name} has no source")
    if spec.mig is not None and "mig" not in spec.sources:
        raise ValueError(f"{spec.name}: mig has no source")
    if not spec.peak_tflops.keys() <= set(PRECISIONS):
        raise ValueError(f"{spec.name}: a peak in {set(spec.peak_tflops) - set(PRECISIONS)}")
