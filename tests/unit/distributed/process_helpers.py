"""Engines and trainers for child processes: importable, small, and as slow, wrong or dead as a test wants them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from april.config.limits import LimitsConfig
from april.core.clock import VirtualClock, WallClock
from april.core.errors import AprilError
from april.core.event import Event
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.random import stream_key
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.distributed.channel import Channel
from april.distributed.child import Failed, Launch
from april.distributed.remote_engine import RemoteEngine
from april.engines.scripted import Reply, ScriptedEngine

LIMITS = LimitsConfig(start_s=60, engine_silence_s=60, restart_pause_s=0)


def replies(sample: Sample, length: int = 40) -> Reply:
    return Reply(tuple(int(token) for token in np.arange(length) + 100 * sample.id.member))


def length_of(sample: Sample) -> int:
    return 12 + stream_key(0, sample.id) % 25


def samples_of(num_groups: int = 2, size: int = 2, max_new_tokens: int = 200) -> list[Sample]:
    prompts = [Prompt(f"p{index}", np.array([1, 2, 3], np.int32)) for index in range(num_groups)]
    spec = SamplingSpec(max_new_tokens=max_new_tokens)
    return [Sample(GroupId(g, 0, p.id).member(m), p, spec) for g, p in enumerate(prompts) for m in range(size)]


class Stepped(ScriptedEngine):
    """One token a sample in each poll, whatever the time; `pause_s` slows it down."""

    def __init__(
        self, length: int | Callable[[Sample], int] = length_of, *, pause_s: float = 0.0, max_running: int = 1_000_000
    ) -> None:
        self._virtual, self._pause_s = VirtualClock(), pause_s
        lengths = length if callable(length) else lambda _sample: length
        super().__init__(
            lambda sample: replies(sample, lengths(sample)), self._virtual, max_running=max_running, report_every_tokens=5
        )

    def ready_at(self) -> float | None:
        return None if super().ready_at() is None else 0.0

    def step(self) -> bool:
        """Whether to make a token now."""
        time.sleep(self._pause_s)
        return True

    def poll(self) -> list[Event]:
        if self._jobs and self.step():
            self._virtual.wait_until(self._next_tick_s)
        return super().poll()


class Troubled(Stepped):
    """Dies, stops or raises at its own token count; in the first process only (a file remembers), or always."""

    def __init__(self, mark: str, trouble: str, after_tokens: int, pause_s: float) -> None:
        super().__init__(40, pause_s=pause_s)
        self._mark, self._trouble, self._after = Path(mark), trouble, after_tokens

    def step(self) -> bool:
        due = self._trouble != "none" and self.load().generated_tokens >= self._after
        if due and (self._trouble.endswith("always") or not self._mark.exists()):
            self._mark.touch()
            time.sleep(0.05)  # for the writer: what was reported before is out
            if self._trouble.startswith("raise"):
                raise ValueError("out of luck")
            os.kill(os.getpid(), signal.SIGSTOP if self._trouble.startswith("stop") else signal.SIGKILL)
        return super().step()


def make_engine(mark: str, trouble: str, after_tokens: int, pause_s: float, clock: WallClock) -> ScriptedEngine:
    return Troubled(mark, trouble, after_tokens, pause_s)


def remote(tmp_path: Path, trouble: str = "none", *, after_tokens: int = 60, pause_s: float = 0.0, **limits: Any) -> RemoteEngine:
    """A scripted engine in a child process, not started."""
    make = partial(make_engine, str(tmp_path / "happened"), trouble, after_tokens, pause_s)
    return RemoteEngine(make, clock=WallClock(), limits=LIMITS.model_copy(update=limits))


def broken_engine(clock: WallClock) -> ScriptedEngine:
    raise ImportError("no such engine")


def drain(engine: RemoteEngine, until: Callable[[], bool]) -> list[Event]:
    """Events until a condition holds, waiting as the driver does."""
    clock, events, end_s = WallClock(), [], 60.0
    while not until():
        if clock.now() > end_s:
            raise TimeoutError(f"the engine did not get there; {engine.pending()}")
        clock.wait_until(clock.now() + 0.2, engine.waitables())
        events += engine.poll()
    return events


class Die(BaseException):
    """Ends a `ThreadChild` as a kill ends a process."""


class ThreadChild:
    """Stands for a `Child` where the process does not matter: the same main function in a thread."""

    def __init__(self, launch: Launch) -> None:
        ours, theirs = Channel.pair()
        self.channel, self.pid, self.alive = Channel(ours), 0, True
        self._other = Channel(theirs)
        self._thread = threading.Thread(target=self._live, args=(launch,), daemon=True)
        self._thread.start()

    def _live(self, launch: Launch) -> None:
        try:
            launch.main(self._other, *launch.arguments)
        except Die:
            self._other.flush(5.0)
            self._other.close()
        except AprilError as error:
            self._other.send(Failed(error, foreign=False))

    def kill(self, grace_s: float = 0.0) -> str:
        self._other.close()
        return "closed"

    def close(self) -> None:
        self.channel.close()
        self._thread.join(1.0)


def print_and_wait(channel: Channel, pids: str, sleep: bool) -> None:
    """A child that says who it is, and is then busy for ever, or waits for ever."""
    Path(pids).write_text(str(os.getpid()))
    channel.send(("pid", os.getpid(), {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY")}))
    while sleep:
        time.sleep(0.01)
    channel.wait(None)
