"""The formats that a package can be made into, by name. Imports nothing heavy.

`onnx` and `torch` are written from the supernet. Every other format is derived from a verified
package of ONNX graphs: its module has a function

    derive(package: Package, folder: Path, options: Mapping[str, Any]) -> list[Verdict]

that fills an empty folder, and judges what it made by `klas_zoo.exporters.contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from klas_zoo.exporters.contract import Verdict
    from klas_zoo.exporters.package import Package

    Derive = Callable[[Package, Path, Mapping[str, Any]], list[Verdict]]


@dataclass(frozen=True, kw_only=True)
class Derived:
    """A format that is made of a package: where its function is, and which precisions it takes."""

    module: str
    precisions: tuple[str, ...] = ("fp32", "fp16", "bf16", "int8")

    def derive(self) -> Derive:
        """Imports the module; this can be slow."""
        found: Derive = import_module(self.module).derive
        return found


DERIVED: Mapping[str, Derived] = {}
FORMATS = ("onnx", "torch", *DERIVED)
