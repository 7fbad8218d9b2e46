"""A hundred thousand inputs for everything that reads what others wrote: no traceback, no hang, little memory.

What is thrown, and at what, is told in tests/fuzzing.py. Every target has a process of its own, whose
memory is looked at when it ends; an input that takes longer than ten seconds hangs.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faults import Figure, Outcome

INPUTS = 100_000
MOST_BYTES = 10**9


def run(scale: float) -> Outcome:
    wanted = round(INPUTS * scale)
    started = time.perf_counter()
    names = json.loads(_worker_process("", 0))
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        found = list(pool.map(lambda name: json.loads(_worker_process(name, wanted)), names))
    thrown = sum(one["inputs"] for one in found)
    crashes = [f"{one['target']}: {one['crash']}" for one in found if one["crash"] and not one["hang"]]
    hangs = [f"{one['target']}: {one['crash']}" for one in found if one["hang"]]
    memory = max(one["peak_memory_bytes"] for one in found)
    of_each = ", ".join(f"{one['target']} {one['inputs']:,}" for one in found)
    return Outcome(
        figures=(
            Figure(name="inputs", wanted=f"{INPUTS:,}", measured=f"{thrown:,}: {of_each}", kept=thrown >= wanted),
            Figure(name="tracebacks", wanted="0", measured="; ".join(crashes) or "0", kept=not crashes),
            Figure(name="hangs (longer than 10 s)", wanted="0", measured="; ".join(hangs) or "0", kept=not hangs),
            Figure(name="peak memory of any process, torch included", wanted="< 1 GB",
                   measured=f"{memory / 1e6:.0f} MB", kept=memory < MOST_BYTES),
        ),
        numbers={"inputs": thrown, "targets": found, "seconds": time.perf_counter() - started, "seed": 0},
    )  # fmt: skip


def _worker_process(name: str, inputs: int) -> str:
    command = [sys.executable, "-m", "faults.fuzzing", name, str(inputs)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = Path(__file__).parent.parent
    return subprocess.run(command, cwd=here, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout


def _worker(name: str, inputs: int) -> Any:
    import fuzzing

    with tempfile.TemporaryDirectory(prefix="klas-zoo-fuzzing-") as folder:
        targets = fuzzing.targets(Path(folder))
        if not name:
            return [target.name for target in targets]
        (target,) = (one for one in targets if one.name == name)
        share = fuzzing.shares(targets, inputs)[name]
        before = _peak_memory_bytes()
        crash, hang, thrown = "", False, 0
        started = time.perf_counter()
        try:
            thrown = fuzzing.throw(target, share)
        except fuzzing.Hang as error:
            crash, hang = str(error), True
        except Exception as error:
            import traceback

            traceback.print_exc()
            crash = f"{type(error).__name__}: {error}"
    return {
        "target": name, "inputs": thrown, "crash": crash, "hang": hang, "seconds": time.perf_counter() - started,
        "peak_memory_bytes": _peak_memory_bytes(), "peak_memory_before_bytes": before,
    }  # fmt: skip


def _peak_memory_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    print(json.dumps(_worker(sys.argv[1], int(sys.argv[2]))))
