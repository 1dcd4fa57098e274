import multiprocessing
import threading
from pathlib import Path
from typing import Any

import pytest
from reward_cases import decode, sample_of

from april.config.limits import LimitsConfig
from april.core.clock import VirtualClock, WallClock
from april.core.errors import LedgerError, ProcessError, RecipeError, ResourceError
from april.core.group import Failure, Reward
from april.rewards.build import build_reward
from april.rewards.runner import RewardRunner
from april.rewards.workers import serve


def number(text, sample, item):
    return float(text)


def test_samples_are_judged_in_order_a_slice_a_poll() -> None:
    clock = VirtualClock(7.0)
    runner = RewardRunner(number, decode, clock, max_per_poll=2)
    assert runner.name == "reward" and runner.ready_at() is None and runner.poll() == []
    for member in range(3):
        runner.submit(sample_of(member=member, text=str(member)))
    assert runner.ready_at() == 7.0
    assert runner.pending() == [f"reward of g0/e0/p/m{member}" for member in range(3)]
    first = runner.poll()
    assert [(event.time_s, event.id.member, event.outcome.value) for event in first] == [(7.0, 0, 0.0), (7.0, 1, 1.0)]
    assert [event.id.member for event in runner.poll()] == [2]
    assert runner.ready_at() is None and runner.pending() == [] and runner.poll() == []


def test_every_fault_costs_one_sample_only() -> None:
    def moody(text, sample, item):
        if text == "loop":
            while True:
                pass
        return {"nan": float("nan"), "list": [1, 2], "none": None}.get(text) if text in ("nan", "list", "none") else float(text)

    runner = RewardRunner(moody, decode, VirtualClock(), timeout_s=0.05)
    texts = ["1", "loop", "nan", "list", "none", "oops", "2"]
    for member, text in enumerate(texts):
        runner.submit(sample_of(member=member, text=text))
    outcomes = [event.outcome for event in runner.poll()]
    assert [isinstance(outcome, Failure) for outcome in outcomes] == [False, True, True, True, True, True, False]
    reasons = [outcome.reason for outcome in outcomes if isinstance(outcome, Failure)]
    for reason, start in zip(
        reasons, ["timed out", "reward is not finite", "reward of the wrong", "reward of the wrong", "ValueError"], strict=True
    ):
        assert reason.startswith(start)


def test_an_interrupt_loses_no_sample() -> None:
    calls = []

    def interrupted_once(text, sample, item):
        calls.append(text)
        if calls == ["1", "2"]:
            raise KeyboardInterrupt
        return float(text)

    runner = RewardRunner(interrupted_once, decode, VirtualClock())
    for member, text in enumerate("123"):
        runner.submit(sample_of(member=member, text=text))
    with pytest.raises(KeyboardInterrupt):
        runner.poll()
    assert len(runner.pending()) == 3
    assert [event.outcome.value for event in runner.poll()] == [1.0, 2.0, 3.0]


def test_only_finished_samples_and_each_once() -> None:
    runner = RewardRunner(number, decode, VirtualClock())
    with pytest.raises(LedgerError, match="cannot be judged") as info:
        runner.submit(sample_of(text="1", stop=None))
    assert "unfinished" in str(info.value)
    runner.submit(sample_of(text="1"))
    with pytest.raises(LedgerError) as info:
        runner.submit(sample_of(text="1"))
    assert "submitted twice" in str(info.value)
    runner.poll()
    runner.submit(sample_of(text="1"))
    assert len(runner.poll()) == 1


# -- worker processes -------------------------------------------------------------------------------------------------

WORKER_REWARD = """
import os, signal, time

def score(text, sample, item):
    if text == "die":
        os._exit(7)
    if text == "raise":
        raise ValueError("no")
    if text == "sleep":
        time.sleep(60)
    if text == "deaf":
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
        time.sleep(60)
    return float(text) + len(sample)
"""


def drain(runner: RewardRunner, clock: WallClock) -> dict[int, object]:
    outcomes: dict[int, object] = {}
    while (ready := runner.ready_at()) is not None and clock.now() < 60:
        clock.wait_until(ready, runner.waitables())
        outcomes.update((event.id.member, event.outcome) for event in runner.poll())
    return outcomes


