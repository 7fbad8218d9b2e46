"""Requests to a real tritonserver while its routes are loaded, unloaded and loaded anew: is any answer wrong or lost?

    sh scripts/servers
    python benchmarks/triton_requests.py --requests 10000 --clients 8

Half of the routes are asked by all clients, over HTTP and gRPC, in batches of 1 to 4 real images, and so is the one
model of all routes, with `latency_ms` or `route` as a parameter; every answer is compared with torch's of the route
that is said to have given it. The other half is loaded and unloaded all the time, and the routes that are asked are
loaded anew under a changed configuration, one after another. A request that fails is lost: nothing is asked twice.
"""

from __future__ import annotations

import argparse
import itertools
import queue
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tritonclient.grpc
import tritonclient.http
from record import write_record
from tritonclient.utils import InferenceServerException

from klas_zoo.building.exporting import images_for
from klas_zoo.building.package_sources import choose, random_source
from klas_zoo.exporters.family import export_family
from klas_zoo.exporters.to_triton import TritonSettings, model_name, write_repository
from klas_zoo.families.specs import find_family

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from server_processes import Server, triton

FAMILY, TOLERANCE, LARGEST = "deit-micro", 1e-4, 8


class Traffic:
    """Clients that ask, and a hand that loads and unloads."""

    def __init__(
        self, server: Server, asked: list[str], changed: list[str], models: Path, pause_s: float
    ) -> None:
        self.pause_s = pause_s
        self.server, self.asked, self.changed, self.models = server, asked, changed, models
        self.counts: Counter[str] = Counter()
        self.latencies_ms: list[float] = []
        self.lost: Counter[str] = Counter()
        self._lock, self._done = threading.Lock(), threading.Event()

    def run(self, requests: int, clients: int, images: np.ndarray, wanted: dict[str, np.ndarray]) -> float:
        """Seconds that all requests took."""
        numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(requests):
            numbers.put(number)
        workers = [threading.Thread(target=self._ask, args=(numbers, n, images, wanted)) for n in range(clients)]
        hand = threading.Thread(target=self._change)
        started = time.perf_counter()
        for thread in (hand, *workers):
            thread.start()
        for thread in workers:
            thread.join()
        seconds = time.perf_counter() - started
        self._done.set()
        hand.join()
        return seconds

    def _ask(
        self, numbers: queue.SimpleQueue[int], client: int, images: np.ndarray, wanted: dict[str, np.ndarray]
    ) -> None:
        kind: Any = tritonclient.http if client % 2 else tritonclient.grpc
        address = self.server.http if client % 2 else self.server.grpc
        random = np.random.default_rng(client)
        with kind.InferenceServerClient(address) as connection:
            while True:
                try:
                    number = numbers.get_nowait()
                except queue.Empty:
                    return
                model, route, parameters = self._request(number, random)
                chosen = random.integers(len(images), size=random.integers(1, 5))
                sent = kind.InferInput("images", [len(chosen), *images.shape[1:]], "FP32")
                sent.set_data_from_numpy(images[chosen])
                started = time.perf_counter()
                try:
                    answer = connection.infer(model, [sent], parameters=parameters)
                except InferenceServerException as error:
                    with self._lock:
                        self.lost[str(error)[:200]] += 1
                    continue
                taken = 1e3 * (time.perf_counter() - started)
                found = answer.as_numpy("logits")
                if parameters:
                    (said,) = {name.decode() for name in answer.as_numpy("route").flat}
                    assert route in (None, said), (route, said)
                    route = said
                time.sleep(self.pause_s)
                right = found.shape == wanted[route][chosen].shape and bool(
                    np.abs(found - wanted[route][chosen]).max() <= TOLERANCE * wanted[route].std()
                )
                with self._lock:
                    self.counts["right" if right else "wrong"] += 1
                    self.counts["images"] += len(chosen)
                    self.latencies_ms.append(taken)

    def _request(self, number: int, random: Any) -> tuple[str, str | None, dict[str, Any]]:
        """Model, route (None: whichever fits) and parameters of a request."""
        turn = number % (len(self.asked) + 1)
        if turn < len(self.asked):
            return model_name(FAMILY, self.asked[turn]), self.asked[turn], {}
        if random.random() < 0.5:
            return FAMILY, None, {"latency_ms": int(random.integers(50, 1000))}
        route = str(random.choice([*self.asked, *self.changed]))
        return FAMILY, route, {"route": route}

    def _change(self) -> None:
        """Until the clients are done: one route away and back, then one that is asked anew."""
        with tritonclient.grpc.InferenceServerClient(self.server.grpc) as connection:
            for turn in itertools.count():
                if self._done.is_set():
                    return
                name = model_name(FAMILY, self.changed[turn % len(self.changed)])
                connection.load_model(name)
                connection.unload_model(name)
                name = model_name(FAMILY, self.asked[turn % len(self.asked)])
                config = self.models / name / "config.pbtxt"
                text = config.read_text().replace("queue_delay_microseconds: 100", "queue_delay_microseconds: 101")
                if turn // len(self.asked) % 2:
                    text = text.replace("queue_delay_microseconds: 101", "queue_delay_microseconds: 100")
                config.write_text(text)  # nothing is loaded anew that did not change
                connection.load_model(name)
                self.counts["loads"] += 2
                self.counts["unloads"] += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--routes", type=int, default=6)
    parser.add_argument("--pause-ms", type=float, default=0, help="Of a client between two requests.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    spec = find_family(FAMILY)
    source = random_source(spec, options.seed)
    step = max(1, len(source.routes) // options.routes)
    names = [one.name for one in source.routes[::step]][: options.routes]
    source = choose(source, names=names)
    images, described = images_for(spec, source, None, precision="fp32", count=64, seed=options.seed)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        package = export_family(
            source, folder / "package", precision="fp32", images=images, threads=1
        ).package
        references = package.references()
        write_repository(package, folder / "repository", TritonSettings(largest_batch=LARGEST))
        models = folder / "repository" / "models"
        asked, changed = names[::2], names[1::2]
        loaded = [f"--load-model={name}" for name in (FAMILY, *(model_name(FAMILY, route) for route in asked))]
        with triton(models, folder, "--model-control-mode=explicit", *loaded) as server:
            traffic = Traffic(server, asked, changed, models, options.pause_ms / 1e3)
            seconds = traffic.run(options.requests, options.clients, references.images, references.logits)
    lost = sum(traffic.lost.values())
    numbers = {
        "requests": options.requests, "clients": options.clients, "pause_ms": options.pause_ms,
        "seed": options.seed, "routes_asked": asked,
        "routes_loaded_and_unloaded": changed, "images": f"{len(references.images)} of {described}",
        "weights": source.facts.weights, "right": traffic.counts["right"],
        "wrong": traffic.counts["wrong"], "lost": lost, "lost_because": dict(traffic.lost),
        "images_sent": traffic.counts["images"], "loads": traffic.counts["loads"],
        "unloads": traffic.counts["unloads"], "seconds": seconds, "requests_per_s": options.requests / seconds,
        "p50_ms": float(np.percentile(traffic.latencies_ms, 50)),
        "p99_ms": float(np.percentile(traffic.latencies_ms, 99)), "server": "tritonserver 2.51 (nvidia-pytriton 0.7.0)",
        "tolerance": f"{TOLERANCE:g} of the spread of torch's logits",
    }  # fmt: skip
    counted = ("requests", "clients", "right", "wrong", "lost", "loads", "unloads")
    for name in (*counted, "requests_per_s", "p50_ms", "p99_ms"):
        print(f"{name:<16} {numbers[name]:.6g}")
    print(write_record("triton_requests", numbers))


if __name__ == "__main__":
    main()
