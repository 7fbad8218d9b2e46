"""What an ONNX graph of a package may read: weights inside itself, and inside the one weights file."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import onnx

from klas_zoo.errors import DamagedPackage, ExportError, first_line
from klas_zoo.reading import is_plain_name

ALIGNMENT = 4096  # bytes; a page, so that a mapped file can be used where it lies


def check_graph(graph: Path, weights: Path, content: bytes | None = None) -> None:
    """Reads a graph without its weights and checks where it would take them from.

    Args:
        content: of the file, where it was read before.

    Raises:
        DamagedPackage: it is no ONNX graph, or a tensor of it lies in another file, beyond the end of
            the weights file, off a page's start, or has another length than its shape says.
    """
    try:
        if content is None:
            model = onnx.load(str(graph), load_external_data=False)
        else:
            model = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's classes of errors are not documented
        raise DamagedPackage(f"{graph} is no ONNX graph ({str(error).strip()}).") from error
    if not model.graph.node:
        raise DamagedPackage(f"{graph} is no ONNX graph: it computes nothing.")
    size = weights.stat().st_size
    for tensor in tensors_of(model):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_place(tensor, graph, weights.name, size)


def deployed_bytes(graph: Path) -> int:
    """Bytes needed to deploy one graph alone: its file and the tensors it reads from the weights file."""
    model = onnx.load(str(graph), load_external_data=False)
    places = {
        (place.get("offset", "0"), int(place["length"]))
        for tensor in tensors_of(model)
        if tensor.data_location == onnx.TensorProto.EXTERNAL
        for place in ({entry.key: entry.value for entry in tensor.external_data},)
    }
    return graph.stat().st_size + sum(length for _, length in places)


def check_written(graph: Path) -> None:
    """onnx's own checker, with shapes inferred, on a graph whose weights `check_graph` looked at.

    The checker refuses a weights file with several names (hard links), which backups and deduplication leave, though it
    reads nothing of it. So it gets a copy of the graph, beside a file of holes in place of the weights.

    Raises:
        ExportError: it does not pass.
    """
    with tempfile.TemporaryDirectory(prefix="klas-zoo-check-") as folder:
        copy = Path(folder) / graph.name
        try:
            shutil.copyfile(graph, copy)
            for weights in _weights_files(graph):
                with (copy.parent / weights.name).open("xb") as file:
                    file.truncate(weights.stat().st_size)
        except OSError as error:  # which names the file that was read
            raise OSError(error.errno, error.strerror, folder) from error
        try:
            onnx.checker.check_model(str(copy), full_check=True)
        except Exception as error:  # of the checker and of shape inference, which have no common class
            raise ExportError(f"{graph.name} does not pass onnx's checker: {first_line(error)}.") from error


def _weights_files(graph: Path) -> set[Path]:
    """Files beside a graph that it reads, and that are there."""
    external = (t for t in tensors_of(onnx.load(str(graph), load_external_data=False)) if t.external_data)
    named = (entry.value for tensor in external for entry in tensor.external_data if entry.key == "location")
    return {graph.parent / name for name in named if is_plain_name(name) and (graph.parent / name).is_file()}


def tensors_of(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor anywhere in a model: initializers, attributes, bodies of branches and of functions."""
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterator[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)


def _check_place(tensor: onnx.TensorProto, graph: Path, weights: str, size: int) -> None:
    place = {entry.key: entry.value for entry in tensor.external_data}
    location = place.get("location", "")
    if location != weights:
        raise DamagedPackage(f"{graph} reads {tensor.name!r} from {location!r}, not from the package's {weights}.")
    try:
        offset, length = int(place.get("offset", "0")), int(place["length"])
    except (KeyError, ValueError) as error:
        raise DamagedPackage(f"{graph} does not say where {tensor.name!r} lies in {weights}.") from error
    if offset < 0 or length < 0 or offset + length > size:
        raise DamagedPackage(f"{graph} reads {tensor.name!r} beyond the end of {weights}.")
    if offset % ALIGNMENT or length != _bytes_of(tensor):
        raise DamagedPackage(f"{graph} reads {tensor.name!r} from a place of {weights} where no tensor of it lies.")


def _bytes_of(tensor: onnx.TensorProto) -> int:
    try:
        itemsize = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except Exception:  # a type that does not exist: no length is right
        return -1
    count = 1
    for size in tensor.dims:
        count *= size
    return count * itemsize
