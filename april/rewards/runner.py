"""Rewards as a source of events: finished samples in, outcomes out.

    pool -- submit(sample) --> RewardRunner -- poll() --> Judged(sample id, Reward | Failure)

In process (the default) samples are judged in the order of submission, a bounded number in each poll, so a run is
deterministic. With `workers` they are judged by child processes, which are killed when they pass the deadline, and
outcomes come in whatever order they are ready.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from april.config.limits import LimitsConfig
from april.core.clock import Clock
from april.core.errors import LedgerError
from april.core.event import Event, Judged, Wait
from april.core.ids import SampleId
from april.core.sample import Sample
from april.rewards.base import Verifier
from april.rewards.judge import Decode, judge
from april.rewards.workers import StartWorker, WorkerPool


class RewardRunner:
    """Judges every submitted sample exactly once.

    Args:
        verifier: the reward.
        decode: token ids to text.
        clock: stamps the events.
        timeout_s: how long one judgement may take before it costs its sample; None for ever.
        workers: child processes; 0 judges in this one. The verifier must then be picklable (import-path rewards are).
        max_per_poll: samples judged in one poll when in process.
        start_worker: starts a worker elsewhere than in a child process.
        limits: how long a worker may take to start, and how often it may be started again.

    Raises:
        RecipeError: for `workers` with a verifier that cannot be sent to another process.
    """

    name = "reward"

    def __init__(
        self,
        verifier: Verifier,
        decode: Decode,
        clock: Clock,
        timeout_s: float | None = 5.0,
        workers: int = 0,
        max_per_poll: int = 32,
        start_worker: StartWorker | None = None,
        limits: LimitsConfig | None = None,
    ) -> None:
        self._verifier, self._decode, self._clock = verifier, decode, clock
        self._timeout_s, self._max_per_poll = timeout_s, max_per_poll
        self._queue: deque[Sample] = deque()
        self._open: dict[SampleId, float] = {}
        self._pool = WorkerPool(verifier, workers, timeout_s, start_worker, limits) if workers else None

    def submit(self, sample: Sample) -> None:
        """Judge this sample.

        Raises:
            LedgerError: when it is not finished, or is already being judged.
        """
        if sample.stop is None or sample.id in self._open:
            got = "unfinished" if sample.stop is None else "submitted twice"
            raise LedgerError("a sample cannot be judged", where=str(sample.id), got=got, expected="a finished sample, once")
        self._open[sample.id] = self._clock.now()
        if self._pool is not None:
            self._pool.submit(sample, self._decode(sample.token_ids))
        else:
            self._queue.append(sample)

    def ready_at(self) -> float | None:
        """Now, while samples wait for an in-process judgement or an outcome is there; else when a worker will be late."""
        if not self._open:
            return None
        wait_s = 0.0 if self._pool is None else self._pool.wait_s()
        return float("inf") if wait_s is None else self._clock.now() + wait_s

    def waitables(self) -> Sequence[Any]:
        """Connections to the workers, while any of them has something to judge."""
        return () if self._pool is None or not self._open else self._pool.connections

    def poll(self) -> list[Event]:
        """Outcomes; in process, of the next samples in the order of submission."""
        if self._pool is not None:
            outcomes = self._pool.poll()
        else:
            samples = [self._queue[i] for i in range(min(self._max_per_poll, len(self._queue)))]
            outcomes = []
            for sample in samples:  # a sample leaves the queue with its outcome, so an interrupt loses none
                outcomes.append((sample.id, judge(self._verifier, self._decode(sample.token_ids), sample, self._timeout_s)))
            for _ in samples:
                self._queue.popleft()
        for id, _ in outcomes:
            self._open.pop(id, None)
        return [Judged(self._clock.now(), id, outcome) for id, outcome in outcomes]

    def pending(self) -> list[str]:
        """The samples that wait for an outcome."""
        return [f"reward of {id}" for id in sorted(self._open)]

    def waits(self) -> list[Wait]:
        """The same, with the time at which the first judgement is given up."""
        if not self._open:
            return []
        wait_s = None if self._pool is None else self._pool.wait_s()
        deadline_s = None if wait_s is None else self._clock.now() + wait_s
        return [Wait(self.name, "score", tuple(map(str, self._open)), min(self._open.values()), deadline_s)]

    def close(self) -> None:
        """End the child processes."""
        if self._pool is not None:
            self._pool.close()
