"""Judgement in child processes, which can be killed."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from april.config.limits import LimitsConfig
from april.core.errors import RecipeError, ResourceError
from april.core.group import Failure, Outcome
from april.core.ids import SampleId
from april.core.restarts import Restarts
from april.core.sample import Sample
from april.rewards.base import Verifier
from april.rewards.judge import described, judge

GRACE_S = 1.0
"""A worker first interrupts its verifier by itself, which keeps it alive; this much later it is killed."""


class _Lost(Exception):
    """A worker is of no more use; the message is the reason for its sample."""


StartWorker = Callable[[int, bytes, float | None], tuple[Any, Any]]
"""Starts worker number i with the pickled verifier and the time of one judgement; returns its process and the connection to it:
`multiprocessing`'s, or what stands for them."""


@dataclass(slots=True)
class _Worker:
    """A place for a process; without one (and without a connection) while it waits to be started again."""

    index: int
    restarts: Restarts
    process: Any = None
    connection: Any = None
    deadline_s: float | None = None
    ready: bool = False
    job: SampleId | None = None


class WorkerPool:
    """Up to `num_workers` processes that judge one sample at a time each.

    Args:
        verifier: sent to each process.
        num_workers: processes, started when the first sample comes.
        timeout_s: how long one judgement may take; None for ever.
        start: starts a worker; a process of this machine by default.
        limits: how long a worker may take to start, and how often it may be started again.

    Raises:
        RecipeError: when the verifier cannot be pickled.
    """

    def __init__(
        self,
        verifier: Verifier,
        num_workers: int,
        timeout_s: float | None,
        start: StartWorker | None = None,
        limits: LimitsConfig | None = None,
    ) -> None:
        try:
            self._payload = pickle.dumps(verifier)
        except Exception as error:  # pickle raises errors of many kinds
            raise RecipeError(
                "a reward cannot be sent to worker processes",
                where="scoring.workers",
                got=described(error),
                expected='a reward with an import path, such as "rewards.py:score"',
                hint="give the import path, or set scoring.workers = 0",
            ) from error
        self._num_workers, self._timeout_s, self._start_worker = num_workers, timeout_s, start or start_process
        self._limits, self._any_was_ready = limits or LimitsConfig(), False
        self._workers: list[_Worker] = []
        self._queue: deque[tuple[Sample, str]] = deque()

    def submit(self, sample: Sample, text: str) -> None:
        """Judge this sample as soon as a worker is free."""
        self._queue.append((sample, text))
        if len(self._workers) < self._num_workers:
            self._workers.append(self._new(len(self._workers)))
        self._dispatch()

    def wait_s(self) -> float | None:
        """Seconds until `poll` is worth calling if nothing can be read from `connections` before; None when for ever."""
        if any(connection.poll() for connection in self.connections):
            return 0.0
        deadlines = [worker.deadline_s for worker in self._workers if worker.deadline_s is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    @property
    def connections(self) -> list[Any]:
        """To all workers that run."""
        return [worker.connection for worker in self._workers if worker.connection is not None]

    def poll(self) -> list[tuple[SampleId, Outcome]]:
        """Outcomes that are there, and failures of workers that died or passed the deadline.

        Raises:
            RecipeError: when a worker cannot import the verifier.
            ResourceError: when the first worker does not start.
            ProcessError: when a worker was lost too often without a sample.
        """
        outcomes: list[tuple[SampleId, Outcome]] = []
        for worker in self._workers:
            if worker.connection is None:
                self._start_if_due(worker)
                continue
            job = worker.job
            try:
                outcome = self._received(worker)
            except _Lost as lost:
                outcome = Failure(str(lost))
                self._replace(worker, str(lost))
            if outcome is not None and job is not None:
                outcomes.append((job, outcome))
        self._dispatch()
        return outcomes

    def close(self) -> None:
        """Kill the processes; what they were judging is forgotten."""
        for worker in self._workers:
            _stop(worker)
        self._workers.clear()
        self._queue.clear()

    def _new(self, index: int) -> _Worker:
        limits = self._limits
        name = f"reward worker {index}"
        worker = _Worker(index, Restarts(name, limits.restarts, limits.restart_pause_s, limits.restart_window_s))
        self._start(worker)
        return worker

    def _start(self, worker: _Worker) -> None:
        worker.process, worker.connection = self._start_worker(worker.index, self._payload, self._timeout_s)
        worker.deadline_s = time.monotonic() + self._limits.start_s

    def _start_if_due(self, worker: _Worker) -> None:
        if worker.deadline_s is not None and time.monotonic() >= worker.deadline_s:
            self._start(worker)

    def _replace(self, worker: _Worker, reason: str) -> None:
        """Start another process: at once where a sample may be to blame, which pays for it; else after a pause."""
        _stop(worker)
        blamed, worker.ready, worker.job = worker.job is not None, False, None
        if blamed:
            self._start(worker)
        else:
            worker.deadline_s = worker.restarts.next_s(time.monotonic(), reason)

    def _dispatch(self) -> None:
        for worker in self._workers:
            if worker.ready and worker.job is None and self._queue:
                sample, text = self._queue.popleft()
                worker.job = sample.id
                worker.deadline_s = None if self._timeout_s is None else time.monotonic() + self._timeout_s + GRACE_S
                try:
                    worker.connection.send((text, sample))
                except ConnectionError:  # it died while idle: the next poll starts another
                    self._queue.appendleft((sample, text))
                    worker.job, worker.deadline_s = None, None

    def _received(self, worker: _Worker) -> Outcome | None:
        """What a worker has sent, if anything.

        Raises:
            _Lost: when it died or is late.
            RecipeError, ResourceError: as `poll` says.
        """
        try:
            if not worker.connection.poll():
                self._check_deadline(worker)
                return None
            message = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join(1.0)
            code = worker.process.exitcode
            ended = code if isinstance(code, str) else f"exit code {code}"
            if not worker.ready:
                raise self._not_started(f"it died with {ended} before it was ready") from None
            raise _Lost(f"{'it' if worker.job is None else 'the worker that judged it'} died with {ended}") from None
        if worker.ready:
            worker.job, worker.deadline_s = None, None
            return message if isinstance(message, Outcome) else Failure("the worker that judged it sent no outcome")
        if message is not None:
            raise RecipeError("a reward worker cannot load the reward", where="reward", got=message)
        worker.ready, worker.deadline_s, self._any_was_ready = True, None, True
        return None

    def _not_started(self, got: str) -> Exception:
        """What it means that a worker is not there: the first one cannot be, another may be the next time."""
        if self._any_was_ready:
            return _Lost(got)
        hint = 'in a script, start the run below `if __name__ == "__main__":`; or set scoring.workers = 0'
        return ResourceError("a reward worker did not start", where="scoring.workers", got=got, hint=hint)

    def _check_deadline(self, worker: _Worker) -> None:
        if worker.deadline_s is None or time.monotonic() < worker.deadline_s:
            return
        if not worker.ready:
            raise self._not_started(f"it was not ready within {self._limits.start_s:g} s")
        raise _Lost(f"timed out after {self._timeout_s:g} s, and its worker was killed")


def start_process(index: int, payload: bytes, timeout_s: float | None) -> tuple[Any, Any]:
    """A worker in a process of this machine; see `StartWorker`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, payload, timeout_s), daemon=True, name=f"april-reward-{index}")
    process.start()
    theirs.close()
    return process, ours


def _stop(worker: _Worker) -> None:
    if worker.connection is not None:
        worker.process.kill()
        worker.process.join()
        worker.connection.close()
        worker.process = worker.connection = None


def serve(connection: Any, payload: bytes, timeout_s: float | None) -> None:
    """The life of a worker: load the verifier, then judge until the parent goes away."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    try:
        verifier: Verifier = pickle.loads(payload)
    except BaseException as error:
        connection.send(described(error))
        return
    connection.send(None)
    while True:
        try:
            text, sample = connection.recv()
        except (EOFError, OSError):
            return
        connection.send(judge(verifier, text, sample, timeout_s))
