"""The one weights file of a package: every tensor once, whatever its name, at the start of a page.

Routes share anchors, but the export to ONNX renames and folds tensors: equal tensors are found by their bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import onnx
import onnx_ir as ir

from klas_zoo.exporters.contract import stage
from klas_zoo.exporters.graphs import ALIGNMENT, tensors_of
from klas_zoo.exporters.graphs import check_written as check_written
from klas_zoo.exporters.graphs import deployed_bytes as deployed_bytes
from klas_zoo.exporters.to_onnx import finish
from klas_zoo.files import replacing

INLINE_BYTES = 1024  # smaller tensors stay in the graph: a page for each would be larger than they are


class WeightsFile:
    """Written once, front to back, one tensor in memory at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("xb")
        self._size = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        # tensors that cuts of one graph share are hashed once; they are kept, or another could get their id
        self._seen: dict[int, tuple[ir.TensorProtocol, tuple[int, int]]] = {}

    def __enter__(self) -> WeightsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def place(self, tensor: ir.TensorProtocol) -> tuple[int, int]:
        """Where a tensor's bytes stand, offset and length; writes them if they are not there yet."""
        known = self._seen.get(id(tensor))
        if known is None:
            known = self._seen[id(tensor)] = tensor, self._placed(tensor.tobytes())
        return known[1]

    def flush(self) -> None:
        """Lets others read what was placed so far."""
        self._file.flush()

    def find(self, sha256: bytes) -> int | None:
        """The offset of the tensor whose bytes have that SHA-256; None where there is none."""
        place = self._places.get(sha256)
        return None if place is None else place[0]

    def _placed(self, content: bytes) -> tuple[int, int]:
        key = hashlib.sha256(content).digest()
        if key not in self._places:
            padding = -self._size % ALIGNMENT
            self._write(bytes(padding))
            self._places[key] = self._size, len(content)
            self._write(content)
        return self._places[key]

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._size += len(content)


def write_graph(model: ir.Model, path: Path, weights: WeightsFile, metadata: Mapping[str, str]) -> None:
    """Writes a graph whose large weights lie in `weights`; the model itself stays as it was.

    Raises:
        ExportError: names the stage that failed.
        OSError: a file cannot be written.
    """
    inside = {name: value.const_value for name, value in model.graph.initializers.items()}
    try:
        for name, tensor in inside.items():
            if tensor is not None and tensor.nbytes >= INLINE_BYTES:
                offset, length = weights.place(tensor)
                model.graph.initializers[name].const_value = ir.ExternalTensor(
                    weights.path.name, offset, length, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
                )
        proto = finish(model, metadata)
    finally:
        for name, tensor in inside.items():
            model.graph.initializers[name].const_value = tensor
    with stage("write", path.name):
        path.write_bytes(proto.SerializeToString(deterministic=True))


def drop_unnamed(weights: Path, graphs: Iterable[Path], also: Mapping[int, int] | None = None) -> dict[int, int]:
    """Removes from a weights file what none of the graphs reads, and updates their offsets.

    Args:
        also: offset and length in bytes of other tensors to keep.

    Returns:
        the new offset of every tensor by its old one.

    Raises:
        OSError: a file cannot be written.
    """
    models = {path: onnx.load(str(path), load_external_data=False) for path in graphs}
    entries = [
        {entry.key: entry for entry in tensor.external_data}
        for model in models.values()
        for tensor in tensors_of(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    lengths = {int(place["offset"].value): int(place["length"].value) for place in entries} | dict(also or {})
    moved: dict[int, int] = {}
    with weights.open("rb") as before, replacing(weights) as temporary, temporary.open("wb") as after:
        for offset, length in sorted(lengths.items()):
            after.write(bytes(-after.tell() % ALIGNMENT))
            moved[offset] = after.tell()
            before.seek(offset)
            after.write(before.read(length))
    for place in entries:
        place["offset"].value = str(moved[int(place["offset"].value)])
    for path, model in models.items():
        path.write_bytes(model.SerializeToString(deterministic=True))
    return moved
