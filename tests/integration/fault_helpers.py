"""Faults of the parts of a run: how each is brought about, and what must be said of it afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

from april.core.event import Event, Finished, Judged
from april.core.group import Failure
from april.run.loop import Run
from tests.integration.ray_helpers import num_held

ENGINES = ("embedded", "vllm")
FAULTS = ("kill_engine", "hang_engine", "kill_reward_worker", "kill_trainer", "kill_node", "drop_update", "corrupt_reply")
SCHEDULES = ("sync", "april", "bounded_async")
Case = tuple[str, str, str]
HURT_AT = 20
"""Finished samples before a part is hurt; 48 are trained in all."""
LONGEST_S = 900.0
"""A case ends by itself within this time: `limits.start_s` for a start and as much for a second one, and the run."""


def pairwise(columns: Sequence[Sequence[str]], limit: int) -> tuple[list[Case], int]:
    """Up to `limit` rows that cover the most pairs of values of two columns, and how many pairs are left; greedy, in order."""
    rows: list[Any] = list(product(*columns))
    left = {pair for row in rows for pair in _pairs(row)}
    chosen: list[Case] = []
    while left and len(chosen) < limit:
        best = max((row for row in rows if row not in chosen), key=lambda row: len(left & _pairs(row)))
        chosen.append(best)
        left -= _pairs(best)
    return chosen, len(left)


def _pairs(row: Sequence[str]) -> set[tuple[tuple[int, str], tuple[int, str]]]:
    return set(combinations(enumerate(row), 2))


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """The body ends in time, or with an error wherever it is.

    Raises:
        TimeoutError: it did not.
    """

    def ring(_number: int, _frame: Any) -> None:
        raise TimeoutError(f"still going on after {seconds:g} s")

    former = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, former)


@dataclass
class Hurt:
    """What has been done to a run, and what was said of it.

    Attributes:
        fault: one of `FAULTS`.
        done: what was hurt: a process, or the name of a message.
        reasons: of samples that got no reward.
        kill_node: for the fault of this name: the node's id, and what kills it.
    """

    fault: str
    done: list[object] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    kill_node: tuple[str, Callable[[Run], None]] | None = None

    def prepare(self, run: Run) -> None:
        """Before the run: faults that wait for a moment of their own."""
        if self.fault == "drop_update":
            _drop_first(run.parts.engine, self.done)
        elif self.fault == "kill_trainer":
            _kill_in_update(run.parts.trainer, self.done)

    def on_event(self, run: Run, event: Event, num_finished: int) -> None:
        """After each event of the run."""
        if isinstance(event, Judged) and isinstance(event.outcome, Failure):
            self.reasons.append(event.outcome.reason)
        if self.fault == "kill_reward_worker" and not self.done:  # from its first outcome on: before that it is being loaded
            self.done += _kill_busy_worker(run.parts.driver.rewards)
        if self.kill_node is not None and not self.done and num_held(run, self.kill_node[0]) > 2:
            self.done.append(self.kill_node[0])
            self.kill_node[1](run)
        if self.done or not isinstance(event, Finished) or num_finished < HURT_AT:
            return
        match self.fault:
            case "kill_engine" | "hang_engine":
                pid = run.parts.engine.pid  # type: ignore[attr-defined]
                os.kill(pid, signal.SIGKILL if self.fault == "kill_engine" else signal.SIGSTOP)
                self.done.append(pid)
            case "corrupt_reply":
                _damage_next(run.parts.engine, self.done)

    def told(self, run: Run) -> str:
        """Everything that the run's parts say of their losses."""
        engines = getattr(run.parts.engine, "engines", {"": run.parts.engine})
        parts: list[Any] = [*engines.values(), run.parts.trainer]
        return "; ".join([*(text for part in parts for text in getattr(part, "all_losses", ())), *self.reasons])


EXPECTED: Mapping[str, str] = {
    "kill_engine": "ended by SIGKILL",
    "hang_engine": "said nothing for",
    "kill_reward_worker": "the worker that judged it died with exit code -9",
    "kill_trainer": "rank 1 ended by SIGKILL",
    "kill_node": "its node died",
    "drop_update": "did not serve version 1",
    "corrupt_reply": "damaged message",
}
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "hang_engine": ("limits.engine_silence_s=10",),
    "kill_reward_worker": ("scoring.workers=1", "limits.on_reward_failure=retry"),
    "kill_trainer": ("training.ranks=2", "training.threads=1"),
    "drop_update": ("limits.publish_s=2",),
}


def _kill_busy_worker(rewards: Any) -> list[object]:
    """Stop the workers, so that they cannot answer any more, and kill the first that is given something to judge."""
    for worker in rewards._pool._workers:
        if not worker.ready:
            continue
        os.kill(worker.process.pid, signal.SIGSTOP)
        if worker.job is not None and not worker.connection.poll():
            os.kill(worker.process.pid, signal.SIGKILL)
            return [worker.process.pid]
    return []


def _kill_in_update(trainer: Any, done: list[object]) -> None:
    """A rank that does not speak to the controller."""
    submit: Callable[[Any], None] = trainer.submit

    def submit_and_kill(batch: Any) -> None:
        submit(batch)
        if batch.step == 1 and not done:
            done.append(trainer.pids[1])
            os.kill(trainer.pids[1], signal.SIGKILL)

    trainer.submit = submit_and_kill


def _drop_first(engine: Any, done: list[object]) -> None:
    """The first command to take new weights does not reach the engine."""
    send = engine._send

    def lossy(name: str, *arguments: Any) -> None:
        if name == "weights" and not done:
            done.append(arguments)
            return
        send(name, *arguments)

    engine._send = lossy


def _damage_next(engine: Any, done: list[object]) -> None:
    """One bit of the next message from the engine's process is another one."""
    channel = engine._child.channel
    read = channel._read

    def damaged() -> None:
        read()
        if len(channel._inbox) > 40 and not done:
            channel._inbox[40] ^= 1
            done.append(40)

    channel._read = damaged
