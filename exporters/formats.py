"""The formats that a package can be made into, by name. Imports nothing heavy.

`onnx` and `torch` are written from the supernet. Every other format is derived from a verified
package of ONNX graphs: its module has a function

    derive(package: Package, folder: Path, options: Mapping[str, Any]) -> list[Verdict]

that fills an empty folder, and judges what it made by `klas_zoo.exporters.verification`. Options are
`format`, those that the format takes, as far as they were given, and `reference`, the images and torch's
logits that the package was verified with, where they are at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klas_zoo.exporters.contract import Verdict
    from klas_zoo.exporters.package import Package

    Derive = Callable[[Package, Path, Mapping[str, Any]], list[Verdict]]


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A format that is made of a package: where its function is, which precisions and options it takes."""

    module: str
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8")
    options: tuple[str, ...] = ()

    def derive(self) -> Derive:
        """Imports the module; this can be slow."""
        found: Derive = import_module(self.module).derive
        return found


_TENSORRT = Derived(
    module="klas_zoo.exporters.trt_package",
    precisions=("fp32", "fp16", "bf16"),
    options=("capabilities", "profiles", "strip"),
)
DERIVED: Mapping[str, Derived] = {
    "model-package": Derived(module="klas_zoo.exporters.model_package"),
    "tensorrt": replace(_TENSORRT, options=(*_TENSORRT.options, "timing_cache")),
    "tensorrt-rtx": _TENSORRT,
    "triton": Derived(module="klas_zoo.exporters.to_triton", options=("copy", "plans")),
}
FORMATS = ("onnx", "torch", *DERIVED)
