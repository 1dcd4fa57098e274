"""Faults of the parts of a run: how each is brought about, and what must be said of it afterwards."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

from april.core.event import Event, Finished, Judged
from april.core.group import Failure
from april.run.loop import Run

ENGINES = ("embedded", "vllm")
FAULTS = ("kill_engine", "hang_engine", "kill_reward_worker", "kill_trainer", "drop_update", "corrupt_reply")
SCHEDULES = ("sync", "april", "bounded_async")
Case = tuple[str, str, str]
HURT_AT = 20
"""Finished samples before a part is hurt; 48 are trained in all."""


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


@dataclass
class Hurt:
    """What has been done to a run, and what was said of it.

    Attributes:
        fault: one of `FAULTS`.
        done: what was hurt: a process, or the name of a message.
        reasons: of samples that got no reward.
    """

    fault: str
    done: list[object] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)

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
        parts: list[Any] = [run.parts.engine, run.parts.trainer]
        return "; ".join([*(text for part in parts for text in getattr(part, "all_losses", ())), *self.reasons])


EXPECTED: Mapping[str, str] = {
    "kill_engine": "ended by SIGKILL",
    "hang_engine": "said nothing for",
    "kill_reward_worker": "the worker that judged it died with exit code -9",
    "kill_trainer": "the trainer process",
    "drop_update": "did not serve version 1",
    "corrupt_reply": "damaged message",
}
OPTIONS: Mapping[str, tuple[str, ...]] = {
    "hang_engine": ("limits.engine_silence_s=10",),
    "kill_reward_worker": ("scoring.workers=1", "limits.on_reward_failure=retry"),
    "kill_trainer": ("training.process=child",),
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
    submit: Callable[[Any], None] = trainer.submit

    def submit_and_kill(batch: Any) -> None:
        submit(batch)
        if batch.step == 1 and not done:
            done.append(trainer.pid)
            os.kill(trainer.pid, signal.SIGKILL)

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
