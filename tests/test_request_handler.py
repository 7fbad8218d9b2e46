"""What every server does with a request: real engines, a real queue, no network."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import malformed
import numpy as np
import packages
import pytest
from protocol import torchs_logits

from klas_zoo.errors import KlasZooError, NothingFits, Overloaded, UnknownName, UsageError, VerificationError
from klas_zoo.exporters.package import Package
from klas_zoo.profiles.devices import resolve_device
from klas_zoo.serving.request_handler import RequestHandler, is_clients_fault, names_of
from klas_zoo.serving.settings import ServingSettings
from klas_zoo.serving.validation import Tensor

SLIM, STITCH, WIDE = map(str, packages.ROUTES)


class Counts:
    """Metrics that are kept."""

    def __init__(self) -> None:
        self.added: Counter[tuple[str, ...]] = Counter()
        self.last: dict[tuple[str, ...], float] = {}
        self.observed: Counter[str] = Counter()

    def add(self, name: str, count: int = 1, /, **labels: str) -> None:
        self.added[(name, *labels.values())] += count

    def set(self, name: str, value: float, **labels: str) -> None:
        self.last[(name, *labels.values())] = value

    def observe(self, name: str, value: float, **labels: str) -> None:
        self.observed[name] += 1


def timed_package(tmp_path_factory: pytest.TempPathFactory, scale: float = 1.0) -> Package:
    """Routes said to take 100, 200 and 300 ms for one image and twice that for eight: nothing real comes near it."""
    here = {"hardware": resolve_device("cpu").hardware, "threads": 1}
    routes = tuple(
        replace(
            one,
            latencies=(
                packages.latency(100.0 * scale * number, **here),
                packages.latency(200.0 * scale * number, batch=8, **here),
            ),
        )
        for number, one in enumerate(packages.source().routes, start=1)
    )
    return packages.write_package(tmp_path_factory.mktemp("packages") / "package", routes=routes)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Package:
    return timed_package(tmp_path_factory)


def settings(**changes: Any) -> ServingSettings:
    return ServingSettings(**{"threads": 1, "largest_batch": 8, "calibrate": False, **changes})


@pytest.fixture(scope="module")
def handler(package: Package) -> Iterator[RequestHandler]:
    found = RequestHandler(package, settings())
    yield found
    found.close()


def tensors(images: np.ndarray) -> list[Tensor]:
    return [Tensor(name="images", datatype="FP32", shape=images.shape, data=images)]


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, *packages.SHAPE), dtype=np.float32)


@pytest.mark.parametrize("route", packages.ROUTES, ids=str)
def test_the_route_that_is_named_answers_what_torch_answers(handler: RequestHandler, route: Any) -> None:
    answer = handler.answer(tensors(images(3)), {"route": str(route)})
    assert answer.route == str(route) and 0 <= answer.waited_ms <= answer.took_ms
    np.testing.assert_allclose(answer.logits, torchs_logits(route, images(3)), atol=1e-4)


@pytest.mark.parametrize(
    ("parameters", "batch", "route"),
    [
        ({}, 1, WIDE),
        ({"latency_ms": 60_000}, 1, WIDE),
        ({"latency_ms": "250"}, 1, STITCH),
        ({"latency_ms": "190ms"}, 1, SLIM),
        ({"latency_ms": 60_000}, 8, WIDE),
        ({"latency_ms": 500}, 8, STITCH),
        ({"latency_ms": "60s", "sequence_id": 7}, 1, WIDE),
    ],
)
def test_the_most_accurate_route_within_the_budget_answers(
    handler: RequestHandler, parameters: dict[str, object], batch: int, route: str
) -> None:
    handler._latencies._slowdown, handler._latencies._deviation = 1.0, 0.0  # real calls are far faster than claimed
    assert handler.answer(tensors(images(batch)), parameters).route == route


def test_a_budget_nothing_fits_names_the_nearest(handler: RequestHandler) -> None:
    with pytest.raises(NothingFits, match=rf"1 image within 50\.0 ms: the nearest, {SLIM}, takes 100 ms") as found:
        handler.submit(tensors(images(1)), {"latency_ms": 50})
    assert is_clients_fault(found.value)
    with pytest.raises(NothingFits, match="8 images within 150 ms"):
        handler.submit(tensors(images(8)), {"latency_ms": 150})


def test_a_route_that_is_not_there_is_refused_with_the_nearest(handler: RequestHandler) -> None:
    with pytest.raises(UnknownName, match="did you mean slim"):
        handler.submit(tensors(images(1)), {"route": "slimm"})


def test_no_malformed_request_is_answered_and_no_good_one_beside_it_is_lost(package: Package) -> None:
    """Good and malformed ones come from two threads at once; refusals are the client's fault, each and every one."""
    counts = Counts()
    handler = RequestHandler(package, settings(queue_images=1000), metrics=counts)
    good = [handler.submit(tensors(images(1, seed)), {"route": SLIM}) for seed in range(20)]
    refused: list[KlasZooError] = []

    def attack() -> None:
        for one in malformed.requests(seed=2, count=200):
            assert one.request is not None
            parts = [Tensor(**{key: entry.get(key) for key in ("name", "datatype", "shape", "data")})
                     for entry in one.request["inputs"]]  # fmt: skip
            try:
                handler.submit(parts, one.request.get("parameters", {}))
            except (UsageError, NothingFits) as error:
                refused.append(error)

    attacker = threading.Thread(target=attack)
    attacker.start()
    good += [handler.submit(tensors(images(1, seed)), {"route": SLIM}) for seed in range(20, 60)]
    attacker.join()
    expected = torchs_logits(packages.SLIM, np.concatenate([images(1, seed) for seed in range(60)]))
    found = np.concatenate([one.result(timeout=60).logits for one in good])
    handler.close()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert len(refused) == 200
    assert counts.added["klas_zoo_answers_total", SLIM] == 60
    assert sum(value for key, value in counts.added.items() if key[0] == "klas_zoo_refusals_total") == 200


