"""A hundred thousand inputs for everything that reads what others wrote: no traceback, no hang, little memory.

What is thrown, and at what, is told in tests/fuzzing.py. Every target has a process of its own, whose
memory is looked at when it ends; an input that takes ten seconds of the processor hangs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from faults import Figure, Outcome

INPUTS = 100_000
MOST_BYTES = 5 * 10**8


def run(scale: float) -> Outcome:
    wanted = round(INPUTS * scale)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="klas-zoo-fuzzing-") as folder:
        write = "import sys, faults, packages, pathlib; packages.write_package(pathlib.Path(sys.argv[1]))"
        _python(["-c", write, f"{folder}/package"])
        names = json.loads(_python(["-m", "faults.fuzzing"]))
        work = [[name, str(wanted), folder] for name in names]
        with ThreadPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
            found = list(pool.map(lambda words: json.loads(_python(["-m", "faults.fuzzing", *words])), work))
    return Outcome(figures=_figures(found, wanted), numbers={
        "inputs": sum(one["inputs"] for one in found), "targets": found, "seconds": time.perf_counter() - started,
        "seed": 0,
    })  # fmt: skip


def _figures(found: list[dict[str, Any]], wanted: int) -> tuple[Figure, ...]:
    thrown = sum(one["inputs"] for one in found)
    crashes = [f"{one['target']}: {one['crash']}" for one in found if one["crash"] and not one["hang"]]
    hangs = [f"{one['target']}: {one['crash']}" for one in found if one["hang"]]
    added = max(one["peak_memory_bytes"] - one["peak_memory_before_bytes"] for one in found)
    most = max(one["peak_memory_bytes"] for one in found)
    of_each = ", ".join(f"{one['target']} {one['inputs']:,}" for one in found)
    return (
        Figure(name="inputs", wanted=f"{INPUTS:,}", measured=f"{thrown:,}: {of_each}", kept=thrown >= wanted),
        Figure(name="tracebacks", wanted="0", measured="; ".join(crashes) or "0", kept=not crashes),
        Figure(name="hangs (10 s of the processor)", wanted="0", measured="; ".join(hangs) or "0", kept=not hangs),
        Figure(name="memory that inputs add to a process", wanted="< 500 MB", kept=added < MOST_BYTES,
               measured=f"at most {added / 1e6:.0f} MB; with torch and what was made before, {most / 1e6:.0f} MB"),
    )  # fmt: skip


def _python(words: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    here = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, *words], cwd=here, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)[:80]} ended with {done.returncode}")
    return done.stdout


def _worker(name: str, inputs: int, folder: Path) -> Any:
    import fuzzing

    target = fuzzing.build(name, folder / name, folder / "package")
    before = _peak_memory_bytes()
    crash, hang, thrown = "", False, 0
    started = time.perf_counter()
    try:
        thrown = fuzzing.throw(target, fuzzing.counts(inputs)[name])
    except fuzzing.Hang as error:
        crash, hang = str(error), True
    except Exception as error:
        print(traceback.format_exc()[:4_000], file=sys.stderr)  # the input can be long
        crash = f"{type(error).__name__}: {error}"[:500]
    return {
        "target": name, "inputs": thrown, "crash": crash, "hang": hang, "seconds": time.perf_counter() - started,
        "peak_memory_bytes": _peak_memory_bytes(), "peak_memory_before_bytes": before,
    }  # fmt: skip


def _peak_memory_bytes() -> int:
    # not getrusage, which also counts what the process that started this one had
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    import fuzzing

    if len(sys.argv) == 1:
        print(json.dumps(list(fuzzing.TARGETS)))
        return
    name, inputs, folder = sys.argv[1:]
    print(json.dumps(_worker(name, int(inputs), Path(folder))))


if __name__ == "__main__":
    main()
