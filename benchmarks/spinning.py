"""Processor time of a service that is called a few times a second, and latency, by the setting `spinning`.

    python benchmarks/spinning.py FILE.onnx ...

For each engine, runtime and setting: processor time (all threads of the process) while it is idle, per call of a caller
that calls ten times a second, and per call of one that calls without pause, with the median latency of the last two.
Runs take turns, so that other load on the machine hits all settings alike.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from record import write_part

from klas_zoo.profiles.runners import images_of
from klas_zoo.runtimes import Session, open_engine

SETTINGS: list[tuple[str, str, bool | None]] = [
    ("onnxruntime, spinning=True", "onnxruntime", True),
    ("onnxruntime, default", "onnxruntime", None),
    ("onnxruntime, spinning=False", "onnxruntime", False),
    ("openvino", "openvino", None),
]
PAUSE_S = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("engines", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    arguments = parser.parse_args()
    for engine in arguments.engines:
        found: dict[str, list[dict[str, float]]] = {name: [] for name, _, _ in SETTINGS}
        for _ in range(arguments.rounds):
            for name, runtime, spinning in SETTINGS:
                with open_engine(engine, runtime=runtime, threads=arguments.threads, spinning=spinning) as session:
                    found[name].append(measured(session))
        rows = {name: medians(one) for name, one in found.items()}
        for name, row in rows.items():
            print(f"{engine.stem}, {name}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()))
        write_part("spinning", f"{engine.stem}, {arguments.threads} threads", rows)


def measured(session: Session) -> dict[str, float]:
    """Milliseconds of processor time and of latency."""
    height, width = session.input_shape[1:]
    images = images_of(1, (3, height or 224, width or 224))
    for _ in range(10):
        session.run(images)
    started = time.process_time()
    time.sleep(1)
    idle = time.process_time() - started
    slow, slow_cpu = calls(session, images, 15, PAUSE_S)
    busy, busy_cpu = calls(session, images, 30, 0)
    return {
        "idle_cpu_ms_per_s": 1e3 * idle,
        "slow_cpu_ms_per_call": slow_cpu,
        "slow_p50_ms": slow,
        "busy_cpu_ms_per_call": busy_cpu,
        "busy_p50_ms": busy,
    }


def calls(session: Session, images: np.ndarray, count: int, pause_s: float) -> tuple[float, float]:
    """Median latency and processor time per call, both in ms."""
    took = []
    started = time.process_time()
    for _ in range(count):
        before = time.perf_counter()
        session.run(images)
        took.append(1e3 * (time.perf_counter() - before))
        time.sleep(pause_s)
    return float(np.median(took)), 1e3 * (time.process_time() - started) / count


def medians(rows: list[dict[str, Any]]) -> dict[str, float]:
    return {key: float(np.median([row[key] for row in rows])) for key in rows[0]}


if __name__ == "__main__":
    main()
