"""Keeping a tail latency under changing load by moving along the frontier.

Stepping down is quick, stepping up is slow, and slower still to a route that was left because it was over the
target: that is the hysteresis which keeps a load at the edge from flipping routes at every call. When calls
become rarer than they were then, it is forgotten.
Imports nothing heavy.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from klas_zoo.errors import UsageError

Rung = tuple[str, float]
"""A route's name and the milliseconds it takes alone."""


@dataclass(frozen=True, kw_only=True)
class ControllerSettings:
    """How a controller reacts.

    Attributes:
        percentile: of the latencies of the window that is held below the target, 0..100.
        window: how many of the last calls are looked at.
        least: calls on a route before it may be left, unless one alone took `panic` targets.
        headroom: share of the target below which the next route has to be expected before a step up.
        patience: calls on a route before a step up; for a step to a route it doubles whenever that route is
            left for a faster one, up to `most_patience`, and halves whenever that has lasted twice as long.
        lighter: share of the calls per second at which a route was left, below which it is tried as if it
            never had been.
        panic: a call that takes so many targets makes the controller step down at once.
    """

    percentile: float = 99.0
    window: int = 100
    least: int = 10
    headroom: float = 0.85
    patience: int = 50
    most_patience: int = 1600
    lighter: float = 0.7
    panic: float = 2.0


@dataclass(frozen=True, kw_only=True)
class ControllerCounters:
    """What a controller did so far.

    Attributes:
        patience: calls on the present route before a step up.
        now_ms: the percentile of the window, NaN before the first call.
    """

    route: str
    calls: int
    over_target: int
    steps_up: int
    steps_down: int
    taken_back: int
    patience: int
    now_ms: float
    calls_of: dict[str, int]
    last_step: str


class Controller:
    """Chooses the route of the next call from how long the last ones took. Safe to use from many threads.

    Args:
        ladder: routes from fast to slow, each more accurate than the one before, with their latency alone.
        target_ms: what the percentile of all latencies, waiting included, shall not exceed.

    Raises:
        UsageError: there is no route, they are not sorted, or the target is no latency.
    """

    def __init__(
        self, ladder: Sequence[Rung], target_ms: float, settings: ControllerSettings | None = None
    ) -> None:
        self.settings = settings or ControllerSettings()
        self.ladder, self.target_ms = tuple(ladder), target_ms
        costs = [cost for _, cost in self.ladder]
        if not costs or costs != sorted(costs) or not all(0 < cost < math.inf for cost in costs):
            raise UsageError("A controller needs routes from fast to slow, each with a latency above zero.")
        if not 0 < target_ms < math.inf:
            raise UsageError(f"A target of {target_ms} ms is no latency: it has to be finite and above zero.")
        # the slowest that would keep the target on an idle machine
        self._at = max([k for k, cost in enumerate(costs) if cost <= self.settings.headroom * target_ms], default=0)
        self._lock = threading.Lock()
        self._recent: deque[float] = deque(maxlen=self.settings.window)
        self._times: deque[float] = deque(maxlen=self.settings.window)  # seconds, when calls ended
        self._on_rung = self._since = 0  # calls since the last step, and how many of them count as lasted already
        self._patience_for = [self.settings.patience] * len(costs)  # a step up to each rung
        self._left_at = [0.0] * len(costs)  # calls per second when each was last left for a faster one
        self._climbed = False
        self._calls = self._over = self._up = self._down = self._back = 0
        self._calls_of = dict.fromkeys((name for name, _ in self.ladder), 0)
        self._last_step = ""

    @property
    def route(self) -> str:
        """Of the next call."""
        return self.ladder[self._at][0]

    def observe(self, route: str, latency_ms: float, *, now_s: float | None = None) -> None:
        """Tells how long a call took from its arrival to its answer, waiting included.

        Args:
            now_s: when it ended, on any clock that only goes forward. Default: now, on the system's.
        """
        with self._lock:
            self._times.append(time.monotonic() if now_s is None else now_s)
            self._calls += 1
            self._calls_of[route] += 1
            self._over += latency_ms > self.target_ms
            if route != self.route:
                return  # it began before the last step: it says nothing of this route
            self._recent.append(latency_ms)
            self._on_rung += 1
            self._decide(latency_ms)

    def counters(self) -> ControllerCounters:
        with self._lock:
            return ControllerCounters(
                route=self.route, calls=self._calls, over_target=self._over, steps_up=self._up,
                steps_down=self._down, taken_back=self._back, patience=self._patience(), now_ms=self._now(),
                calls_of=dict(self._calls_of), last_step=self._last_step,
            )  # fmt: skip

    def _decide(self, latency_ms: float) -> None:
        now, panic = self._now(), latency_ms > self.settings.panic * self.target_ms
        if self._on_rung - self._since >= 2 * self._patience_for[self._at]:  # it has lasted
            self._climbed, self._since = False, self._on_rung
            self._patience_for[self._at] = max(self._patience_for[self._at] // 2, self.settings.patience)
        if self._at > 0 and (panic or (self._on_rung >= self.settings.least and now > self.target_ms)):
            self._step_down(max(now, latency_ms) if panic else now)
        elif self._at + 1 < len(self.ladder) and self._on_rung >= self._patience():
            expected = now * self._cost(self._at + 1) / self._cost(self._at)
            if expected <= self.settings.headroom * self.target_ms:
                self._step_to(self._at + 1, f"{now:.3g} ms leave room for {expected:.3g} ms")
                self._up += 1
                self._climbed = True

    def _step_down(self, now: float) -> None:
        self._back += self._climbed
        self._climbed = False
        self._patience_for[self._at] = min(2 * self._patience_for[self._at], self.settings.most_patience)
        self._left_at[self._at] = self._rate()
        # as far as the excess asks for, at least one
        wanted = self._cost(self._at) * self.target_ms / now
        fitting = [k for k in range(self._at) if self._cost(k) <= wanted]
        self._step_to(max(fitting, default=0), f"{now:.3g} ms are over {self.target_ms:.3g} ms")
        self._down += 1

    def _step_to(self, at: int, why: str) -> None:
        self._last_step = f"{self.route} → {self.ladder[at][0]}: {why}"
        self._at = at
        self._recent.clear()
        self._on_rung = self._since = 0

    def _patience(self) -> int:
        """Calls on this rung before a step to the next."""
        above = min(self._at + 1, len(self.ladder) - 1)
        lighter = self._rate() < self.settings.lighter * self._left_at[above]
        return self.settings.patience if lighter else self._patience_for[above]

    def _rate(self) -> float:
        """Calls per second over the window, on whatever route."""
        took = self._times[-1] - self._times[0] if self._times else 0.0
        return (len(self._times) - 1) / took if took > 0 else math.inf

    def _cost(self, at: int) -> float:
        return self.ladder[at][1]

    def _now(self) -> float:
        """The percentile of the window, ms; of fewer calls too, as many may lie above it as in a full window."""
        if not self._recent:
            return math.nan
        above = self.settings.window - math.ceil(self.settings.percentile / 100 * self.settings.window)
        return sorted(self._recent)[-1 - min(above, len(self._recent) - 1)]
