"""Calls that take no deadline, with one."""

from __future__ import annotations

import threading

import pytest

from april.core.errors import ProcessError
from april.distributed.bounded import bounded


def test_what_a_call_returns_and_raises_comes_through() -> None:
    assert bounded(lambda: 7, 60.0, "count") == 7
    with pytest.raises(TimeoutError, match="of its own"):
        bounded(lambda: (_ for _ in ()).throw(TimeoutError("of its own")), 60.0, "fail")


def test_a_call_that_does_not_come_back_is_left_behind_with_its_reason() -> None:
    answer, returned = threading.Event(), threading.Event()

    def call() -> None:
        answer.wait()
        returned.set()

    with pytest.raises(ProcessError, match=r"Ray does not answer\n.*backend\n.*nothing for 0.05 s, to find the board"):
        bounded(call, 0.05, "find the board")
    assert not returned.is_set()
    answer.set()
    assert returned.wait(60.0), "it goes on: what was asked for is done as soon as Ray answers"
