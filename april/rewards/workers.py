"""Judgement in child processes, which can be killed."""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from april.core.errors import RecipeError, ResourceError
from april.core.group import Failure, Outcome
from april.core.ids import SampleId
from april.core.sample import Sample
from april.rewards.base import Verifier
from april.rewards.judge import described, judge

GRACE_S = 1.0
"""A worker first interrupts its verifier by itself, which keeps it alive; this much later it is killed."""
START_S = 120.0
"""How long a worker may take to import its verifier."""


class _Lost(Exception):
    """A worker is of no more use; the message is the reason for its sample."""


@dataclass(slots=True)
class _Worker:
    process: SpawnProcess
    connection: Connection
    deadline_s: float | None
    ready: bool = False
    job: SampleId | None = None


class WorkerPool:
    """Up to `num_workers` processes that judge one sample at a time each.

    Args:
        verifier: sent to each process.
        num_workers: processes, started when the first sample comes.
        timeout_s: how long one judgement may take; None for ever.

    Raises:
        RecipeError: when the verifier cannot be pickled.
    """

    def __init__(self, verifier: Verifier, num_workers: int, timeout_s: float | None) -> None:
        try:
            self._payload = pickle.dumps(verifier)
        except Exception as error:  # pickle raises errors of many kinds
            raise RecipeError(
                "a reward cannot be sent to worker processes",
                where="reward.workers",
                got=described(error),
                expected='a reward with an import path, such as "rewards.py:score"',
                hint="give the import path, or set reward.workers = 0",
            ) from error
        self._num_workers, self._timeout_s = num_workers, timeout_s
        self._workers: list[_Worker] = []
        self._queue: deque[tuple[Sample, str]] = deque()

    def submit(self, sample: Sample, text: str) -> None:
        """Judge this sample as soon as a worker is free."""
        self._queue.append((sample, text))
        if len(self._workers) < self._num_workers:
            self._workers.append(self._start())
        self._dispatch()

    def wait_s(self) -> float | None:
        """Seconds until `poll` is worth calling if nothing can be read from `connections` before; None when for ever."""
        if any(worker.connection.poll() for worker in self._workers):
            return 0.0
        deadlines = [worker.deadline_s for worker in self._workers if worker.deadline_s is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    @property
    def connections(self) -> list[Connection]:
        """To all workers."""
        return [worker.connection for worker in self._workers]

    def poll(self) -> list[tuple[SampleId, Outcome]]:
        """Outcomes that are there, and failures of workers that died or passed the deadline.

        Raises:
            RecipeError: when a worker cannot import the verifier.
            ResourceError: when a worker does not start.
        """
        outcomes: list[tuple[SampleId, Outcome]] = []
        for index, worker in enumerate(self._workers):
            job = worker.job
            try:
                outcome = self._received(worker)
            except _Lost as lost:
                outcome = Failure(str(lost))
                _stop(worker)
                self._workers[index] = self._start()
            if outcome is not None and job is not None:
                worker.job, worker.deadline_s = None, None
                outcomes.append((job, outcome))
        self._dispatch()
        return outcomes

    def close(self) -> None:
        """Kill the processes; what they were judging is forgotten."""
        for worker in self._workers:
            _stop(worker)
        self._workers.clear()
        self._queue.clear()

    def _start(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs, self._payload, self._timeout_s), daemon=True, name="april-reward")
        process.start()
        theirs.close()
        return _Worker(process, ours, time.monotonic() + START_S)

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
        """
        try:
            if not worker.connection.poll():
                self._check_deadline(worker)
                return None
            message = worker.connection.recv()
        except (EOFError, ConnectionError):
            worker.process.join(1.0)
            code = worker.process.exitcode
            if not worker.ready:
                hint = 'in a script, start the run below `if __name__ == "__main__":`; or set reward.workers = 0'
                raise ResourceError(
                    "a reward worker did not start", where="reward.workers", got=f"exit code {code}", hint=hint
                ) from None
            raise _Lost(f"the worker that judged it died with exit code {code}") from None
        if worker.ready:
            return message if isinstance(message, Outcome) else Failure("the worker that judged it sent no outcome")
        if message is not None:
            raise RecipeError("a reward worker cannot load the reward", where="reward", got=message)
        worker.ready, worker.deadline_s = True, None
        return None

    def _check_deadline(self, worker: _Worker) -> None:
        if worker.deadline_s is None or time.monotonic() < worker.deadline_s:
            return
        if not worker.ready:
            raise ResourceError("a reward worker did not start", where="reward.workers", got=f"nothing for {START_S:g} s")
        raise _Lost(f"timed out after {self._timeout_s:g} s, and its worker was killed")


def _stop(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.connection.close()


def serve(connection: Connection, payload: bytes, timeout_s: float | None) -> None:
    """The life of a worker: load the verifier, then judge until the parent goes away."""
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