class Blocked:
    """A handler whose engine waits until it is let go, so that requests pile up."""

    def __init__(self, package: Package, **changes: Any) -> None:
        self.counts, self.go, self.batches = Counts(), threading.Event(), []
        self.handler = RequestHandler(package, settings(**changes), metrics=self.counts)
        run = self.handler.session.run

        def waiting(images: np.ndarray, *, route: str) -> np.ndarray:
            self.go.wait(60)
            self.batches.append((route, len(images)))
            return run(images, route=route)

        self.handler.session.run = waiting  # type: ignore[method-assign, assignment]

    def submit(self, count: int = 1, seed: int = 0, **parameters: object) -> Any:
        return self.handler.submit(tensors(images(count, seed)), parameters)

    def hold(self) -> Any:
        """Keeps the engine busy; the future of the request that does."""
        future = self.submit(route=SLIM)
        while not future.running():
            time.sleep(0.001)
        return future

    def free(self) -> None:
        self.go.set()
        self.handler.close()


def test_requests_that_wait_are_merged_and_each_gets_its_own_logits(package: Package) -> None:
    blocked = Blocked(package)
    futures = [blocked.hold(), *[blocked.submit(2, seed, latency_ms=60_000) for seed in range(3)]]
    blocked.go.set()
    wait(futures, timeout=60)
    blocked.free()
    assert blocked.batches == [(SLIM, 1), (WIDE, 6)]
    for seed, future in enumerate(futures[1:]):
        np.testing.assert_allclose(future.result().logits, torchs_logits(packages.WIDE, images(2, seed)), atol=1e-4)


def test_a_budget_holds_for_the_batch_that_is_executed(package: Package) -> None:
    """Alone each would get the widest route; eight together take twice as long, and no request has time for that."""
    blocked = Blocked(package)
    futures = [blocked.hold(), *[blocked.submit(1, seed, latency_ms=450) for seed in range(8)]]
    blocked.handler._latencies._slowdown, blocked.handler._latencies._deviation = 1.0, 0.0
    blocked.go.set()
    wait(futures, timeout=60)
    blocked.free()
    route, count = blocked.batches[1]
    assert blocked.handler._latencies.alone(route, count) <= 450
    assert route != WIDE or count < 8


