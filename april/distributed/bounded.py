"""Calls of a library that take no deadline, with one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from april.core.errors import ProcessError

Result = TypeVar("Result")


def bounded(call: Callable[[], Result], timeout_s: float, what: str) -> Result:
    """Make a call of Ray's, and wait for it no longer than this.

    A call that does not come back is left to its own thread, which does not keep the process from ending.

    Args:
        call: what to do; what it raises is raised here.
        timeout_s: longest wait.
        what: is done, for the error: "connect to the cluster".

    Raises:
        ProcessError: it did not come back in time.
    """
    outcome: Future[Result] = Future()
    threading.Thread(target=_settle, args=(outcome, call), name=f"april-ray: {what}", daemon=True).start()
    if not wait([outcome], timeout_s).done:
        raise ProcessError(
            "Ray does not answer",
            where="backend",
            got=f"nothing for {timeout_s:g} s, to {what}",
            hint="`ray status` tells whether the cluster's head can be reached; `april train --resume FOLDER` goes on with a run",
        )
    return outcome.result()


def _settle(outcome: Future[Result], call: Callable[[], Result]) -> None:
    try:
        outcome.set_result(call())
    except BaseException as error:
        outcome.set_exception(error)
