"""Reward workers in actors: what stands for their process and their connection in `april.rewards.workers`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from april.distributed.channel import Closed
from april.distributed.child import Launch
from april.rewards.workers import StartWorker, serve


def start_in_actors(spawns: Sequence[Callable[[Launch], Any]]) -> StartWorker:
    """What starts worker number i with the i-th of these."""

    def start(index: int, payload: bytes, timeout_s: float | None) -> tuple[WorkerActor, Messages]:
        child = spawns[index](Launch(f"reward {index}", serve_reward, (payload, timeout_s)))
        return WorkerActor(child), Messages(child.channel)

    return start


def serve_reward(channel: Any, payload: bytes, timeout_s: float | None) -> None:
    """The life of a worker in an actor."""
    serve(Messages(channel), payload, timeout_s)


class WorkerActor:
    """Stands for the process of a worker."""

    def __init__(self, child: Any) -> None:
        self._child = child

    @property
    def pid(self) -> int:
        """Of the actor, on whatever node."""
        return int(self._child.pid)

    @property
    def exitcode(self) -> str:
        """How it ended; Ray does not know the number."""
        return self._child.ended or "unknown"

    def kill(self) -> None:
        """End it."""
        self._child.close()

    def join(self, timeout_s: float | None = None) -> None:
        """Nothing: Ray has told of its end already."""


class Messages:
    """One message at a time, as a `multiprocessing` connection has it."""

    def __init__(self, channel: Any) -> None:
        self._channel, self._came = channel, deque[Any]()

    def poll(self) -> bool:
        """Whether there is a message, or nothing more will come."""
        try:
            self._came.extend(self._channel.receive())
        except Closed:
            return True
        return bool(self._came)

    def recv(self) -> Any:
        """The next message; waits for it.

        Raises:
            EOFError: nothing more will come.
        """
        while not self._came:
            self._channel.wait(None)
            try:
                self._came.extend(self._channel.receive())
            except Closed as closed:
                raise EOFError(str(closed)) from None
        return self._came.popleft()

    def send(self, message: Any) -> None:
        """Hand over a message."""
        self._channel.send(message)

    def fileno(self) -> int:
        """For `multiprocessing.connection.wait`."""
        return int(self._channel.fileno())

    def close(self) -> None:
        """Nothing: the connection goes with the actor."""
