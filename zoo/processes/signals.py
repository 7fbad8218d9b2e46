"""SIGTERM and Ctrl-C: work that can be resumed is saved first, everything else stops at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from klas_zoo.errors import Interrupted

_ONE_PRESS_S = 3.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """The signal that this process received, if any. Without `installed` none is noted."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._patient, self._first_s = False, 0.0
        self._process = os.getpid()

    @contextmanager
    def installed(self) -> Iterator[Signals]:
        """Turns signals into `Interrupted`, raised where the program is; only in the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {one: signal.signal(one, self._handle) for one in _SIGNALS}
        try:
            yield self
        finally:
            for one, handler in before.items():
                signal.signal(one, handler)

    @contextmanager
    def patiently(self) -> Iterator[None]:
        """Inside, a first signal is only noted in `received`; a second one raises at once.

        Raises:
            Interrupted: at the end, where a signal was noted and the body did not stop for it.
        """
        self._patient = True
        try:
            yield
        finally:
            self._patient = False
        if self.received is not None:
            raise Interrupted(self.received)

    def stop(self, where: str) -> Interrupted:
        """The error to raise when everything is saved."""
        received = self.received or signal.SIGTERM  # another process of the team got it
        return Interrupted(received, where)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a forked worker; its parent sees to it
        # a terminal and torchrun may both pass on what was one press of a key
        again = self.received is not None and time.monotonic() - self._first_s > _ONE_PRESS_S
        if self.received is None:
            self.received, self._first_s = signal.Signals(number), time.monotonic()
        if not self._patient or again:
            raise Interrupted(self.received)
