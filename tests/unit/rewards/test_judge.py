import math
import signal
import sys
import threading
import time

import numpy as np
import pytest
from math_verify.errors import TimeoutException
from reward_cases import decode, sample_of

from april.core.group import Failure, Reward
from april.rewards.base import as_reward
from april.rewards.deadline import Expired, call_within
from april.rewards.judge import described, judge, judge_all


def judged(verifier, timeout_s=5.0):
    return judge(verifier, "text", sample_of(), timeout_s)


def returns(value):
    return lambda text, sample, item: value


@pytest.mark.parametrize("value", [1, 1.0, True, np.float32(1), np.array(1), np.int64(1), {"a": 0.25, "b": 0.75}])
def test_one_number_is_a_reward_and_correct_from_one(value) -> None:
    outcome = judged(returns(value))
    assert isinstance(outcome, Reward) and outcome.value == 1.0 and outcome.correct
    assert type(outcome.value) is float


def test_parts_are_named_and_summed() -> None:
    assert judged(returns({"format": 0.5, "length": -0.25})) == Reward(0.25, False, {"format": 0.5, "length": -0.25})
    assert judged(returns(Reward(0.5, True, {"x": np.float64(2)}))) == Reward(0.5, True, {"x": 2.0})
    assert judged(returns(0.99)) == Reward(0.99, False)


def test_a_torch_scalar_is_one_number() -> None:
    torch = pytest.importorskip("torch")
    assert judged(returns(torch.tensor(0.5))) == Reward(0.5)
    outcome = judged(returns(torch.zeros(2)))
    assert isinstance(outcome, Failure) and "Tensor of shape (2,)" in outcome.reason


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([1, 2, 3], "reward of the wrong shape: got list of 3, expected one number"),
        ((1.0,), "reward of the wrong shape: got tuple of 1, expected one number"),
        (None, "reward of the wrong shape: got None (is a `return` missing?), expected one number"),
        ("1", "reward of the wrong shape: got str '1', expected one number"),
        (np.array([True, False]), "reward of the wrong shape: got ndarray of shape (2,), expected one number"),
        (np.ones(1), "reward of the wrong shape: got ndarray of shape (1,), expected one number"),
        (1j, "reward of the wrong shape: got complex '1j', expected one number"),
        ({}, "reward of the wrong shape: got no parts, expected at least one"),
        ({"a": [1]}, "part 'a' of the wrong shape: got list of 1, expected one number"),
        (float("nan"), "reward is not finite: got nan"),
        (-math.inf, "reward is not finite: got -inf"),
        ({"a": 1.0, "b": math.nan}, "part 'b' is not finite: got nan"),
        (Reward(1.0, True, {"c": math.inf}), "part 'c' is not finite: got inf"),
    ],
)
def test_anything_else_costs_the_sample_with_the_reason(value, reason: str) -> None:
    assert judged(returns(value)) == Failure(reason)


def raises(error):
    def verifier(text, sample, item):
        raise error

    return verifier


class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("no\n  answer"), "ValueError: no answer"),
        (AssertionError(), "AssertionError"),
        (SystemExit(3), "SystemExit: 3"),
        (TimeoutException("slow"), "TimeoutException: slow"),
        (Unprintable(), "Unprintable: its message cannot be printed"),
    ],
)
def test_an_error_costs_the_sample(error: BaseException, reason: str) -> None:
    assert judged(raises(error)) == Failure(reason)
    assert len(described(ValueError("x" * 1000))) < 330


def test_an_interrupt_passes_through() -> None:
    with pytest.raises(KeyboardInterrupt):
        judged(raises(KeyboardInterrupt()))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def loops(text, sample, item):
    while True:
        pass


def sleeps(text, sample, item):
    time.sleep(60)


def swallows_the_first_alarm(text, sample, item):
    try:
        time.sleep(60)
    except BaseException:
        time.sleep(60)


def hides_behind_an_except(text, sample, item):
    try:
        time.sleep(60)
    except Exception:
        return 1.0


@pytest.mark.parametrize("verifier", [loops, sleeps, swallows_the_first_alarm, hides_behind_an_except])
def test_a_hang_costs_the_sample(verifier) -> None:
    assert judged(verifier, 0.05) == Failure("timed out after 0.05 s")
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_deadline_leaves_quick_rewards_alone() -> None:
    assert judged(returns(0.5), 30.0) == Reward(0.5)
    assert judged(returns(0.5), None) == Reward(0.5)


def test_the_previous_handler_and_timer_come_back() -> None:
    def mine(signum, frame):
        raise AssertionError("the outer alarm came early")

    before = signal.signal(signal.SIGALRM, mine)
    try:
        signal.setitimer(signal.ITIMER_REAL, 500.0)
        judged(loops, 0.02)
        assert signal.getsignal(signal.SIGALRM) is mine
        assert 490 < signal.getitimer(signal.ITIMER_REAL)[0] < 500
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(30)
    return results[0]


def test_outside_the_main_thread_a_helper_thread_is_abandoned() -> None:
    release = threading.Event()
    hang = lambda text, sample, item: release.wait(60)  # noqa: E731
    assert in_thread(lambda: judged(hang, 0.02)) == Failure("timed out after 0.02 s")
    release.set()
    assert in_thread(lambda: judged(returns(0.5), 30.0)) == Reward(0.5)
    assert in_thread(lambda: judged(raises(ValueError("no")), 30.0)) == Failure("ValueError: no")


def test_call_within_gives_the_result_or_expires() -> None:
    assert call_within(lambda: "done", 5.0) == "done"
    with pytest.raises(Expired):
        call_within(lambda: time.sleep(60), 0.02)
    assert not issubclass(Expired, Exception)


def test_judge_all_keeps_the_order() -> None:
    samples = [sample_of(member=i, text=text) for i, text in enumerate(["3", "x", "1"])]
    outcomes = judge_all(lambda text, sample, item: float(text), samples, decode)
    assert [outcome.value if isinstance(outcome, Reward) else None for outcome in outcomes] == [3.0, None, 1.0]


def test_the_verifier_sees_text_sample_and_item() -> None:
    seen = []
    sample = sample_of({"answer": "a"}, text="hello")
    judge_all(lambda *arguments: seen.append(arguments) or 0.0, [sample], decode)
    assert seen == [("hello", sample, {"answer": "a"})]


def test_rewards_import_no_heavy_library() -> None:
    import subprocess

    code = (
        "import sys, april.rewards.runner, april.rewards.build, april.rewards.math_answer, "
        "april.rewards.reasoning_gym, april.rewards.combine, april.rewards.python, april.selection.sampler, "
        "april.observe.statistics, april.environments.reasoning_gym, april.environments.jsonl, april.text.tokenizer\n"
        "print([m for m in ('torch', 'transformers', 'sympy', 'reasoning_gym', 'math_verify') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_as_reward_passes_parts_of_any_mapping() -> None:
    from types import MappingProxyType

    assert as_reward(MappingProxyType({"a": 2})) == Reward(2.0, True, {"a": 2.0})
