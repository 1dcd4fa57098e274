"""Programs that are run on the tests of their item."""

from __future__ import annotations

import os
import signal
import statistics
import time

import pytest
from reward_cases import sample_of

from april.config.resolve import resolve
from april.core.errors import RecipeError
from april.core.group import Failure, Reward
from april.rewards import program_run
from april.rewards.build import build_reward
from april.rewards.judge import judge
from april.rewards.program_run import Run, run_tests
from april.run.checks import check_recipe

DOUBLES = ["assert f(2) == 4", "assert f(5) == 10"]
ECHO = [{"input": "3\n4\n", "output": "7\n"}, {"input": "1 1", "output": "2"}]


def score(code: str, tests: object = DOUBLES, **options: object):
    return judge(
        build_reward({"type": "program", **options}), f"Here:\n```python\n{code}\n```", sample_of({"tests": tests}), 30.0
    )


def parts(outcome: object) -> tuple[float, ...]:
    """(reward, compiled, ran, share of tests passed)."""
    assert isinstance(outcome, Reward), outcome
    return (outcome.value, outcome.parts["compiled"], outcome.parts["ran"], outcome.parts["passed"])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(x): return 2 * x", (1, 1, 1, 1)),
        ("def f(x): return x + 2", (0, 1, 1, 0.5)),
        ("def f(x): return x", (0, 1, 1, 0)),
        ("def f(x): return 1 / 0", (0, 1, 0, 0)),
        ("def g(x): return 2 * x", (0, 1, 0, 0)),
        ("assert False", (0, 1, 0, 0)),
        ("def f(x) return 2 * x", (0, 0, 0, 0)),
        ("raise SystemExit(0)", (0, 1, 0, 0)),
        ("import os; os._exit(0)", (0, 1, 0, 0)),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", (0, 1, 0, 0)),
        ("x = bytearray(1 << 40)", (0, 1, 0, 0)),
        ("while True: print('x' * 1_000_000)", (0, 1, 0, 0)),
    ],
)
def test_how_far_a_program_comes(code: str, expected: tuple[float, ...]) -> None:
    assert parts(score(code, timeout_s=20.0)) == expected


def test_a_loop_without_end_is_stopped_and_so_are_the_tests_after_it() -> None:
    for code in ("while True: pass", "import time; time.sleep(1e6)"):
        outcome = score(code, timeout_s=0.5)
        assert (outcome.value, outcome.parts["ran"]) == (0, 0) and "time_s" not in outcome.parts
    assert parts(score("def f(x):\n while x > 2: pass\n return 4", timeout_s=4.0)) == (0, 1, 0, 0.5)


def test_the_memory_of_a_program_is_bounded() -> None:
    hog = "def f(x):\n data = bytearray(200 << 20)\n return 2 * x"
    assert parts(score(hog, memory_bytes=128 << 20)) == (0, 1, 0, 0)
    assert parts(score(hog, memory_bytes=512 << 20)) == (1, 1, 1, 1)


def test_input_and_output() -> None:
    read_lines = "import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))"
    for code in (read_lines, read_lines + "\nsys.exit()", "print(sum(map(int, open(0).read().split())), end='  \\n\\n')"):
        assert parts(score(code, ECHO)) == (1, 1, 1, 1)
    assert parts(score("print(7)", ECHO)) == (0, 1, 1, 0.5)
    assert parts(score("print(7); raise SystemExit(3)", ECHO)) == (0, 1, 0, 0)
    assert parts(score("if __name__ == '__main__': print(int(input()) + int(input()))", ECHO[:1])) == (1, 1, 1, 1)


def test_a_share_of_the_tests_may_earn_a_share_of_the_reward() -> None:
    outcome = score("def f(x): return x + 2", partial_credit=True)
    assert (outcome.value, outcome.correct) == (0.5, False)


def test_no_program_compiles_nothing() -> None:
    outcome = judge(build_reward("program"), "I do not know", sample_of({"tests": DOUBLES}), 5.0)
    assert outcome == Reward(0.0, False, {"answered": 0.0, "compiled": 0.0, "ran": 0.0, "passed": 0.0})


def test_tests_that_are_no_tests_cost_the_sample() -> None:
    assert isinstance(score("x = 1", ["assert ("]), Failure)
    assert "the item has none" in score("x = 1", []).reason


def test_a_program_sees_no_variables_and_writes_into_a_folder_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    code = "import os\nopen('note.txt', 'w').write('x')\nprint('JUDGE_KEY' in os.environ, os.listdir(), os.getcwd())"
    before = set(os.listdir())
    assert parts(score(code, [{"input": "", "output": "never"}])) == (0, 1, 1, 0)
    assert set(os.listdir()) == before
    assert run_tests("import os\nassert 'JUDGE_KEY' not in os.environ", ["pass"]).ran


