"""The project's own jobs on a GPU: a profile, a build with its pick, and steps of tuning."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from gpu import graphs
from gpu.visit import Visit, events_ms


def profiles(visit: Visit) -> None:
    """(d) Profiles of a family with stitches that the interpolation has not seen; as the project stores them."""
    from dataclasses import replace

    from klas_zoo.costs.profiling import profile_family, routes_to_measure
    from klas_zoo.families.anchors import load_family
    from klas_zoo.families.specs import find_family
    from klas_zoo.profiles.devices import resolve_device
    from klas_zoo.profiles.files import to_json
    from klas_zoo.progress.listeners import NullListener

    rows = visit.rows("profiles")
    family = load_family(find_family(visit.profiled), random_weights=True)
    folder = visit.wait_for(visit.profiled)
    target = resolve_device("cuda")
    fitted, checked = routes_to_measure(family, graphs.settings(quick=visit.quick))
    # of the last ones a few checks have to do: opening every network takes most of the time
    plan = [(kind, batch, graphs.CHECKS) for kind, batch in (("fp16", 8), ("fp32", 8), ("fp16", 1))]
    plan += [(kind, batch, 3) for kind, batch in (("fp32", 1), ("fp16", 64), ("fp32", 64))]
    plan = plan[1:3] if visit.quick else plan  # one of each precision

    def one(precision: str, batch: int, checks: int) -> Mapping[str, Any]:
        settings = replace(graphs.settings(precision, (batch,), quick=visit.quick), method=visit.method())
        fewer = fitted, checked[:checks]
        files = {route: folder / precision / f"{route}.onnx" for route in (*fewer[0], *fewer[1])}
        (found,) = profile_family(family, target, settings, listener=NullListener(), routes=fewer, graphs=files)
        return {"profile": to_json(found)}

    for precision, batch, checks in plan:
        rows.do(f"onnxruntime {precision} batch {batch}", partial(one, precision, batch, checks))


def build(visit: Visit) -> None:
    """(b, g) A build of the embedded family, killed while it tunes and resumed, its pick loaded without torch."""
    rows = visit.rows("build")
    registry = visit.out.parent / f"{visit.out.name}-registry"
    command = [sys.executable, "-m", "klas_zoo"]
    steps = "40" if visit.quick else "600"
    options = [
        "build", "--family", "deit-micro", "--device", "cuda", "--registry", str(registry), "--tune-steps", steps,
        "--checkpoint-every", "1", "--no-compile", "--latency-batch", "1", "--latency-batch", "8",
    ]  # fmt: skip

    def killed() -> Mapping[str, Any]:
        """SIGKILL as soon as a checkpoint of tuning is there."""
        started = time.perf_counter()
        with (visit.out / "build-killed.log").open("w") as log:
            process = subprocess.Popen([*command, *options], stdout=log, stderr=log)
            while process.poll() is None and time.perf_counter() - started < 120:
                if any(registry.rglob("*checkpoint*")) or any(registry.rglob("*.ckpt")):
                    time.sleep(1)
                    break
                time.sleep(0.2)
            resumed_from = process.poll() is None
            process.kill()
            process.wait()
        return {"killed_while_it_ran": resumed_from, "until_kill_s": time.perf_counter() - started}

    def resumed() -> Mapping[str, Any]:
        started = time.perf_counter()
        log = visit.out / "build.jsonl"
        done = subprocess.run([*command, *options, "--log-json", str(log)], capture_output=True, text=True, timeout=240)
        (visit.out / "build.log").write_text(done.stdout[-20000:] + done.stderr[-20000:])
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        return {"seconds_after_kill": time.perf_counter() - started}

    def picked() -> Mapping[str, Any]:
        done = subprocess.run(
            [*command, "pick", "--registry", str(registry), "--device", "cuda", "--latency", "50ms", "--json"],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(done.stderr.strip())
        return {"pick": json.loads(done.stdout)}

    def loaded() -> Mapping[str, Any]:
        """In a process where importing torch fails."""
        done = subprocess.run([sys.executable, "-c", _WITHOUT_TORCH, str(registry)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
        return json.loads(done.stdout.splitlines()[-1])

    if not visit.measured:
        rows.add("killed", {"skipped": "kernels of the fake driver do nothing, so its build cannot be verified"})
        return
    for name, work in (("killed", killed), ("resumed", resumed), ("picked", picked), ("loaded", loaded)):
        rows.do(name, work)


_WITHOUT_TORCH = """
import importlib.abc, json, sys, time
class NoTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is blocked in this process")
sys.meta_path.insert(0, NoTorch())
import numpy as np
import klas_zoo
pick = klas_zoo.pick("50ms", device="cuda", registry=sys.argv[1])
session = pick.load()
raw = getattr(session, "raw", session)
images = np.random.default_rng(0).standard_normal((1, 3, 32, 32), dtype=np.float32)
name = raw.get_inputs()[0].name
times = []
for _ in range(300):
    before = time.perf_counter()
    raw.run(None, {name: images})
    times.append(1e3 * (time.perf_counter() - before))
print(json.dumps({"provider": raw.get_providers()[0], "plain_loop_p50_ms": float(np.median(times[100:])),
                  "torch_imported": "torch" in sys.modules, "pick": str(pick)}))
"""


_TRAINING = (("fp32", False, True), ("bf16", False, True), ("bf16", False, False), ("bf16", True, True))


def tuning(visit: Visit) -> None:
    """(g) Steps of training through one route of a supernet: images a second, in fp32, bf16 and compiled."""
    import torch

    from klas_zoo.families.anchors import load_family
    from klas_zoo.families.specs import find_family
    from klas_zoo.supernet import Supernet

    rows = visit.rows("tuning")

    def one(name: str, batch: int, precision: str, compiled: bool, fused: bool) -> Mapping[str, Any]:
        torch.compiler.reset()
        family = load_family(find_family(name), random_weights=True)
        routes = graphs.routes_of(family, False)
        supernet = Supernet(family.chains, routes).cuda().train()
        optimiser = torch.optim.AdamW(supernet.parameters(), lr=1e-4, fused=fused)
        images = torch.randn(batch, *family.input_shape, device="cuda")
        classes = torch.randint(0, 10, (batch,), device="cuda")
        network = torch.compile(supernet.network(routes[1])) if compiled else supernet.network(routes[1])

        def step() -> None:
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
                loss = torch.nn.functional.cross_entropy(network(images), classes)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()

        ms = events_ms(step, warm=3, runs=2 if visit.quick else 20)
        return {"images_per_s": 1e3 * batch / ms, "step_ms": ms, "peak_bytes": torch.cuda.max_memory_allocated()}

    cases = [("deit-micro", 512), (visit.profiled, 128)]
    for name, batch in cases:
        for precision, compiled, fused in _TRAINING:
            if (compiled or fused) and not visit.measured:  # neither runs on the fake driver
                continue
            key = f"{name} batch {batch} {precision}{' compiled' if compiled else ''}{' fused' if fused else ''}"
            size = 4 if visit.quick else batch
            rows.do(key, partial(one, name, size, precision, compiled, fused))
