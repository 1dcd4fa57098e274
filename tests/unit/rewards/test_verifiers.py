import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from reward_cases import sample_of

from april.core.errors import RecipeError
from april.core.group import Failure, Reward
from april.rewards.build import build_reward
from april.rewards.judge import check_gold, judge
from april.rewards.python import load_function


def score(spec, text: str, item: dict | None = None, timeout_s: float | None = 5.0):
    return judge(build_reward(spec), text, sample_of(item), timeout_s)


def value(spec, text: str, answer: str) -> float:
    outcome = score(spec, text, {"answer": answer})
    assert isinstance(outcome, Reward), outcome
    assert outcome.correct == (outcome.value >= 1)
    return outcome.value


def test_exact() -> None:
    assert value("exact", " 4  2\n", "4 2") == 1.0
    assert value("exact", "Yes", "yes") == 0.0
    assert value({"type": "exact", "ignore_case": True}, "Yes", "yes") == 1.0


def test_the_last_match_of_the_pattern_is_the_answer() -> None:
    spec = {"type": "exact", "answer_pattern": "<a>(.*?)</a>"}
    assert value(spec, "<a>1</a> no, <a> 42 </a>", "42") == 1.0
    assert value(spec, "<a>42</a> no, <a>1</a>", "42") == 0.0
    assert score(spec, "42") == Reward(0.0, False, {"answered": 0.0})
    assert score(spec, "<a>42</a>").parts == {"answered": 1.0, "score": 1.0}


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("so it is 42.", "42", 1.0),
        ("so it is 41.", "42", 0.0),
        ("first 42, then 41", "42", 0.0),
        ("\\boxed{0.5}, or 7", "\\frac{1}{2}", 1.0),
        ("$x^2 + 2x$", "2x+x^2", 1.0),
        ("It costs $1,234", "1234", 1.0),
        ("\\boxed{\\text{east}}", "\\text{east}", 1.0),
        ("\\boxed{\\text{west}}", "\\text{east}", 0.0),
        ("$\\{2, 1\\}$", "\\{1,2\\}", 1.0),
        ("I do not know", "42", 0.0),
    ],
)
def test_math(text: str, answer: str, expected: float) -> None:
    assert value("math", text, answer) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("#### 1000", 1.0), ("#### $1,000", 1.0), ("#### 1000 eggs", 1.0), ("1000", 0.0), ("#### 100", 0.0)]
)
def test_math_with_a_pattern(text: str, expected: float) -> None:
    assert value({"type": "math", "answer_pattern": "#### (.+)"}, text, "1,000") == expected


def test_words_are_not_multiplied_letters() -> None:
    outcome = score("math", "the answer is seat", {"answer": "east"})
    assert isinstance(outcome, Failure) and "use the reward `exact`" in outcome.reason
    assert score({"type": "math", "answer_pattern": "is (.+)"}, "it is seat", {"answer": "x"}).parts == {"answered": 0.0}


def test_a_monstrous_answer_is_stopped_by_our_deadline() -> None:
    build_reward("math")
    outcome = score("math", "$9^{9^{9^{9}}}$", {"answer": "1000"}, timeout_s=0.3)
    assert outcome == Failure("timed out after 0.3 s")
    assert value("math", "1000", "1000") == 1.0


def test_math_works_outside_the_main_thread() -> None:
    import threading

    outcomes = []
    thread = threading.Thread(target=lambda: outcomes.append(score("math", "it is 0.5", {"answer": "1/2"}, timeout_s=30)))
    thread.start()
    thread.join(60)
    assert outcomes == [Reward(1.0, True, {"answered": 1.0, "score": 1.0})]


def test_math_says_nothing_about_its_timeouts(caplog) -> None:
    import math_verify.grader
    import math_verify.parser

    math_verify.parser.TIMEOUT_WARNING_SHOWN = math_verify.grader.TIMEOUT_WARNING_SHOWN = False
    assert value("math", "1", "1") == 1.0
    assert "Timeout" not in caplog.text


CHAIN = {"answer": "12", "question": "?", "metadata": {}, "task": {"name": "chain_sum", "options": {}}}


def test_reasoning_gym_scores_with_partial_credit() -> None:
    pytest.importorskip("reasoning_gym")
    assert score("reasoning_gym", "12", CHAIN) == Reward(1.0, True, {"answered": 1.0, "score": 1.0})
    partial = score("reasoning_gym", "it is 12", CHAIN)
    assert 0 < partial.value < 1 and not partial.correct
    strict = {"type": "reasoning_gym", "only_correct": True}
    assert score(strict, "it is 12", CHAIN).value == 0.0 and score(strict, "12", CHAIN).value == 1.0
    assert score({"type": "reasoning_gym", "answer_pattern": "= (.+)"}, "6 + 6 = 12", CHAIN).correct


def test_reasoning_gym_needs_its_own_items() -> None:
    pytest.importorskip("reasoning_gym")
    outcome = score("reasoning_gym", "12", {"answer": "12"})
    assert isinstance(outcome, Failure) and "not made by a reasoning_gym task" in outcome.reason