def test_what_a_program_leaves_running_is_ended(tmp_path) -> None:
    note = tmp_path / "pid"
    code = f"import os, time\nif os.fork() == 0:\n time.sleep(1e6)\nopen({str(note)!r}, 'w').write(str(os.getpgid(0)))"
    assert run_tests(code, ["pass"], timeout_s=20.0).ran
    deadline_s = time.monotonic() + 20
    while time.monotonic() < deadline_s:
        try:
            os.killpg(int(note.read_text()), 0)
        except ProcessLookupError:
            return
    raise AssertionError("the child of the program is alive")


def test_time_is_the_processors_and_steadied_by_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_tests("import time; time.sleep(0.5)", ["pass"], timeout_s=30.0).time_s < 0.5
    busy = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass"
    assert run_tests(busy, ["pass"], timeout_s=30.0).time_s >= 0.2
    times_s = iter([3.0, 1.0, 2.0, 10.0, 30.0, 20.0])
    monkeypatch.setattr(program_run, "_run_once", lambda *_: Run(True, True, 1.0, next(times_s)))
    assert run_tests("", DOUBLES, repeats=3) == Run(True, True, 1.0, statistics.median([1.0, 2, 3]) + 20.0)


def test_a_judgement_that_is_given_up_ends_the_program(tmp_path) -> None:
    note = tmp_path / "pid"
    alarm = "os.kill(os.getppid(), signal.SIGALRM)  # as if the time of the judgement were over"
    code = f"import os, signal, time\nopen({str(note)!r}, 'w').write(str(os.getpid()))\n{alarm}\ntime.sleep(1e6)"
    reward = build_reward({"type": "program", "timeout_s": 60.0})
    outcome = judge(reward, f"```python\n{code}\n```", sample_of({"tests": DOUBLES}), 90.0)
    assert outcome == Failure("timed out after 90 s")
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), signal.SIGKILL)


def test_a_program_may_not_outlive_its_judgement() -> None:
    base = ["reward={type='combine', rewards={code={type='program', timeout_s=5.0}}}"]
    with pytest.raises(RecipeError, match=r"reward\.rewards\.code\.timeout_s, scoring\.timeout_s"):
        check_recipe(resolve("quickstart", overrides=base).recipe)
    assert check_recipe(resolve("quickstart", overrides=[*base, "scoring.timeout_s=6.0"]).recipe)
    assert check_recipe(resolve("quickstart", overrides=["reward.type=program"]).recipe), "the defaults go together"


def test_what_a_program_does_as_a_script_is_not_a_test_s_business() -> None:
    guarded = 'def f(x): return 2 * x\nif __name__ == "__main__": n = int(input())'
    assert parts(score(guarded)) == (1, 1, 1, 1)
    assert parts(score(guarded, [{"input": "", "output": ""}])) == (0, 1, 0, 0), "run as a script it reads, and fails"


def test_a_program_sees_its_own_arguments() -> None:
    code = "import sys\nprint(sum(map(int, (open(sys.argv[1]) if len(sys.argv) > 1 else sys.stdin).read().split())))"
    assert parts(score(code, ECHO)) == (1, 1, 1, 1)


@pytest.mark.parametrize(
    ("text", "answered"),
    [
        ("```python\ndef f(x): return 2 * x\n```\nOutput:\n```\n42\n```", True),
        ("```Python3\ndef f(x): return 2 * x\n```\nand so it is", True),
        ("```\ndef f(x): return 2 * x\n```\n```bash\nls\n```", True),
        ("```python\ndef f(x): return 0\n```\n```py\ndef f(x): return 2 * x\n```", True),
        ("```bash\nls\n```\nnothing else", False),
    ],
)
def test_the_last_block_of_python_is_the_program(text: str, answered: bool) -> None:
    outcome = judge(build_reward("program"), text, sample_of({"tests": DOUBLES}), 30.0)
    assert isinstance(outcome, Reward)
    assert (outcome.parts["answered"], outcome.correct) == (float(answered), answered)


def test_time_that_is_over_ends_the_repeats_and_not_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_run.time, "monotonic", lambda: 5.0)
    runs = iter([Run(True, True, 1.0, 0.25), Run(False, False, 0.0, 0.0)])
    monkeypatch.setattr(program_run, "_run_once", lambda *_: next(runs))
    assert program_run._run_repeated("", "", 4.0, 1 << 30, 3) == Run(True, True, 1.0, 0.25)


def test_garbage_on_the_report_is_no_report() -> None:
    code = "import os\nfor fd in range(3, 20):\n    try: os.write(fd, b'{garbage\\n[1]\\n')\n    except OSError: pass\n" + (
        "def f(x): return x"
    )
    assert parts(score(code)) == (0, 1, 1, 0)


def test_a_process_that_does_not_start_is_no_fault_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_run, "_report", lambda *_: {})
    found = score("def f(x): return 2 * x")
    assert isinstance(found, Failure) and "does not start" in found.reason