def test_what_has_waited_too_long_is_refused_as_an_overload(package: Package) -> None:
    blocked = Blocked(package)
    first, late = blocked.hold(), blocked.submit(latency_ms=110)
    time.sleep(0.15)
    blocked.go.set()
    with pytest.raises(Overloaded, match=r"Waited [1-9]\d\d+ ms; no route can answer in the time that is left"):
        late.result(timeout=60)
    assert first.result().route == SLIM
    blocked.free()
    assert blocked.counts.added["klas_zoo_refusals_total", "late"] == 1


def test_beyond_a_full_queue_requests_are_refused_as_an_overload(package: Package) -> None:
    blocked = Blocked(package, queue_images=16)
    futures = [blocked.hold(), blocked.submit(8), blocked.submit(8)]
    with pytest.raises(Overloaded, match="16 images wait already, and the queue holds 16") as found:
        blocked.submit(1)
    assert not is_clients_fault(found.value)
    blocked.go.set()
    assert all(future.result(timeout=60) for future in futures)
    blocked.free()


def test_an_engine_that_fails_on_one_request_does_not_lose_those_merged_with_it(package: Package) -> None:
    blocked = Blocked(package)
    run = blocked.handler.session.run

    def failing(images: np.ndarray, *, route: str) -> np.ndarray:
        if (images == 7).all(axis=(1, 2, 3)).any():
            raise VerificationError("onnxruntime says no.")
        return run(images, route=route)

    first = blocked.hold()
    blocked.handler.session.run = failing  # type: ignore[method-assign, assignment]
    good = [blocked.submit(1, seed, route=SLIM) for seed in range(3)]
    bad = blocked.handler.submit(tensors(np.full((1, *packages.SHAPE), 7, np.float32)), {"route": SLIM})
    blocked.go.set()
    with pytest.raises(VerificationError):
        bad.result(timeout=60)
    for seed, future in enumerate(good):
        np.testing.assert_allclose(future.result(60).logits, torchs_logits(packages.SLIM, images(1, seed)), atol=1e-4)
    assert first.result().route == SLIM
    blocked.free()


def test_what_a_client_gave_up_is_not_computed(package: Package) -> None:
    blocked = Blocked(package)
    first, given_up = blocked.hold(), blocked.submit(route=WIDE)
    assert given_up.cancel()
    blocked.go.set()
    assert first.result(60).route == SLIM
    blocked.free()
    assert blocked.batches == [(SLIM, 1)]


def test_what_waits_when_the_model_is_unloaded_is_refused(package: Package) -> None:
    blocked = Blocked(package)
    first, waiting = blocked.hold(), blocked.submit()
    closing = threading.Thread(target=blocked.handler.close)
    closing.start()
    with pytest.raises(Overloaded, match="being unloaded"):
        waiting.result(60)
    blocked.go.set()
    closing.join(60)
    assert first.result().route == SLIM
    with pytest.raises(Overloaded, match="being unloaded"):
        blocked.submit()


def test_requests_without_parameters_keep_the_target_of_the_models_configuration(package: Package) -> None:
    handler = RequestHandler(package, settings(target_ms=250.0))
    controller = handler.controller
    assert controller is not None and controller.target_ms == 250
    handler._latencies._slowdown, handler._latencies._deviation = 1.0, 0.0
    assert handler.answer(tensors(images(1)), {}).route == STITCH  # the widest would take 300 ms
    assert controller.counters().calls_of[STITCH] == 1
    assert handler.answer(tensors(images(1)), {"route": WIDE}).route == WIDE
    assert controller.counters().calls == 1
    handler.close()


