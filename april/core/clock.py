"""Time, injected: the same driver runs on the wall clock and in virtual time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since the run began."""

    def now(self) -> float:
        """The current time in seconds."""
        ...

    def wait_until(self, time_s: float) -> None:
        """Return when `time_s` has come; at once when it has passed."""
        ...


class WallClock:
    """Real time."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def wait_until(self, time_s: float) -> None:
        time.sleep(max(0.0, time_s - self.now()))


class VirtualClock:
    """Time that jumps to wherever it is told."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s

    def now(self) -> float:
        return self._now

    def wait_until(self, time_s: float) -> None:
        self._now = max(self._now, time_s)
