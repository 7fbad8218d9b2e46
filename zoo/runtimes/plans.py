"""What is known of a TensorRT engine file: a `.json` beside it, read before the engine is.

An engine is machine code. It runs only with the version of the library that built it, on the
compute capabilities it was built for, and the library's own words for a mismatch are numbers.
So the file beside says what it is, and `checked` refuses what cannot run before the library,
which would execute a forged engine, has seen a byte of it. Imports nothing heavy.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from klas_zoo.errors import CannotRunHere, ExportError
from klas_zoo.files import replacing, sha256_of
from klas_zoo.reading import read
from klas_zoo.runtimes.base import NOT_RUN

SCHEMA_VERSION = 2  # 1: without `gpu`
TENSORRT_RUNTIMES = ("tensorrt", "tensorrt-rtx")


@dataclass(frozen=True, kw_only=True)
class BatchRange:
    """Batch sizes one optimisation profile takes, and the one it is fastest at."""

    smallest: int
    usual: int
    largest: int

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.usual <= self.largest:
            raise ValueError(f"a batch range goes up from 1, not {self}")

    def __str__(self) -> str:
        return f"{self.smallest}:{self.usual}:{self.largest}"


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """Of one engine file.

    Attributes:
        runtime: `tensorrt` or `tensorrt-rtx`.
        runtime_version: that built it, and the only one that runs it.
        capabilities: compute capabilities it was built for, such as `8.0`.
        precision: of the graph it was built from; the network is strongly typed.
        profiles: the batch sizes it takes.
        input_shape: one image, `(C, H, W)`.
        classes: width of the logits.
        weights: `inside`, or `stripped` when they come from the graph at load.
        graph_sha256: of the ONNX graph it was built from.
        sha256, size_bytes: of the engine file.
        gpu: the card whose kernels were timed when it was built, as CUDA names it; None where none was timed, as in
            TensorRT for RTX, and in records of schema 1. It runs on no other model.
        state: `built, not run` until it has been run and compared with torch, then `verified`.
    """

    runtime: str
    runtime_version: str
    capabilities: tuple[str, ...]
    precision: str
    profiles: tuple[BatchRange, ...]
    input_shape: tuple[int, ...]
    classes: int
    weights: str
    graph_sha256: str
    sha256: str
    size_bytes: int
    state: str = NOT_RUN
    gpu: str | None = None

    def __post_init__(self) -> None:
        if self.runtime not in TENSORRT_RUNTIMES:
            raise ValueError(f"no runtime is called {self.runtime}")

    def to_json(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def record_path(engine: Path) -> Path:
    return engine.with_name(engine.name + ".json")


def write_record(engine: Path, record: PlanRecord) -> None:
    with replacing(record_path(engine)) as temporary:
        temporary.write_text(json.dumps(record.to_json(), indent=2, sort_keys=True) + "\n")


def read_record(engine: Path) -> PlanRecord:
    """What stands beside an engine.

    Raises:
        ExportError: nothing does, or it cannot be read by this version.
    """
    file = record_path(engine)
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        raise ExportError(f"{engine} has no {file.name} beside it, which would say what it runs on.") from None
    return read(content, PlanRecord, str(file), ExportError, newest=SCHEMA_VERSION, advice="Build the engine again.")


def checked(engine: Path, *, installed: str | None, present: str | None, gpu: str | None = None) -> PlanRecord:
    """The record of an engine that can run here.

    Args:
        installed: version of the engine's library, None where it is not installed.
        present: compute capability of this machine's GPU, None where there is none.
        gpu: its name.

    Raises:
        CannotRunHere: says which of version, GPU, capability or model does not fit, and what would help.
        ExportError: the file is not what was built.
    """
    record = read_record(engine)
    check_file(engine, record)
    built = f"{engine} was built by {record.runtime} {record.runtime_version}"
    again = "build it again with klas-zoo export"
    if installed is None:
        raise CannotRunHere(f"{built}, which is not installed: pip install 'klas-zoo[{record.runtime}]'.")
    if installed != record.runtime_version:
        wrong = f"{built} and runs with no other version; {installed} is installed"
        raise CannotRunHere(f"{wrong}: install that, or {again}.")
    targets = ", ".join(record.capabilities)
    if present is None:
        raise CannotRunHere(f"{engine} runs on a GPU of compute capability {targets}; this machine has no GPU.")
    if present not in record.capabilities:
        raise CannotRunHere(
            f"{engine} was built for compute capability {targets}; this machine's GPU has {present}: "
            f"{again} --device {present}."
        )
    if record.gpu is not None and gpu != record.gpu:
        raise CannotRunHere(
            f"{engine} was built on {record.gpu}, and this machine's GPU is {gpu or 'unknown'}: TensorRT chooses "
            f"kernels for one model of card; {again} --format {record.runtime} here, or install the package here."
        )
    return record


def check_file(engine: Path, record: PlanRecord) -> None:
    """Refuses a file that is not, byte for byte, what was built.

    Raises:
        ExportError: it is missing, truncated, changed, or no engine at all.
    """
    try:
        size = engine.stat().st_size
        if size != record.size_bytes:
            raise ExportError(f"{engine} has {size} bytes, not {record.size_bytes}: it is truncated or another file.")
        if sha256_of(engine) != record.sha256:
            raise ExportError(f"{engine} is damaged: its SHA-256 is not the one of the engine that was built.")
        with engine.open("rb") as content:
            begins = content.read(4)
    except FileNotFoundError:
        raise ExportError(f"There is no engine {engine}.") from None
    if begins[1:] != b"trt":  # ftrt is TensorRT's, vtrt that of TensorRT for RTX
        raise ExportError(f"{engine} is no engine of {record.runtime}: it begins with {begins!r}.")
