"""An actor that stands where a child process would, and the connection to it.

    ActorChild  -- frames, in order -->  Host.put  -->  main(mailbox, *arguments)
                <-- socket <-- pump <--  Host.take <--

What comes is pumped into a socket, so whoever waits for connections waits for actors, too. Large messages lie in the object
store: one that goes to several actors is put there once, and each node gets it once.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from april.core.errors import ProcessError
from april.distributed.bounded import bounded
from april.distributed.channel import Channel, Packed, pack
from april.distributed.child import Launch, thread_variables
from april.distributed.ray_host import GROUPS, Host, Where, end_process

LARGE_BYTES = 100 * 1024
"""Messages above this are put into the object store; Ray does so by itself with arguments of that size."""
_NODE = "its node died"
_POLL_S = 10.0
_END_S = 1.0
_ANSWER_S = 60.0
_SETTLE_S = 5.0
_KILL_S = 10.0
"""Ray first waits for an actor that it is still registering, however long."""


class ActorChild:
    """See `april.distributed.child.Child`: the same main function, in an actor.

    Args:
        launch: what to run.
        options: of the actor: resources, placement.

    Raises:
        ProcessError: Ray does not take the request.
    """

    def __init__(self, launch: Launch, options: dict[str, Any]) -> None:
        self.name = launch.name
        environment = {"env_vars": thread_variables(launch.threads)}
        host = ray.remote(concurrency_groups=GROUPS)(Host).options(runtime_env=environment, **options)
        self._actor = bounded(host.remote, _ANSWER_S, f"make the actor of {launch.name}")
        self._where: Where | None = None
        self._killed, self._ended = False, ""
        self.lost_node = False
        ours, theirs = Channel.pair()
        self.channel = ActorChannel(ours, self._actor.put.remote, lambda: self._ended)
        begun = self._actor.begin.remote(pack(launch), os.getcwd(), list(sys.path))
        self._pump = threading.Thread(target=self._work, args=(begun, theirs), name=f"april-{launch.name}", daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        """The process id, on whatever node it is; 0 before it is known."""
        return 0 if self._where is None else self._where.pid

    @property
    def node(self) -> str:
        """The id of the node; empty before it is known."""
        return "" if self._where is None else self._where.node

    @property
    def ended(self) -> str:
        """How it ended; empty while nothing is known of that."""
        return self._ended

    @property
    def alive(self) -> bool:
        """Whether nothing is known of its end."""
        return self._pump.is_alive()

    def kill(self, grace_s: float = 0.0) -> str:
        """End the actor; what it has sent can still be received. Returns what is to be said besides what the channel said.

        Args:
            grace_s: how long it may take to end by itself.
        """
        self._pump.join(grace_s)
        waits = self._where is None and self._pump.is_alive()
        self._killed = True
        try:
            bounded(self._end, _KILL_S, f"end the actor of {self.name}")
        except ProcessError as error:  # it is ended as soon as Ray answers
            return f"Ray does not answer: {error.got}"
        self._pump.join(_END_S)
        return "Ray has not placed its actor: no node has room for it" if waits else ""

    def _end(self) -> None:
        ray.kill(self._actor, no_restart=True)
        if self._where is not None:
            _end_on_node(self._where)

    def close(self) -> None:
        """End the actor and drop the connection."""
        if not self._killed:
            with contextlib.suppress(RayError):
                self.kill()
        self.channel.close()

    def _work(self, begun: Any, theirs: socket.socket) -> None:
        """Pump what comes into the socket, until no more will."""
        done = False
        try:
            self._where = ray.get(begun)
            while not done:
                frames, done = ray.get(self._actor.take.remote(_POLL_S))
                theirs.sendall(frames)
            self._ended = "its main function returned"
        except RayError as error:
            final = settled(error, lambda: ray.get(self._actor.take.remote(0.0), timeout=_SETTLE_S))
            self._ended = "it was killed" if self._killed else reason_of(final)
            self.lost_node = self._ended.startswith(_NODE)
        except OSError:
            self._ended = "the connection was closed here"
        finally:
            theirs.close()


class ActorChannel(Channel):
    """The controller's end.

    Args:
        end: where the pump writes.
        put: sends one numbered frame to the actor.
        ended: why the pump has ended.
    """

    def __init__(self, end: socket.socket, put: Callable[[int, Any], Any], ended: Callable[[], str]) -> None:
        self._put, self._ended = put, ended
        super().__init__(end)

    def pack(self, message: Any) -> Packed:
        """A message that is put into the object store once, where it is large.

        Raises:
            ProcessError: the store does not take it.
        """
        frame = pack(message)
        if len(frame) <= LARGE_BYTES:
            return Packed(frame)
        return Packed(bounded(lambda: ray.put(np.frombuffer(frame, np.uint8)), _ANSWER_S, "store a message"))

    def _write(self) -> None:
        number = 0
        while (frame := self._outbox.get()) is not None:
            try:
                self._put(number, frame)
            except RayError:
                return  # the pump says so
            number += 1

    def _read(self) -> None:
        super()._read()
        if self._end is not None and self._ended():
            self._end = self._ended()


def settled(error: RayError, ask: Callable[[], Any], *, wait_s: float = _SETTLE_S, pause_s: float = 0.2) -> RayError:
    """The last word on an actor: one that cannot be reached is soon said to be dead, and of what.

    Args:
        error: the first word.
        ask: calls the actor again; what it says is not looked at, since a part of what it said before may be lost.
        wait_s: longest wait.
        pause_s: between two calls.
    """
    until_s = time.monotonic() + wait_s
    while isinstance(error, ActorUnavailableError) and time.monotonic() < until_s:
        time.sleep(pause_s)
        try:
            ask()
        except GetTimeoutError:
            break
        except RayError as again:
            error = again
        else:
            break
    return error


def reason_of(error: Exception) -> str:
    """Why an actor is gone, in a few words."""
    text = str(error)
    if not isinstance(error, RayActorError):
        return f"its actor failed ({type(error).__name__}: {_first_line(text)})"
    if "node has died" in text or "node was terminated" in text or "node is dead" in text:
        address = re.search(r"ip: (\S+)", text)
        return _NODE + (f" ({address[1]})" if address else "")
    if "creation task" in text:
        return f"its actor could not be made ({_first_line(text.strip().splitlines()[-1])})"
    detail = re.search(r"Worker exit detail: (.*?)(?:\. |$)", text, re.MULTILINE)
    if detail:
        return f"its process died ({detail[1]})"
    cause = re.search(r"The actor is dead because (.*?)(?:\. |\.?$)", text, re.MULTILINE)
    return f"its actor died ({cause[1] if cause else _first_line(text)})"


def _first_line(text: str) -> str:
    return next(iter(text.strip().splitlines()), "")[:200]


def _end_on_node(where: Where) -> None:
    """Kill the process, from here where it is on our node; a stopped one does not hear `ray.kill`."""
    if where.node == ray.get_runtime_context().get_node_id():
        end_process(where.pid)
        return
    with contextlib.suppress(RayError, ValueError):
        there = NodeAffinitySchedulingStrategy(where.node, soft=False)
        ray.remote(end_process).options(num_cpus=0, scheduling_strategy=there, max_retries=0).remote(where.pid)
