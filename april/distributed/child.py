"""A process that this one starts, speaks to, and ends.

    Child(launch) ---- spawn ----> main(channel, *arguments)
          channel <--- messages --->  channel

A child ends when its main function returns, when it is killed, or when its parent is gone: a thread waits for the parent's
end, and where the system has a death signal it is asked for. Ctrl-C and SIGTERM are left to the parent, which decides what
they mean.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import util
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

from april.core.errors import AprilError, ProcessError
from april.distributed.channel import Channel, Closed

_PR_SET_PDEATHSIG = 1
_FLUSH_S = 10.0
_KILL_S = 10.0
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_environment_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Launch:
    """What a child runs.

    Attributes:
        name: for messages: "trainer", "engine 0".
        main: called in the child with its channel and the arguments; importable, so that it can be sent by name.
        arguments: picklable.
        threads: CPU threads that numeric libraries may use in the child; two busy processes must not spin for one core.
    """

    name: str
    main: Callable[..., None]
    arguments: tuple[Any, ...] = ()
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Failed:
    """The last message of a child whose main function raised."""

    error: AprilError
    foreign: bool
    """Whether it was an error of another library, put into words; then another process may do better."""


class Child:
    """A running process; ended with this object at the latest."""

    def __init__(self, launch: Launch) -> None:
        self.name = launch.name
        ours, theirs = Channel.pair()
        context = multiprocessing.get_context("spawn")
        dies_with_thread = threading.current_thread() is threading.main_thread()
        self._process: SpawnProcess = context.Process(
            target=_life, args=(theirs, launch, os.getpid(), dies_with_thread), daemon=True, name=f"april-{launch.name}"
        )
        with _thread_limits(launch.threads):
            self._process.start()
        theirs.close()
        self.channel = Channel(ours)
        # before multiprocessing's own end, which would wait for a process that leaves SIGTERM to its parent
        self._finalizer = util.Finalize(self, _kill, (self._process,), exitpriority=10)

    @property
    def pid(self) -> int:
        """The process id."""
        return int(self._process.pid or 0)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.is_alive()

    def kill(self, grace_s: float = 0.0) -> str:
        """End the process; what it has sent can still be received. Returns how it ended.

        Args:
            grace_s: how long it may take to end by itself.
        """
        self._process.join(grace_s)
        _kill(self._process)
        code = self._process.exitcode
        return f"ended by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"

    def close(self) -> None:
        """End the process and drop the connection."""
        self._finalizer()
        self.channel.close()


def with_end(reason: str, ended: str) -> str:
    """Why a process is of no more use, and how it ended where that says more."""
    return reason if not ended or ("killed" in reason and "placed" not in ended) else f"{reason} ({ended})"


def deliver(
    child: Child | None,
    take: Callable[[Any], None],
    lost: Callable[[str, Failed | None], None],
    *,
    worked_before: bool = False,
) -> None:
    """Take what a child has sent, in order; never waits.

    Args:
        child: None when there is none at the moment.
        take: called with each message.
        lost: called with the reason, and the message where it sent one, when nothing more will come.
        worked_before: whether a process like it got further, so that another may do better whatever the error.

    Raises:
        AprilError: of the child, where another process would do no better.
    """
    if child is None:
        return
    try:
        messages = child.channel.receive()
    except Closed as closed:
        lost(str(closed), None)
        return
    for message in messages:
        if isinstance(message, Failed):
            error = message.error
            if not message.foreign and not worked_before:
                raise error
            lost(f"failed: {error.got}" if message.foreign else f"failed: {error.what} ({error.got})", message)
            return
        take(message)


def _kill(process: SpawnProcess) -> None:
    if process.is_alive():
        process.kill()
    process.join(_KILL_S)


def thread_variables(threads: int) -> dict[str, str]:
    """The environment in which numeric libraries take this many threads."""
    return {**dict.fromkeys(_THREAD_VARIABLES, str(threads)), "OMP_WAIT_POLICY": "PASSIVE"}


@contextmanager
def _thread_limits(threads: int) -> Iterator[None]:
    """The environment of a process that is started inside: libraries read it once, when they are loaded."""
    with _environment_lock:
        wanted = thread_variables(threads)
        former = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            yield
        finally:
            for name, value in former.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


def _life(end: socket.socket, launch: Launch, parent: int, dies_with_thread: bool) -> None:
    """Everything a child does."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _end_with_parent(parent, dies_with_thread)
    run_launch(Channel(end), launch)


def run_launch(channel: Any, launch: Launch) -> None:
    """Everything a child does, once it is there: the main function, and the error it ends with.

    Args:
        channel: to the controller; a `Channel`, or what stands for one.
        launch: what to run.
    """
    try:
        launch.main(channel, *launch.arguments)
    except AprilError as error:
        channel.send(Failed(error, foreign=False))
    except BaseException as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        told = ProcessError(
            f"the {launch.name} process failed",
            where=f"{where.filename}:{where.lineno} in {where.name}",
            got=f"{type(error).__name__}: {error}",
        )
        channel.send(Failed(told, foreign=True))
    channel.flush(_FLUSH_S)


def _end_with_parent(parent: int, dies_with_thread: bool) -> None:
    process = multiprocessing.parent_process()
    if process is not None:
        threading.Thread(target=_wait_for_end, args=(process.sentinel,), name="april-parent", daemon=True).start()
    if sys.platform == "linux" and dies_with_thread:
        # The signal comes with the end of the parent's thread, so only its main thread may be bound like this.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _wait_for_end(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
