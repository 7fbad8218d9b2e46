"""The card: what it is, what it can do at most, and what happens when its memory is out."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from gpu.visit import Visit, events_ms


def device(visit: Visit) -> None:
    """What the card is, and two ceilings: a copy and a matrix product."""
    import torch

    from klas_zoo.profiles.devices import cuda_uuid, resolve_device
    from klas_zoo.profiles.telemetry import Telemetry
    from klas_zoo.versions import versions_of

    rows, telemetry = visit.rows("device"), Telemetry(cuda_uuid())

    def facts() -> Mapping[str, Any]:
        found = torch.cuda.get_device_properties(0)
        smi = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True) if visit.measured else None
        if smi is not None:
            (visit.out / "nvidia-smi.txt").write_text(smi.stdout)
        return {
            "name": found.name, "catalog": resolve_device("cuda").name, "capability": [found.major, found.minor],
            "memory_bytes": found.total_memory, "processors": found.multi_processor_count,
            "versions": versions_of("torch", "onnxruntime-gpu", "timm", "onnx", "numpy"),
            "cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda,
            "nvml": telemetry.unavailable or "answers",
        }  # fmt: skip

    def ceilings() -> Mapping[str, Any]:
        size = 256 if visit.quick else 8192
        n = 2**20 if visit.quick else 2**30
        source, target = (torch.empty(n, dtype=torch.float32, device="cuda") for _ in range(2))
        source.normal_()
        copy_ms = events_ms(lambda: target.copy_(source))
        found = {"copy_gb_s": 2 * 4 * n / copy_ms / 1e6}
        for name, kind in (("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)):
            a, b = (torch.randn(size, size, device="cuda").to(kind) for _ in range(2))
            with telemetry.watching(0.02):
                found[f"matmul_{name}_tflops"] = 2 * size**3 / events_ms(partial(torch.matmul, a, b)) / 1e9
        return {**found, "conditions": telemetry.conditions()}

    rows.do("facts", facts)
    rows.do("ceilings", ceilings)


def memory(visit: Visit) -> None:
    """A batch that does not fit: which words the runtimes use, and that the next batch is measured all the same."""
    from klas_zoo.profiles.runners import images_of, is_out_of_memory
    from klas_zoo.runtimes import CUDA_PROVIDER, open_engine

    rows = visit.rows("memory")
    folder = visit.wait_for(visit.profiled)
    anchor = json.loads((folder / "done.json").read_text())["routes"][-1 if visit.quick else 2]
    shape = np.load(folder / "reference.npz")["images"].shape[1:]

    def onnx() -> Mapping[str, Any]:
        # a limit of the provider's own arena stands for a smaller card
        limit = 2**26 if visit.quick else 2**30
        options = {"gpu_mem_limit": str(limit), "arena_extend_strategy": "kSameAsRequested"}
        with open_engine(folder / "fp32" / f"{anchor}.onnx", provider=CUDA_PROVIDER, options=options) as session:
            session.run(images_of(1, shape))
            try:
                session.run(images_of(512, shape))
                words, known = "it fitted", None
            except Exception as error:
                words, known = str(error)[:800], is_out_of_memory(error)
            session.run(images_of(1, shape))
            return {"words": words, "recognised": known, "next_batch": "runs"}

    rows.do("onnxruntime", onnx)