def test_workers_judge_survive_and_are_killed(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(WORKER_REWARD)
    clock = WallClock()
    runner = RewardRunner(
        build_reward({"type": "python", "path": f"{tmp_path}/score.py:score"}), decode, clock, timeout_s=0.2, workers=2
    )
    try:
        for member, text in enumerate(["1", "die", "raise", "sleep", "deaf", "2"]):
            runner.submit(sample_of(member=member, text=text))
        assert len(runner.pending()) == 6
        outcomes = drain(runner, clock)
    finally:
        runner.close()
    assert outcomes == {
        0: Reward(2.0, True),
        1: Failure("the worker that judged it died with exit code 7"),
        2: Failure("ValueError: no"),
        3: Failure("timed out after 0.2 s"),
        4: Failure("timed out after 0.2 s, and its worker was killed"),
        5: Reward(3.0, True),
    }


def test_a_worker_that_dies_idle_costs_no_sample(tmp_path: Path) -> None:
    (tmp_path / "score.py").write_text(WORKER_REWARD)
    clock = WallClock()
    runner = RewardRunner(build_reward({"type": "python", "path": f"{tmp_path}/score.py:score"}), decode, clock, workers=1)
    try:
        runner.submit(sample_of(text="1"))
        assert drain(runner, clock) == {0: Reward(2.0, True)}
        [worker] = runner._pool._workers
        former = worker.process
        former.kill()
        former.join()
        runner.submit(sample_of(member=1, text="2"))
        assert drain(runner, clock) == {1: Reward(3.0, True)}
        assert worker.process is not former
    finally:
        runner.close()


class InThread:
    """Stands for the process of a worker; "dead" ones end before they are ready, "late" ones say nothing."""

    def __init__(self, payload: bytes, life: str) -> None:
        self.connection, self._theirs = multiprocessing.Pipe()
        self.exitcode = -9
        if life == "dead":
            self._theirs.close()
        elif life == "well":
            threading.Thread(target=serve, args=(self._theirs, payload, None), daemon=True).start()

    def kill(self) -> None:
        pass

    def join(self, timeout_s: float | None = None) -> None:
        pass


def runner_with(lives: list[str], started: list[InThread], **limits: Any) -> RewardRunner:
    """A runner whose one worker has these lives."""

    def start(index: int, payload: bytes, timeout_s: float | None) -> tuple[Any, Any]:
        started.append(InThread(payload, lives[len(started)]))
        return started[-1], started[-1].connection

    options = LimitsConfig(**{"restart_pause_s": 0.0, **limits})
    return RewardRunner(length, decode, WallClock(), None, 1, start_worker=start, limits=options)


def break_connection(runner: RewardRunner) -> None:
    """As if the process of the first worker had died."""
    [worker] = runner._pool._workers  # type: ignore[union-attr]
    worker.connection.close()
    worker.connection, other = multiprocessing.Pipe()
    other.close()


def length(text: str, sample: Any, item: Any) -> float:
    return float(len(text))


def test_a_worker_that_is_replaced_may_die_before_it_is_ready() -> None:
    clock, started = WallClock(), list[InThread]()
    runner = runner_with(["well", "dead", "dead", "well"], started)
    runner.submit(sample_of(text="a"))
    assert drain(runner, clock) == {0: Reward(1.0, True)}
    break_connection(runner)
    runner.submit(sample_of(member=1, text="ab"))
    assert drain(runner, clock) == {1: Reward(2.0, True)}, "it waited for one that is well"
    assert len(started) == 4
    runner.close()


@pytest.mark.parametrize(("lives", "told"), [("dead", "before it was ready"), ("late", "not ready within 0.01 s")])
def test_a_worker_that_is_lost_too_often_ends_the_run(lives: str, told: str) -> None:
    clock, started = WallClock(), list[InThread]()
    runner = runner_with(["well", *[lives] * 3], started, restarts=2)
    runner.submit(sample_of(text="a"))
    drain(runner, clock)
    runner._pool._limits = LimitsConfig(start_s=0.01)  # type: ignore[union-attr]
    break_connection(runner)
    runner.submit(sample_of(member=1, text="ab"))
    with pytest.raises(ProcessError, match="the reward worker 0 process was lost 3 times") as caught:
        drain(runner, clock)
    assert str(caught.value.got).count(told) == 2 and caught.value.where == "limits.restarts"
    runner.close()


def test_a_lost_worker_is_started_again_after_a_pause() -> None:
    clock, started = WallClock(), list[InThread]()
    runner = runner_with(["well"], started, restart_pause_s=1000.0)
    runner.submit(sample_of(text="a"))
    drain(runner, clock)
    break_connection(runner)
    runner.submit(sample_of(member=1, text="ab"))
    assert runner.poll() == [] and runner.waitables() == [] and len(started) == 1
    ready_s = runner.ready_at()
    assert ready_s is not None and 900.0 < ready_s - clock.now() <= 1000.0
    runner.close()


def test_workers_need_a_reward_with_an_address() -> None:
    with pytest.raises(RecipeError, match="cannot be sent") as info:
        RewardRunner(lambda text, sample, item: 1.0, decode, VirtualClock(), workers=1)
    assert "scoring.workers = 0" in str(info.value)


@pytest.mark.parametrize(
    ("source", "error"), [("raise RuntimeError('not here')", RecipeError), ("import os; os._exit(3)", ResourceError)]
)
def test_workers_that_cannot_start_end_the_run(tmp_path: Path, source: str, error: type[Exception]) -> None:
    file = tmp_path / "score.py"
    file.write_text("def score(text, sample, item):\n    return 1.0\n")
    verifier = build_reward({"type": "python", "path": f"{file}:score"})
    file.write_text(source)
    clock = WallClock()
    runner = RewardRunner(verifier, decode, clock, workers=1)
    try:
        runner.submit(sample_of(text="1"))
        with pytest.raises(error, match="reward worker"):
            drain(runner, clock)
    finally:
        runner.close()
