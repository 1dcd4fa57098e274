"""When a process that died may be started again."""

from __future__ import annotations

from collections import deque

from april.core.errors import ProcessError


class Restarts:
    """At most `limit` restarts within a window of time, each after twice the pause of the one before.

    Args:
        name: of the process, for the message.
        limit: restarts allowed within the window.
        pause_s: before the first.
        window_s: the time over which they are counted.
    """

    def __init__(self, name: str, limit: int, pause_s: float, window_s: float) -> None:
        self._name, self._limit, self._pause_s, self._window_s = name, limit, pause_s, window_s
        self._losses: deque[tuple[float, str]] = deque()
        self.total = 0

    def next_s(self, now_s: float, reason: str) -> float:
        """When the process may be started again.

        Raises:
            ProcessError: it was lost too often; with all reasons.
        """
        while self._losses and self._losses[0][0] <= now_s - self._window_s:
            self._losses.popleft()
        self._losses.append((now_s, reason))
        if len(self._losses) > self._limit:
            raise ProcessError(
                f"the {self._name} process was lost {len(self._losses)} times within {self._window_s:g} s",
                where="limits.restarts",
                got="; ".join(reason for _, reason in self._losses),
                expected=f"at most {self._limit} restarts",
                hint="`april train --resume FOLDER` goes on from the last step; does it run out of memory?",
            )
        self.total += 1
        return now_s + self._pause_s * 2.0 ** (len(self._losses) - 1)