def test_unknown_latencies_are_measured_while_the_model_answers_already(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    package = packages.write_package(tmp_path_factory.mktemp("packages") / "package")  # timed on a machine made up
    handler = RequestHandler(package, settings(largest_batch=3, calibrate=True))
    answers = [handler.submit(tensors(images(1)), {"latency_ms": 60_000}) for _ in range(3)]
    assert {one.result(60).route for one in answers} <= {SLIM, STITCH, WIDE}
    deadline = time.monotonic() + 60
    while not handler.is_calibrated and time.monotonic() < deadline:
        time.sleep(0.01)
    assert handler.session.latencies(batch=1).keys() == {SLIM, STITCH, WIDE}
    assert WIDE in handler.session.latencies(batch=2) and WIDE in handler.session.latencies(batch=3)
    assert handler.answer(tensors(images(3)), {"latency_ms": 60_000}).route == WIDE
    handler.close()


def test_a_package_that_knows_its_latencies_is_not_measured(package: Package) -> None:
    handler = RequestHandler(package, settings(largest_batch=1, calibrate=True))
    while not handler.is_calibrated:
        time.sleep(0.01)
    assert handler.session.latencies() == {SLIM: 100.0, STITCH: 200.0, WIDE: 300.0}
    handler.close()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"thread": 1}, "no parameter 'thread': known: threads, largest_batch"),
        ({"threads": -1}, "threads is 0 .* or more, not -1"),
        ({"threads": "two"}, "threads is a number, not 'two'"),
        ({"threads": 1.5}, r"threads is a whole number, not 1\.5"),
        ({"threads": True}, "threads is a number, not True"),
        ({"largest_batch": 0}, "at least 1, not 0"),
        ({"queue_images": 31}, "at least largest_batch, 32, not 31"),
        ({"target_ms": 0}, "target_ms is a time above zero"),
        ({"target_ms": "nan"}, "target_ms is a time above zero"),
        ({"target_ms": math.inf}, "target_ms is a time above zero"),
        ({"calibrate": "maybe"}, "calibrate is true or false, not 'maybe'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ServingSettings.read(values)


def test_settings_are_read_from_text_as_from_numbers() -> None:
    found = ServingSettings.read({"threads": "2", "largest_batch": "8", "target_ms": "12.5", "calibrate": "False"})
    assert found == ServingSettings(threads=2, largest_batch=8, target_ms=12.5, calibrate=False)


def test_a_routes_name_is_sent_for_every_image() -> None:
    found = names_of("tiny", 3)
    assert found.shape == (3, 1) and set(found.flat) == {b"tiny"}
    assert isinstance(found, np.ndarray) and found.dtype == object


_LARGE_BATCHES = """
import sys, threading, time
from pathlib import Path
import numpy as np
from klas_zoo.serving.request_handler import RequestHandler
from klas_zoo.serving.settings import ServingSettings
from klas_zoo.serving.validation import Tensor

def private_mib():
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in rollup if line.startswith("Private_")) / 1024

def tensors(count):
    images = np.full((count, 3, 16, 16), 0.5, np.float32)
    return [Tensor(name="images", datatype="FP32", shape=images.shape, data=images)]

settings = ServingSettings(threads=1, largest_batch=4096, queue_images=8192, calibrate=False)
handler = RequestHandler(sys.argv[1], settings)
names = [one.name for one in handler.session.routes]
large = tensors(4096)
for name in names:
    handler.answer(tensors(1), {"route": name})
sizes = [private_mib()]
answered = threading.Event()

def watch():  # from a thread: memory may have returned by the time an answer is here
    while not answered.wait(0.001):
        sizes.append(private_mib())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
for name in names:
    handler.answer(large, {"route": name})
answered.set()
watcher.join()
while not handler.is_calibrated:
    time.sleep(0.01)
after, until = private_mib(), time.monotonic() + 10
while after - sizes[0] > 0.2 * (max(sizes) - sizes[0]) and time.monotonic() < until:
    handler.answer(tensors(1), {"route": names[0]})
    time.sleep(0.1)
    after = private_mib()
print(sizes[0], max(sizes), after)
handler.close()
"""


def test_memory_returns_to_the_system_after_a_large_batch(package: Package) -> None:
    """In a process of its own: that of the tests has memory of torch that comes and goes."""
    if not Path("/proc/self/smaps_rollup").exists():
        pytest.skip("this system does not tell a process' private memory")
    command = [sys.executable, "-c", _LARGE_BATCHES, package.folder]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    before, grown, after = map(float, done.stdout.split())
    assert grown - before > 20, (before, grown, after)
    assert after - before < 0.25 * (grown - before), (before, grown, after)
