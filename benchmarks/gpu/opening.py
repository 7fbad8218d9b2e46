"""Whether every family opens on CUDA in every precision, where its nodes lie, and how far it is from torch."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpu import graphs
from gpu.visit import Visit, ready_first


def partition(visit: Visit) -> None:
    """(a) Every family in every precision: whether it opens on CUDA, where its nodes lie, how far it is from torch."""
    rows = visit.rows("partition")
    for family in ready_first(visit):
        folder = visit.wait_for(family)
        reference = np.load(folder / "reference.npz")
        routes = json.loads((folder / "done.json").read_text())["routes"]
        for precision in graphs.PRECISIONS:
            for route in routes[:2] if family != visit.profiled else routes[:4]:
                case = _Case(
                    path=folder / precision / f"{route}.onnx", precision=precision, images=reference["images"],
                    expected=reference[route],
                )  # fmt: skip
                rows.do(f"{family} {precision} {route}", partial(_opened, case))


@dataclass(frozen=True, kw_only=True)
class _Case:
    """One graph, and what torch answers on the CPU in fp32."""

    path: Path
    precision: str
    images: np.ndarray
    expected: np.ndarray


def _opened(case: _Case) -> Mapping[str, Any]:
    from klas_zoo.runtimes import CUDA_PROVIDER, open_engine

    if case.path.with_suffix(".failed").is_file():
        raise RuntimeError(case.path.with_suffix(".failed").read_text())
    options = {"session.record_ep_graph_assignment_info": "1"}
    with open_engine(case.path, provider=CUDA_PROVIDER, options=options) as session:
        found: dict[str, Any] = partition_of(session.raw)
        # cuDNN's search for the fastest kernel is onnxruntime's default; it happens in the first run of a batch size
        started = time.perf_counter()
        logits = session.run(case.images)
        found["first_run_s"] = time.perf_counter() - started
        return found | _difference(logits, case)


def _difference(logits: np.ndarray, case: _Case) -> dict[str, Any]:
    """How far logits are from torch's, beside what the precision allows."""
    from klas_zoo.exporters.limits import limits_for

    limits, largest = limits_for(case.precision, "random"), float(np.abs(case.expected).max())
    off, a, b = np.abs(logits - case.expected), logits.ravel(), case.expected.ravel()
    return {
        "finite": bool(np.isfinite(logits).all()), "largest_difference": float(off.max()), "largest_logit": largest,
        "relative_difference": float(off.max() / largest), "limits": vars(limits),
        "cosine": float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) + 1e-30)),
    }  # fmt: skip


def partition_of(session: Any) -> dict[str, Any]:
    """How many nodes lie where, by operator on the CPU, and how many copies there are between both."""
    cuda: Counter[str] = Counter()
    cpu: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            (cuda if part.ep_name == "CUDAExecutionProvider" else cpu)[node.op_type] += 1
    copies = sum(count for name, count in (cuda + cpu).items() if name.startswith("Memcpy"))
    return {"cuda_nodes": sum(cuda.values()), "cpu_nodes": dict(cpu), "copies": copies}
