"""Child processes: threads on purpose, no orphans, and a bounded number of restarts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from process_helpers import print_and_wait

from april.core.clock import WallClock, readable
from april.core.errors import ProcessError
from april.core.restarts import Restarts
from april.distributed.channel import Closed
from april.distributed.child import Child, Launch

HERE = Path(__file__).parent
PARENT = """
import sys, time
sys.path[:0] = [{here!r}]
from process_helpers import print_and_wait
from april.distributed.child import Child, Launch
if __name__ == "__main__":
    child = Child(Launch("test", print_and_wait, (sys.argv[1], sys.argv[2] == "busy")))
    child.channel.wait(60)
    print("up", flush=True)
    time.sleep(600)
"""


def ended(pid: int, within_s: float) -> bool:
    """Whether a process that is not ours is gone, or will be soon."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return readable([_File(fd)], within_s)
    finally:
        os.close(fd)


class _File:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        return self._fd


@pytest.mark.parametrize("state", ["busy", "idle"])
def test_a_child_does_not_outlive_a_killed_parent(tmp_path: Path, state: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(here=str(HERE)))
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path / "pid"), state], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline() == "up\n"
    pid = int((tmp_path / "pid").read_text())
    assert not ended(pid, 0), "it must live as long as its parent does, or this shows nothing"
    parent.kill()
    parent.wait()
    assert ended(pid, 10.0)


def test_a_child_has_the_threads_it_is_given_and_leaves_signals_to_its_parent(tmp_path: Path) -> None:
    before = os.environ.get("OMP_WAIT_POLICY")
    child = Child(Launch("test", print_and_wait, (str(tmp_path / "pid"), True), threads=3))
    assert child.channel.wait(60.0)
    _, pid, environment = child.channel.receive()[0]
    assert pid == child.pid and child.alive
    assert environment == {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "PASSIVE"}
    assert os.environ.get("OMP_WAIT_POLICY") == before
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGINT)
    assert not ended(pid, 0.05)
    assert child.kill() == "ended by SIGKILL" and not child.alive
    with pytest.raises(Closed):
        while child.channel.wait(5.0):
            child.channel.receive()
    child.close()


def test_restarts_are_bounded_and_each_waits_longer() -> None:
    restarts = Restarts("engine", limit=3, pause_s=1.0, window_s=100.0)
    assert [restarts.next_s(now, f"loss {now}") for now in (10.0, 20.0, 30.0)] == [11.0, 22.0, 34.0]
    assert restarts.next_s(121.0, "later") == 123.0, "two of them are out of the window"
    with pytest.raises(ProcessError, match="lost 4 times") as caught:
        for now in (122.0, 123.0):
            restarts.next_s(now, "once more")
    assert str(caught.value.got).count("once more") == 2
    assert restarts.total == 5


def test_processes_that_share_an_origin_share_a_clock() -> None:
    one = WallClock()
    assert abs(WallClock(one.origin_s).now() - one.now()) < 0.5
    assert WallClock(one.origin_s - 1000.0).now() - one.now() > 999.0