SOURCE = """
from dataclasses import dataclass

@dataclass
class Thing:
    x: int

CONSTANT = 3

def length(text, sample, item, scale=1.0):
    return scale * len(text)
"""


def test_python_by_file_and_by_module(tmp_path: Path) -> None:
    file = tmp_path / "my_reward.py"
    file.write_text(SOURCE)
    assert score({"type": "python", "path": f"{file}:length"}, "abc") == Reward(3.0, True)
    assert score({"type": "python", "path": f"{file}:length", "options": {"scale": 0.1}}, "abcd").value == pytest.approx(0.4)
    again = pickle.loads(pickle.dumps(build_reward({"type": "python", "path": f"{file}:length", "options": {"scale": 2}})))
    assert again("ab", sample_of(), {}) == 4
    assert load_function("operator:add")(1, 2) == 3


@pytest.mark.parametrize(
    ("path", "message", "detail"),
    [
        ("{}/missing.py:length", "file does not exist", "missing.py"),
        ("{}/my_reward.py:lenght", "no such function", "did you mean 'length'?"),
        ("{}/my_reward.py:CONSTANT", "not callable", "int"),
        ("{}/broken.py:length", "cannot be imported", "ZeroDivisionError"),
        ("no_such_module_at_all:length", "cannot be imported", "ModuleNotFoundError"),
        ("length", "cannot be used", "module:function"),
    ],
)
def test_python_errors_fit_one_screen(tmp_path: Path, path: str, message: str, detail: str) -> None:
    (tmp_path / "my_reward.py").write_text(SOURCE)
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(RecipeError, match=message) as info:
        build_reward({"type": "python", "path": path.format(tmp_path)})
    assert detail in str(info.value) and len(str(info.value).splitlines()) <= 6


COMBINED = {
    "type": "combine",
    "rewards": {"right": {"type": "exact", "answer_pattern": "= (.+)"}, "shape": {"type": "exact"}},
    "weights": {"right": 2.0, "shape": 0.5},
}


def test_combine_weighs_and_names_its_parts() -> None:
    outcome = score(COMBINED, "x = 42", {"answer": "42"})
    assert outcome.value == 2.0 and outcome.correct
    assert outcome.parts == {
        "right": 1.0,
        "right/answered": 1.0,
        "right/score": 1.0,
        "shape": 0.0,
        "shape/answered": 1.0,
        "shape/score": 0.0,
    }
    assert score({**COMBINED, "correct_by": "shape"}, "x = 42", {"answer": "42"}).correct is False
    assert score({**COMBINED, "weights": {}}, "x = 42", {"answer": "42"}).value == 1.0


def test_combine_fails_with_a_part(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("def f(text, sample, item):\n    return [1]\n")
    spec = {**COMBINED, "rewards": {**COMBINED["rewards"], "bad": {"type": "python", "path": f"{tmp_path}/bad.py:f"}}}
    assert score(spec, "= 42") == Failure("reward of the wrong shape: got list of 1, expected one number")


@pytest.mark.parametrize(
    ("spec", "detail"),
    [
        ({"type": "mathh"}, "did you mean 'math'?"),
        ({"type": "exact", "ignore_cases": True}, "did you mean 'ignore_case'?"),
        ({"type": "exact", "answer_pattern": "("}, "not a regular expression"),
        ({**COMBINED, "weights": {"rigth": 1.0}}, "did you mean 'right'?"),
        ({**COMBINED, "correct_by": "other"}, "known: right, shape"),
        ({"type": "combine", "rewards": {}}, "at least 1"),
        (3, "a function (text, sample, item)"),
    ],
)
def test_recipe_errors(spec, detail: str) -> None:
    with pytest.raises(RecipeError) as info:
        build_reward(spec)
    assert detail in str(info.value)


def test_a_function_given_directly_is_the_verifier() -> None:
    verifier = build_reward(lambda text, sample, item: len(text))
    assert judge(verifier, "abc", sample_of()) == Reward(3.0, True)


@pytest.mark.parametrize("module", ["math_answer:MathEquality", "reasoning_gym:TaskScorer"])
def test_a_worker_imports_its_library_before_it_judges(module: str) -> None:
    library = {"math_answer:MathEquality": "math_verify", "reasoning_gym:TaskScorer": "reasoning_gym"}[module]
    verifier = load_function(f"april.rewards.{module}")("= (.+)")
    code = (
        f"import pickle, sys; v = pickle.loads({pickle.dumps(verifier)!r}); print(v.answer_pattern, {library!r} in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "= (.+) True\n"


def test_check_gold_finds_a_reward_that_does_not_know_its_answers() -> None:
    prompt = sample_of({"answer": "42"}).prompt
    assert check_gold(build_reward("exact"), [(prompt, "42")]) == []
    [wrong, failed] = check_gold(build_reward("math"), [(prompt, "41"), (sample_of({"answer": "east"}).prompt, "east")])
    assert wrong.startswith("p: reward 0, not correct") and "ValueError" in failed
