"""Time, injected: the same driver runs on the wall clock and in virtual time."""

from __future__ import annotations

import contextlib
import functools
import math
import time
import uuid
from collections.abc import Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol


class Clock(Protocol):
    """Seconds since the run began."""

    def now(self) -> float:
        """The current time in seconds."""
        ...

    def wait_until(self, time_s: float, waitables: Sequence[Any] = ()) -> None:
        """Return when `time_s` has come; at once when it has passed.

        Args:
            time_s: on this clock.
            waitables: connections, sockets or other objects with a `fileno`; on the wall clock the first that can be read ends
                the wait.
        """
        ...


def readable(waitables: Sequence[Any], timeout_s: float | None) -> bool:
    """Whether any of these connections, sockets or objects with a `fileno` can be read within this time; None is for ever."""
    return bool(wait(list(waitables), timeout_s))


class Origin(float):
    """Where a wall clock is 0, in `time.perf_counter` seconds; sent to another machine it is the same moment there, as well as
    the system clocks of the two agree."""

    def __reduce__(self) -> tuple[object, ...]:
        return (origin_here, (float(self), time.time() - (time.perf_counter() - self), machine()))


def origin_here(origin_s: float, system_s: float, made_on: str) -> Origin:
    """An origin that was made on some machine, in the seconds of this one.

    Args:
        origin_s: in its `time.perf_counter` seconds.
        system_s: the same moment in `time.time` seconds.
        made_on: its `machine`.
    """
    return Origin(origin_s if made_on == machine() else time.perf_counter() - (time.time() - system_s))


@functools.cache
def machine() -> str:
    """This machine since its last start; containers on it have the same `time.perf_counter`."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{uuid.getnode():x}"


class WallClock:
    """Real time.

    Args:
        origin_s: where the clock is 0, in `time.perf_counter` seconds; now by default. Processes that share an origin share a
            clock.
    """

    def __init__(self, origin_s: float | None = None) -> None:
        self.origin_s = Origin(time.perf_counter() if origin_s is None else origin_s)

    def now(self) -> float:
        return time.perf_counter() - self.origin_s

    def wait_until(self, time_s: float, waitables: Sequence[Any] = ()) -> None:
        left_s = max(0.0, time_s - self.now())
        if waitables:
            readable(waitables, None if math.isinf(left_s) else left_s)
        else:
            time.sleep(left_s)


class VirtualClock:
    """Time that jumps to wherever it is told."""

    def __init__(self, start_s: float = 0.0) -> None:
        self._now = start_s

    def now(self) -> float:
        return self._now

    def wait_until(self, time_s: float, waitables: Sequence[Any] = ()) -> None:
        self._now = max(self._now, time_s)
