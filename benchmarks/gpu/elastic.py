"""Many routes of one package in one process."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpu.visit import Visit


def elastic(visit: Visit) -> None:
    """(f) Ten routes of one package in one process: memory of the GPU, and calls from 1, 4 and 16 threads."""
    import threading

    import torch

    from klas_zoo.runtime import ElasticSession
    from klas_zoo.runtimes import CUDA_PROVIDER

    rows = visit.rows("elastic")
    package = visit.graphs / "package"

    def opened() -> Mapping[str, Any]:
        torch.zeros(1, device="cuda")  # the context itself
        free = [torch.cuda.mem_get_info()[0]]
        started = time.perf_counter()
        session = ElasticSession(package, provider=CUDA_PROVIDER)
        open_s = time.perf_counter() - started
        free.append(torch.cuda.mem_get_info()[0])
        names = [one.name for one in session.routes]
        images = np.random.default_rng(0).standard_normal((1, *session._shape), dtype=np.float32)
        for name in names:
            session.run(images, route=name)
        free.append(torch.cuda.mem_get_info()[0])
        weights = sum(4 * one.parameters for one in session.routes)
        found: dict[str, Any] = {
            "routes": names, "open_s": open_s, "bytes_opened": free[0] - free[1],
            "bytes_after_a_run": free[0] - free[2],
            "bytes_of_all_weights": weights,
        }  # fmt: skip
        for threads in (1, 4, 16):
            calls, seconds = 3 if visit.quick else 200, []
            started = time.perf_counter()

            def work(calls: int = calls, seconds: list[float] = seconds) -> None:
                for n in range(calls):
                    before = time.perf_counter()
                    session.run(images, route=names[n % len(names)])
                    seconds.append(time.perf_counter() - before)

            workers = [threading.Thread(target=work) for _ in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            p50, p99 = np.percentile(seconds, (50, 99))
            found[f"{threads} threads"] = {
                "calls_per_s": float(len(seconds) / (time.perf_counter() - started)), "p50_ms": float(1e3 * p50),
                "p99_ms": float(1e3 * p99),
            }  # fmt: skip
        return found

    while not Path(f"{package}.done").exists() and time.monotonic() < visit.deadline:
        time.sleep(0.5)
    rows.do("ten routes", opened)
