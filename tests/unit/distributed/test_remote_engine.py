"""An engine in another process: the same contract; and when that process dies, hangs or lies, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from process_helpers import LIMITS, Stepped, ThreadChild, broken_engine, drain, remote, replies, samples_of
from rollout_helpers import make_prompts

from april.core.clock import WallClock
from april.core.errors import EngineError, ProcessError, ResourceError
from april.core.event import Broken, Event, Finished, Parked, Progressed
from april.core.group import Reward
from april.core.ids import GroupId
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.distributed import remote_engine
from april.distributed.engine_process import Reply, Report
from april.distributed.remote_engine import RemoteEngine
from april.engines.base import Engine
from april.run.evaluate import evaluate
from april.testing.engine_contract import EngineContract


class Ticketed(Stepped):
    """Makes one token a sample for each ticket it is given: it goes on between two polls, but not far."""

    def __init__(self, tickets: queue.Queue[int], max_running: int) -> None:
        super().__init__(max_running=max_running)
        self._tickets = tickets

    def step(self) -> bool:
        with contextlib.suppress(queue.Empty):
            self._tickets.get(timeout=0.001)
            return True
        return False


class TestRemoteContract(EngineContract):
    """All lines of the contract, with messages between; a thread serves them, so that no process has to start for each."""

    children_differ = False
    runs_ahead = True

    @pytest.fixture(autouse=True)
    def _in_a_thread(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(remote_engine, "Child", ThreadChild)

    def make(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[Engine, list[Sample]]:
        self.tickets: queue.Queue[int] = queue.Queue()
        engine = RemoteEngine(lambda _clock: Ticketed(self.tickets, max_running or 100), clock=WallClock(), limits=LIMITS)
        engine.tickets = self.tickets  # type: ignore[attr-defined]
        spec = SamplingSpec(max_new_tokens=30)
        samples = [
            Sample(GroupId(serial, 0, prompt.id).member(member), prompt, spec)
            for serial, prompt in enumerate(make_prompts(3))
            for member in range(2)
        ]
        return engine, samples

    def advance(self, engine: Engine) -> None:
        tickets = engine.tickets  # type: ignore[attr-defined]
        if engine.ready_at() is not None and tickets.empty():
            tickets.put(1)
        WallClock().wait_until(0.002, engine.waitables())  # type: ignore[attr-defined]


def tokens_of(samples: list[Sample], events: list[Event]) -> dict[str, list[int]]:
    out: dict[str, list[int]] = {str(sample.id): [] for sample in samples}
    for event in events:
        if isinstance(event, Progressed | Parked | Finished) and event.segment is not None:
            out[str(event.id)] += event.segment.token_ids.tolist()
    return out


def whole(sample: Sample) -> list[int]:
    return list(replies(sample).token_ids)


@pytest.mark.parametrize("trouble", ["kill", "stop", "raise"])
def test_a_lost_process_gives_its_samples_back_with_what_it_reported(tmp_path: Path, trouble: str) -> None:
    engine, samples = remote(tmp_path, trouble, engine_silence_s=0.5), samples_of()
    engine.update_weights({}, 3)
    engine.submit(samples)
    events = drain(engine, lambda: not engine._open)
    broken = [event for event in events if isinstance(event, Broken)]
    assert sorted(event.id for event in broken) == sorted(sample.id for sample in samples)
    why = {"kill": "ended by SIGKILL", "stop": "was killed: it said nothing for", "raise": "ValueError: out of luck"}[trouble]
    assert all(why in event.reason and "engine process" in event.reason for event in broken)
    reported = tokens_of(samples, events)
    assert all(whole(sample)[: len(reported[str(sample.id)])] == reported[str(sample.id)] for sample in samples)
    assert sum(map(len, reported.values())) >= 4 * 10, "what came before the loss is kept"
    before = engine.load().generated_tokens

    again = [_continued(sample, events) for sample in samples]
    engine.submit(again)
    more = drain(engine, lambda: not engine._open)
    rest = tokens_of(samples, more)
    assert all(reported[str(sample.id)] + rest[str(sample.id)] == whole(sample) for sample in samples)
    versions = {event.segment.version for event in more if isinstance(event, Finished | Progressed) and event.segment}
    assert versions == {3}, "the new process serves the weights that were published last"
    assert engine.num_restarts == 1 and engine.load().generated_tokens > before
    engine.close()


def _continued(sample: Sample, events: list[Event]) -> Sample:
    for event in events:
        if isinstance(event, Progressed) and event.id == sample.id:
            sample = sample.extended(event.segment)
    return sample


def test_with_retry_the_next_process_goes_on_and_nobody_notices(tmp_path: Path) -> None:
    engine, samples = remote(tmp_path, "kill", on_engine_loss="retry"), samples_of()
    engine.submit(samples)
    events = drain(engine, lambda: not engine._open)
    assert {type(event) for event in events} <= {Progressed, Finished} and engine.num_restarts == 1
    assert tokens_of(samples, events) == {str(sample.id): whole(sample) for sample in samples}
    engine.close()


def test_an_evaluation_goes_on_with_the_next_process(tmp_path: Path) -> None:
    def judge(text: str, sample: Sample, item: object) -> Reward:
        return Reward(1.0, correct=True)

    engine = remote(tmp_path, "kill")
    result = evaluate(
        engine, make_prompts(3), judge, lambda _ids: "", SamplingSpec(max_new_tokens=200), mode="sampled", num_samples=2
    )
    assert engine.num_restarts == 1 and result.accuracy == 1.0
    assert [sample.token_ids.tolist() for sample in result.samples] == [whole(sample) for sample in result.samples]
    engine.close()


def test_with_fail_the_run_ends_with_the_reason(tmp_path: Path) -> None:
    engine, samples = remote(tmp_path, "kill", on_engine_loss="fail"), samples_of()
    engine.submit(samples)
    with pytest.raises(ProcessError, match=r"the engine process \d+ it closed the connection \(ended by SIGKILL\)"):
        drain(engine, lambda: not engine._open)
    engine.close()


def test_an_engine_that_dies_again_and_again_is_given_up_with_all_reasons(tmp_path: Path) -> None:
    engine, samples = remote(tmp_path, "kill always", on_engine_loss="retry", restarts=2, after_tokens=20), samples_of()
    engine.submit(samples)
    with pytest.raises(ProcessError, match="lost 3 times within 600 s") as caught:
        drain(engine, lambda: not engine._open)
    assert str(caught.value.got).count("ended by SIGKILL") == 3
    engine.close()


def test_a_process_that_never_starts_says_why_at_once(tmp_path: Path) -> None:
    engine = RemoteEngine(broken_engine, clock=WallClock(), limits=LIMITS)
    with pytest.raises(ProcessError, match="the engine process failed") as caught:
        _ = engine.caps
    assert "ImportError: no such engine" in str(caught.value.got) and engine.num_restarts == 0


class Sleeper(Stepped):
    """Sleeps and scores."""

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    def score(self, samples: Sequence[Sample]) -> list[npt.NDArray[np.float32]]:
        return [np.zeros(len(sample), np.float32) for sample in samples]


def test_answers_that_nobody_waits_for_are_not_kept() -> None:
    engine = RemoteEngine(lambda _clock: Sleeper(), clock=WallClock(), limits=LIMITS, spawn=ThreadChild)
    assert engine.caps.max_running > 0
    for _ in range(3):
        engine.sleep()
        engine.wake()
    assert [scores.shape for scores in engine.score(samples_of(1, 2))] == [(0,), (0,)]
    assert engine._reply == Reply(0, None)
    engine.close()


class RefusedOnce:
    """Makes an engine, but for the second process: there something it needs, such as a server, is not there."""

    def __init__(self) -> None:
        self.num_started = 0

    def __call__(self, clock: WallClock) -> Stepped:
        self.num_started += 1
        if self.num_started == 2:
            raise ResourceError("a vLLM server does not start", got="out of memory")
        return Stepped(40)


def test_a_process_that_fails_to_start_again_is_lost_once_more_whatever_its_error() -> None:
    make = RefusedOnce()
    engine = RemoteEngine(make, clock=WallClock(), limits=LIMITS, spawn=ThreadChild)
    assert engine.caps.max_running > 0
    engine.restart("was killed")
    samples = samples_of()
    engine.submit(samples)
    events = drain(engine, lambda: not engine._open)
    assert sorted(event.id for event in events if isinstance(event, Broken)) == sorted(sample.id for sample in samples)
    engine.submit(samples)
    assert sum(isinstance(event, Finished) for event in drain(engine, lambda: not engine._open)) == 4
    assert make.num_started == 3 and engine.num_restarts == 2
    assert "failed: a vLLM server does not start (out of memory)" in engine.all_losses[1]
    engine.close()


def test_samples_of_a_process_that_is_gone_can_be_parked(tmp_path: Path) -> None:
    """Killed from outside while the driver waits for aborts: every sample comes back, as parked or as broken."""
    engine, samples = remote(tmp_path, pause_s=0.01, restart_pause_s=60.0), samples_of()
    engine.submit(samples)
    drain(engine, lambda: engine.load().generated_tokens > 0)
    os.kill(engine.pid or 0, signal.SIGKILL)
    engine.abort()
    events = drain(engine, lambda: not engine._open)
    assert sorted(e.id for e in events if isinstance(e, Broken | Parked)) == sorted(sample.id for sample in samples)
    engine.submit(samples)
    engine.abort([samples[0].id])  # there is no process now: nothing can come of it
    assert [type(event) for event in engine.poll()] == [Parked]
    assert [wait.stage for wait in engine.waits()] == ["start", "generate", "publish"]
    assert engine.load().version == -1, "nobody serves any version"
    engine.close()


def test_samples_that_were_aborted_do_not_go_on_in_the_next_process(tmp_path: Path) -> None:
    engine, samples = remote(tmp_path, pause_s=0.01, on_engine_loss="retry"), samples_of()
    engine.submit(samples)
    drain(engine, lambda: engine.load().generated_tokens > 0)
    os.kill(engine.pid or 0, signal.SIGSTOP)  # it never hears the abort
    aborted = [sample.id for sample in samples if sample.id in engine._open][:2]
    engine.abort(aborted)
    os.kill(engine.pid or 0, signal.SIGKILL)
    events = drain(engine, lambda: not engine._open)
    assert [event.id for event in events if isinstance(event, Parked)] == aborted and engine.num_restarts == 1
    engine.close()


def test_a_report_about_a_sample_that_was_never_given_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_engine, "Child", ThreadChild)
    engine, samples = remote(tmp_path), samples_of()
    assert engine.caps.max_running > 0
    with pytest.raises(EngineError, match="a sample that it does not have"):
        engine._take(Report([Finished(0.0, samples[0].id, None, "eos")], engine.load(), None))
    engine.close()


def test_what_is_waited_for_has_an_owner_and_a_deadline(tmp_path: Path) -> None:
    engine, samples = remote(tmp_path, pause_s=0.01, engine_silence_s=50.0), samples_of()
    assert engine.ready_at() is None and engine.pending() == []
    engine.submit(samples)
    (wait,) = engine.waits()
    assert (wait.stage, wait.what) == ("generate", tuple(str(sample.id) for sample in samples))
    assert wait.owner == f"engine (process {engine.pid})" and wait.deadline_s is not None
    ready_s = engine.ready_at()
    assert ready_s is not None and 0 < ready_s - wait.since_s < 51.0
    assert engine.pending() == ["generate 4"]
    with pytest.raises(EngineError, match="running already"):
        engine.submit(samples[:1])
    engine.close()
    assert engine.ready_at() is None


def test_the_transport_is_told_of_an_engine_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a broadcast would wait for one that has left its run."""
    monkeypatch.setattr(remote_engine, "Child", ThreadChild)
    told: list[str] = []
    transport: Any = SimpleNamespace(reader=lambda _name: None, gone=told.append)
    engine = RemoteEngine(lambda _clock: Stepped(max_running=4), clock=WallClock(), limits=LIMITS, transport=transport)
    engine.close()
    assert told == [], "there was no process"
    assert engine.caps.max_running == 4 and engine.loaded
    engine.close()
    assert told == ["engine"] and not engine.loaded
