"""The one thread of a model that computes: it takes what the scheduler chooses from a bounded queue.

One batch at a time has all threads of onnxruntime to itself; requests that wait meanwhile are merged. While nothing
waits, latencies are measured that are not known yet.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from klas_zoo.errors import KlasZooError, Overloaded
from klas_zoo.serving.latencies import LatencyModel
from klas_zoo.serving.metrics import Metrics
from klas_zoo.serving.scheduling import Job, Plan, Scheduler

_KEPT_IMAGES = 8
"""Memory that a batch of so many images takes is not given back after it."""
_LONGEST_BATCH_S = 60.0  # that is waited for when a model is unloaded
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """
    Attributes:
        logits: (B, classes), float32.
        route: that gave them.
        waited_ms: in the queue.
        took_ms: from arrival to answer.
    """

    logits: np.ndarray
    route: str
    waited_ms: float
    took_ms: float


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a job carries.

    Attributes:
        images: (B, C, H, W), float32.
        future: of its `Answer`.
        on_answer: called before the future is set, on the computing thread.
    """

    images: np.ndarray
    future: Future[Answer] = field(default_factory=Future)
    on_answer: Callable[[Answer], None] = lambda answer: None


class Batcher:
    """
    Args:
        run: computes images (B, C, H, W) by the route of a name.
        scheduler: what is next; asked anew every time, as routes and latencies become known.
        ceiling: the most accurate route that may be taken now; None: any.
        queue_images: that may wait.
        idle_work: steps of some milliseconds that are done while no request waits.
        release_memory: called when no request waits, after a batch of more than 8 images.
    """

    def __init__(
        self,
        run: Callable[[np.ndarray, str], np.ndarray],
        scheduler: Callable[[], Scheduler],
        *,
        latencies: LatencyModel,
        metrics: Metrics,
        queue_images: int,
        ceiling: Callable[[], str | None] = lambda: None,
        idle_work: Iterator[None] | None = None,
        release_memory: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._scheduler, self._ceiling = run, scheduler, ceiling
        self._latencies, self._metrics, self._limit = latencies, metrics, queue_images
        self._idle_work, self._release_memory = idle_work, release_memory
        self._grown = False  # by a large batch, since memory was released
        self._queue: list[Job] = []
        self._images = 0
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._process = 0

    @property
    def is_idle(self) -> bool:
        """Whether all work for idle times is done."""
        return self._idle_work is None and not self._grown

    def start(self) -> None:
        """Starts the thread, if this process has none: threads do not survive a fork."""
        with self._changed:
            if self._closed or (self._thread is not None and self._process == os.getpid()):
                return
            self._process = os.getpid()
            atexit.register(self.close)  # a thread that computes while the interpreter ends would abort the process
            self._thread = threading.Thread(target=self._work, name="klas-zoo batches", daemon=True)
            self._thread.start()

    def submit(self, job: Job) -> None:
        """Queues a job whose payload is a `Work`; its future gets the answer.

        Raises:
            Overloaded: too many images wait already, or the server is being shut down.
        """
        self.start()
        with self._changed:
            if self._closed:
                raise Overloaded("The model is being unloaded: ask again later.")
            if self._queue and self._images + job.images > self._limit:
                raise Overloaded(
                    f"{self._images} images wait already, and the queue holds {self._limit}: ask again later, or start "
                    "more servers."
                )
            insort(self._queue, job, key=lambda one: one.urgency)
            self._count(job.images)
            self._changed.notify()

    def close(self) -> None:
        """Answers what waits with `Overloaded`, and ends the thread."""
        with self._changed:
            self._closed = True
            waiting, self._queue = self._queue, []
            self._count(-self._images)
            self._changed.notify_all()
        for job in waiting:
            _refuse(job, Overloaded("The model is being unloaded: ask again later."))
        atexit.unregister(self.close)
        if self._thread is not None and self._process == os.getpid():
            self._thread.join(_LONGEST_BATCH_S)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed and not self._grown and self._idle_work is None:
                    self._changed.wait()
                if self._closed:
                    return
                busy = bool(self._queue)
            if busy:
                self._serve()
            else:
                self._idle()

    def _idle(self) -> None:
        """One step of what is to be done; memory last, because measuring takes it too."""
        try:
            if self._idle_work is not None:
                next(self._idle_work)
            elif self._grown:
                self._release_memory()
                self._grown = False
        except StopIteration:
            self._idle_work, self._grown = None, True
        except KlasZooError as error:
            _LOG.warning("Work between requests failed, and is not tried again: %s", error)
            self._idle_work, self._grown = None, False

    def _serve(self) -> None:
        with self._changed:
            if not self._queue:  # closed meanwhile
                return
            now = time.monotonic()
            plan = self._plan(now)
            gone = {id(one) for one in (*plan.jobs, *plan.late)}
            self._queue = [one for one in self._queue if id(one) not in gone]
            self._count(-sum(one.images for one in (*plan.jobs, *plan.late)))
        for job in plan.late:
            waited = 1e3 * (now - job.arrived_s)
            self._metrics.add("klas_zoo_refusals_total", reason="late")
            _refuse(job, Overloaded(f"Waited {waited:.3g} ms; no route can answer in the time that is left."))
        jobs = [one for one in plan.jobs if one.payload.future.set_running_or_notify_cancel()]
        if jobs:
            self._compute(jobs, plan.route)

    def _plan(self, now_s: float) -> Plan:
        try:
            return self._scheduler().plan(self._queue, now_s, ceiling=self._ceiling())
        except Exception:  # a fault of ours must not end the thread: the next request is answered by what it names
            _LOG.exception("A batch could not be planned")
            return self._scheduler().first(self._queue)

    def _compute(self, jobs: Sequence[Job], route: str) -> None:
        """Answers jobs as one batch; if that fails, each alone, so that none pays for another."""
        started = time.monotonic()
        images = [one.payload.images for one in jobs]
        try:
            logits = self._run(images[0] if len(images) == 1 else np.concatenate(images), route)
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._compute([job], route)
                return
            self._metrics.add("klas_zoo_refusals_total", reason="failed")
            jobs[0].payload.future.set_exception(error)
            return
        ended = time.monotonic()
        self._grown |= len(logits) > _KEPT_IMAGES
        self._latencies.observe(route, sum(one.images for one in jobs), 1e3 * (ended - started))
        self._metrics.set("klas_zoo_slowdown", self._latencies.slowdown)
        self._metrics.observe("klas_zoo_batch_images", sum(one.images for one in jobs))
        for job, part in zip(jobs, np.split(logits, np.cumsum([one.images for one in jobs])[:-1]), strict=True):
            self._answer(job, part, route, started)

    def _answer(self, job: Job, logits: np.ndarray, route: str, started: float) -> None:
        ended = time.monotonic()
        answer = Answer(
            logits=logits, route=route, waited_ms=1e3 * (started - job.arrived_s), took_ms=1e3 * (ended - job.arrived_s)
        )
        self._metrics.add("klas_zoo_answers_total", route=route)
        self._metrics.observe("klas_zoo_request_seconds", answer.took_ms / 1e3, route=route)
        self._metrics.observe("klas_zoo_queue_seconds", answer.waited_ms / 1e3)
        if ended > job.deadline_s:
            self._metrics.add("klas_zoo_late_answers_total", route=route)
        job.payload.on_answer(answer)
        job.payload.future.set_result(answer)

    def _count(self, images: int) -> None:
        self._images += images
        self._metrics.set("klas_zoo_queue_images", self._images)


def _refuse(job: Job, error: KlasZooError) -> None:
    if job.payload.future.set_running_or_notify_cancel():
        job.payload.future.set_exception(error)
