"""Which of the waiting requests are answered next, together, and by which route. No threads, no clock, no network.

Requests are served by earliest deadline first. The route is the most accurate one with which *every* request that waits
now would still meet its deadline, if all of them were served by it one batch after another; so a queue that grows
lowers the accuracy of all a little, before it makes some late. Requests are merged while the batch still ends before
the earliest deadline in it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from klas_zoo.serving.latencies import LatencyModel

_PATIENCE_S = 1.0
"""After so long, a request without a deadline goes before all whose deadlines are later than that."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """A request that waits.

    Attributes:
        images: how many.
        route: that has to answer; None: any that meets the deadline.
        arrived_s, deadline_s: by one clock that only goes forward; the deadline is infinite where there is none.
        steered: a controller limits which routes may answer.
        payload: what the scheduler does not look at.
    """

    images: int
    arrived_s: float
    deadline_s: float = math.inf
    route: str | None = None
    steered: bool = False
    payload: Any = field(default=None, repr=False)

    @property
    def urgency(self) -> float:
        """Sorts the more urgent first."""
        return min(self.deadline_s, self.arrived_s + _PATIENCE_S)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is done next.

    Attributes:
        route: that answers `jobs`, merged into one batch; no jobs: nothing can be answered in time.
        late: jobs that not even the fastest route would answer in time.
    """

    route: str
    jobs: tuple[Job, ...]
    late: tuple[Job, ...]


@dataclass(frozen=True, kw_only=True)
class Scheduler:
    """
    Attributes:
        ladder: routes from fast to slow, each more accurate than the one before; not empty.
        latencies: knows all of them.
        largest_batch: images that are merged.
    """

    ladder: tuple[str, ...]
    latencies: LatencyModel
    largest_batch: int

    def plan(self, queue: Sequence[Job], now_s: float, *, ceiling: str | None = None) -> Plan:
        """
        Args:
            queue: not empty, by `urgency`.
            ceiling: the most accurate route of the ladder that may answer jobs that are steered.
        """
        late: list[Job] = []
        waiting: list[Job] = []
        for one in queue:
            (late if self._is_late(one, now_s) else waiting).append(one)
        if not waiting:
            return Plan(route=self.ladder[0], jobs=(), late=tuple(late))
        head = waiting[0]
        route = head.route or self._route(waiting, now_s, ceiling if head.steered else None)
        same: list[Job] = []
        others: list[Job] = []
        for one in waiting:
            (same if (one.route, one.steered) == (head.route, head.steered) else others).append(one)
        # a batch of patient requests does not grow until the others are late
        end_s = min(map(self._latest_start, others), default=math.inf)
        return Plan(route=route, jobs=tuple(same[: self._merged(same, 0, route, now_s, end_s)]), late=tuple(late))

    def first(self, queue: Sequence[Job]) -> Plan:
        """The most urgent job alone, by the route it names or the fastest."""
        return Plan(route=queue[0].route or self.ladder[0], jobs=(queue[0],), late=())

    def _route(self, waiting: Sequence[Job], now_s: float, ceiling: str | None) -> str:
        """By bisection: a route that keeps all deadlines is followed by slower ones until one does not."""
        fits, end = 0, self.ladder.index(ceiling) + 1 if ceiling in self.ladder else len(self.ladder)
        while end - fits > 1:
            middle = (fits + end) // 2
            if self._keeps_all(waiting, self.ladder[middle], now_s):
                fits = middle
            else:
                end = middle
        return self.ladder[fits]

    def _is_late(self, job: Job, now_s: float) -> bool:
        return now_s > self._latest_start(job)

    def _latest_start(self, job: Job) -> float:
        if job.deadline_s == math.inf:
            return math.inf
        return job.deadline_s - self.latencies.expected(job.route or self.ladder[0], job.images) / 1e3

    def _keeps_all(self, waiting: Sequence[Job], route: str, now_s: float) -> bool:
        """Whether all would be answered in time, one batch after another; those that name a route by that one."""
        at = 0
        while at < len(waiting):
            taken = waiting[at].route or route
            count = self._merged(waiting, at, taken, now_s)
            batch = waiting[at : at + count]
            now_s += self._seconds(taken, sum(one.images for one in batch))
            if now_s > min(one.deadline_s for one in batch):
                return False
            at += count
        return True

    def _merged(self, jobs: Sequence[Job], start: int, route: str, now_s: float, end_s: float = math.inf) -> int:
        """How many jobs from `start` on make a batch that ends before `end_s` and all their deadlines; at least one."""
        first, images, deadline_s, count = jobs[start], 0, end_s, 0
        for at in range(start, len(jobs)):
            one = jobs[at]
            images, deadline_s = images + one.images, min(deadline_s, one.deadline_s)
            if count and (
                one.route != first.route
                or images > self.largest_batch
                or now_s + self._seconds(route, images) > deadline_s
            ):
                break
            count += 1
        return count

    def _seconds(self, route: str, images: int) -> float:
        return self.latencies.cautious(route, images) / 1e3
