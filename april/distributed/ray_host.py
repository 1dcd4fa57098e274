"""The actor that a part of a run lives in. Its other end is `april.distributed.ray_child`.

    put  (frames, numbered) --> inbox  --> the part's main function, in a thread
    take (long poll)        <-- outbox <--

An actor is killed, never ended politely: what it computes is of no use without the run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import ray

from april.core.clock import readable
from april.distributed.channel import Closed, pack, unpack
from april.distributed.child import Launch, run_launch

GROUPS = {"incoming": 1, "outgoing": 1, "weights": 1}
"""Methods of an actor that run beside each other, in threads of their own."""


class Where(NamedTuple):
    """Where an actor runs."""

    pid: int
    node: str
    address: str


class Mailbox:
    """The part's end of its connection; see `april.distributed.channel.Channel`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inbox: list[Any] = []
        self._early: dict[int, bytes] = {}
        self._next = 0
        self._broken: str | None = None
        self._outbox: list[bytes] = []
        self._done = False
        self._ours, self._theirs = socket.socketpair()
        for end in (self._ours, self._theirs):
            end.setblocking(False)

    # -- of the part ------------------------------------------------------------------------------------------------

    def send(self, message: Any) -> None:
        """Hand over a message; returns at once."""
        frame = pack(message)
        with self._changed:
            self._outbox.append(frame)
            self._changed.notify_all()

    def receive(self) -> list[Any]:
        """Messages that have come, in order; never waits.

        Raises:
            Closed: one of them cannot be understood.
        """
        with self._changed:
            messages, self._inbox = self._inbox, []
            with contextlib.suppress(BlockingIOError):
                self._ours.recv(1 << 12)
        if not messages and self._broken is not None:
            raise Closed(self._broken)
        return messages

    def wait(self, timeout_s: float | None, others: Sequence[Any] = ()) -> bool:
        """Whether something can be received, or read from one of the others, within this time."""
        return self._broken is not None or readable([self._ours, *others], timeout_s)

    def fileno(self) -> int:
        """For `multiprocessing.connection.wait`."""
        return self._ours.fileno()

    def flush(self, timeout_s: float) -> None:
        """Wait until everything was taken; nothing can be sent afterwards."""
        with self._changed:
            self._done = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._outbox, timeout_s)

    # -- of the controller ------------------------------------------------------------------------------------------

    def put(self, number: int, frame: bytes) -> None:
        """A frame, which is number 0, 1, ... of all; those that overtake others wait for them."""
        with self._changed:
            self._early[number] = frame
            while self._next in self._early:
                try:
                    self._inbox.append(unpack(self._early.pop(self._next)))
                except Exception as error:  # pickle raises errors of many kinds
                    self._broken = f"it sent a damaged message ({error})"
                self._next += 1
            if self._inbox or self._broken is not None:
                with contextlib.suppress(BlockingIOError):
                    self._theirs.send(b"1")

    def take(self, timeout_s: float) -> tuple[bytes, bool]:
        """Frames that wait, after at most this time, and whether no more will come."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._outbox) or self._done, timeout_s)
            frames, self._outbox = self._outbox, []
            self._changed.notify_all()
            return b"".join(frames), self._done


class Host:
    """See the module."""

    def __init__(self) -> None:
        self._mailbox = Mailbox()

    def begin(self, payload: bytes, folder: str, paths: list[str]) -> Where:
        """Start the part: a pickled `Launch`, the controller's working directory and where it imports from."""
        for path in paths:
            if path not in sys.path:
                sys.path.append(path)
        if os.path.isdir(folder):
            os.chdir(folder)
        launch: Launch = unpack(payload)
        threading.Thread(target=run_launch, args=(self._mailbox, launch), name=f"april-{launch.name}", daemon=True).start()
        return Where(os.getpid(), ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address())

    @ray.method(concurrency_group="incoming")
    def put(self, number: int, frame: bytes | npt.NDArray[np.uint8]) -> None:
        """See `Mailbox.put`."""
        self._mailbox.put(number, bytes(frame))

    @ray.method(concurrency_group="outgoing")
    def take(self, timeout_s: float) -> tuple[bytes, bool]:
        """See `Mailbox.take`."""
        return self._mailbox.take(timeout_s)

    @ray.method(concurrency_group="weights")
    def collect(self, key: str) -> npt.NDArray[np.uint8]:
        """Weights that the part has written, into the object store."""
        from april.distributed.ray_weights import take_from_shelf

        return take_from_shelf(key)


def end_process(pid: int) -> None:
    """Kill an actor's process; one that is stopped does not hear Ray."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if b"ray::" not in file.read():
                return  # the number belongs to another process by now
    except OSError:
        return
    with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
        os.kill(pid, signal.SIGKILL)
