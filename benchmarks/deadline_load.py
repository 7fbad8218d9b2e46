"""Requests with a deadline under more load than the largest route serves: how many are late, how accurate are answers?

    python benchmarks/deadline_load.py PACKAGE

The queue, the merging and the choice of routes are those of every server (`klas_zoo.serving`); requests come from the
same process, so that no network is measured. Requests of one image arrive at random (a Poisson process, the same
arrivals for everybody) at a multiple of what the largest route serves: that is measured first, with merging and a queue
that is never empty. A policy is how requests ask to be answered:

    deadline      every request carries `latency_ms`
    target        none carries anything; the model's configuration has `target_ms`, and a controller beside it
    always ROUTE  every request names this route, for each route of the ladder

A request is late if its answer comes after its deadline, or not at all. The package is one that was built, so that
every route's top-1 is known. Policies take turns, round after round, so that whatever else the machine does hits all
of them.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from record import write_record

from klas_zoo.errors import Overloaded
from klas_zoo.serving.batching import Answer
from klas_zoo.serving.request_handler import RequestHandler
from klas_zoo.serving.settings import ServingSettings
from klas_zoo.serving.validation import Tensor

BEST_ALLOWED = 0.01
"""Share of late requests up to which a static route keeps the deadline."""


class Outcome:
    """What became of a policy's requests, over all rounds."""

    def __init__(self) -> None:
        self.latencies_ms: list[float] = []
        self.routes: Counter[str] = Counter()
        self.refused = self.late = 0

    def facts(self, top1: Mapping[str, float]) -> dict[str, Any]:
        answered = sum(self.routes.values())
        asked = answered + self.refused
        return {
            "requests": asked, "refused": self.refused, "late_answers": self.late,
            "late_share": (self.late + self.refused) / asked,
            "p50_ms": float(np.percentile(self.latencies_ms, 50)),
            "p99_ms": float(np.percentile(self.latencies_ms, 99)),
            "top1": sum(top1[name] * count for name, count in self.routes.items()) / answered,
            "routes": dict(self.routes.most_common()),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--load", type=float, default=1.2, help="In units of what the largest route serves.")
    parser.add_argument("--deadline", type=float, default=20.0, help="In units of the largest route's latency alone.")
    parser.add_argument("--seconds", type=float, default=10.0, help="Of a policy in a round.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--largest-batch", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    size = {"threads": given.threads, "largest_batch": given.largest_batch, "queue_images": 100_000}
    handler = RequestHandler(given.package, ServingSettings(**size))
    _wait_until_measured(handler)
    ladder = [name for name, _ in handler.session.ladder()]
    alone = handler.session.latencies()
    top1 = {one.name: float(one.top1 or 0.0) for one in handler.session.routes}
    image = np.random.default_rng(given.seed).standard_normal((1, *handler.input_shape), dtype=np.float32)
    tensors = [Tensor(name="images", datatype="FP32", shape=image.shape, data=image)]
    deadline_ms = given.deadline * alone[ladder[-1]]
    steered = RequestHandler(given.package, ServingSettings(**size, target_ms=deadline_ms))
    _wait_until_measured(steered)
    policies: dict[str, tuple[RequestHandler, dict[str, object]]] = {
        "deadline": (handler, {"latency_ms": deadline_ms}),
        "target": (steered, {}),
        **{f"always {name}": (handler, {"route": name}) for name in ladder},
    }
    outcomes = {name: Outcome() for name in policies}
    served, loads = [], []
    for number in range(given.rounds):
        served.append(_served_per_s(handler, tensors, ladder[-1]))
        loads.append(os.getloadavg()[0])
        arrivals = _arrivals(given.load * served[-1], given.seconds, given.seed + number)
        for name, (asked, parameters) in policies.items():
            _serve(asked, tensors, parameters, arrivals, deadline_ms, outcomes[name])
            print(f"round {number + 1}  {name:<28} {_line(outcomes[name].facts(top1))}", flush=True)
    for one in (handler, steered):
        one.close()
    found = {name: one.facts(top1) for name, one in outcomes.items()}
    kept = {name: one for name, one in found.items() if name.startswith("always") and one["late_share"] <= BEST_ALLOWED}
    best = max(kept, key=lambda name: kept[name]["top1"], default=None)
    print(f"deadline {deadline_ms:.3g} ms, {np.median(served):.0f} images/s by {ladder[-1]}; best static route: {best}")
    write_record("deadline_load", {
        "policies": found, "best_static": best, "deadline_ms": deadline_ms, "load": given.load, "alone_ms": alone,
        "ladder": ladder, "served_per_s": served, "seconds": given.seconds, "rounds": given.rounds,
        "threads": given.threads, "largest_batch": given.largest_batch, "load_average": loads, "cores": os.cpu_count(),
        "slowdown": handler.slowdown, "top1_of": {name: top1[name] for name in ladder},
    })  # fmt: skip


def _wait_until_measured(handler: RequestHandler) -> None:
    while not handler.is_calibrated:
        time.sleep(0.05)


def _arrivals(per_s: float, seconds: float, seed: int) -> np.ndarray:
    """Seconds from the start."""
    gaps = np.random.default_rng(seed).exponential(1 / per_s, size=int(2 * per_s * seconds))
    times = np.cumsum(gaps)
    return times[times < seconds]


def _served_per_s(handler: RequestHandler, tensors: Sequence[Tensor], route: str, seconds: float = 3.0) -> float:
    """Requests a second that a route answers while 100 wait."""
    waiting = threading.Semaphore(100)
    done = 0

    def count(future: Future[Answer]) -> None:
        nonlocal done
        done += 1
        waiting.release()

    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        waiting.acquire()
        handler.submit(tensors, {"route": route}).add_done_callback(count)
    found = done / (time.perf_counter() - started)
    for _ in range(100):
        waiting.acquire()
    return found


def _serve(
    handler: RequestHandler, tensors: Sequence[Tensor], parameters: Mapping[str, object], arrivals: np.ndarray,
    deadline_ms: float, outcome: Outcome,
) -> None:  # fmt: skip
    """Sends requests when they are due, whatever becomes of those before, and waits for the last."""
    left = threading.Semaphore(0)

    def done(future: Future[Answer]) -> None:
        if future.exception() is not None:
            assert isinstance(future.exception(), Overloaded), future.exception()
            outcome.refused += 1
        else:
            answer = future.result()
            outcome.latencies_ms.append(answer.took_ms)
            outcome.routes[answer.route] += 1
            outcome.late += answer.took_ms > deadline_ms
        left.release()

    started = time.monotonic()
    for arrival in arrivals:
        due = started + float(arrival)
        if (wait := due - time.monotonic()) > 0:
            time.sleep(wait)
        # a sender that is late itself does not give the server more time
        handler.submit(tensors, parameters, arrived_s=due).add_done_callback(done)
    for _ in arrivals:
        left.acquire()


def _line(facts: Mapping[str, Any]) -> str:
    return (
        f"late {facts['late_share']:7.2%} (refused {facts['refused']}/{facts['requests']})  "
        f"top-1 {facts['top1']:.2f} %  p50 {facts['p50_ms']:8.2f} ms  p99 {facts['p99_ms']:8.2f} ms"
    )


if __name__ == "__main__":
    main()
