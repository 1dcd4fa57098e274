"""A call that ends: after its own time, or at a deadline."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

REPEAT_S = 0.25
"""A call that swallows the first alarm (in a destructor, a bare `except`) gets another one this much later."""


class Expired(BaseException):
    """The deadline has passed. Not an `Exception`, so that no `except Exception` on the way takes it for its own."""


def call_within(function: Callable[[], T], timeout_s: float | None) -> T:
    """The result of `function()`, unless it takes longer than `timeout_s`.

    In the main thread an alarm (SIGALRM) interrupts the call, Python loops and sleeps alike; the previous handler and
    timer are put back. Code that never returns to the interpreter (one huge big-integer operation) is only interrupted
    once it does: judge such rewards in worker processes. In other threads, where there are no signals, the call runs in
    a helper thread that is abandoned at the deadline: it goes on until it ends by itself or the process exits.

    Raises:
        Expired: at the deadline.
    """
    if timeout_s is None:
        return function()
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        return _interrupted_by_alarm(function, timeout_s)
    return _abandoned_in_thread(function, timeout_s)


def _interrupted_by_alarm(function: Callable[[], T], timeout_s: float) -> T:
    def on_alarm(signum: int, frame: object) -> None:
        raise Expired

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, on_alarm)
    timer_s, repeat_s = 0.0, 0.0
    try:
        try:
            timer_s, repeat_s = signal.setitimer(signal.ITIMER_REAL, timeout_s, REPEAT_S)
            return function()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm that lands here still finds the handler above
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
        if timer_s:
            signal.setitimer(signal.ITIMER_REAL, max(timer_s - (time.monotonic() - start), 1e-3), repeat_s)


def _abandoned_in_thread(function: Callable[[], T], timeout_s: float) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised again by the caller
            errors.append(error)

    thread = threading.Thread(target=run, name="april-reward", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if errors:
        raise errors[0]
    if not results:
        raise Expired
    return results[0]
