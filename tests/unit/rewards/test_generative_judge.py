"""Judges: an endpoint on this machine that answers, fails, hangs and lies."""

from __future__ import annotations

import pickle
import threading

import pytest
from fake_endpoint import serving
from reward_cases import sample_of

from april.core.errors import RecipeError
from april.core.group import Failure, Reward
from april.rewards import endpoint
from april.rewards.build import build_reward
from april.rewards.endpoint import ChatEndpoint, EndpointFailed
from april.rewards.generative import NoVerdict, parsed_verdict
from april.rewards.judge import judge

ITEM = {"question": "6 * 7?", "answer": "42"}


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.0)


def outcome(spec: object, text: str = "it is 42", timeout_s: float | None = 20.0):
    return judge(build_reward(spec), text, sample_of(ITEM), timeout_s)  # type: ignore[arg-type]


def yes_if_42(prompt: str) -> str:
    return "yes" if "it is 42" in prompt else "no"


def test_the_endpoint_gets_the_filled_template_and_its_verdict_is_the_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with serving(lambda _, body: yes_if_42(body["messages"][0]["content"])) as fake:
        spec = {"type": "judge", "url": fake.url, "model": "m", "api_key_env": "JUDGE_KEY", "max_tokens": 9}
        right, wrong = outcome(spec), outcome(spec, "it is 41")
    assert right == Reward(1.0, True, {"score": 1.0, "judged": 1.0}) and wrong == Reward(
        0.0, False, {"score": 0.0, "judged": 1.0}
    )
    body = fake.bodies[0]
    assert fake.paths == ["/v1/chat/completions"] * 2 and fake.headers[0]["Authorization"] == "Bearer secret"
    assert (body["model"], body["max_tokens"], body["temperature"]) == ("m", 9, 0.0)
    assert all(part in body["messages"][0]["content"] for part in ("6 * 7?", "42", "it is 42"))


def test_the_last_verdict_counts_and_numbers_may_be_verdicts() -> None:
    assert parsed_verdict("no ... on second thoughts YES", r"(?i)\b(yes|no)\b", {"yes": 1.0, "no": 0.0}) == 1.0
    assert parsed_verdict("score: 3, no: 7.5", r"\d+\.?\d*", {}) == 7.5
    for text, scores in (("maybe", {"yes": 1.0}), ("perhaps yes", {"no": 0.0})):
        with pytest.raises(NoVerdict):
            parsed_verdict(text, r"yes|no", scores)
    with pytest.raises(NoVerdict, match="no number"):
        parsed_verdict("x", "x", {})


def test_without_a_verdict_the_sample_fails_or_gets_the_given_score() -> None:
    with serving(lambda *_: "I cannot say") as fake:
        failed = outcome({"type": "judge", "url": fake.url})
        scored = outcome({"type": "judge", "url": fake.url, "unparsed": 0.5})
    assert isinstance(failed, Failure) and "no verdict" in failed.reason
    assert scored == Reward(0.5, False, {"score": 0.5, "judged": 0.0})


def test_a_busy_endpoint_is_asked_again() -> None:
    with serving(lambda number, _: (503, None, "yes")[number]) as fake:
        assert outcome({"type": "judge", "url": fake.url, "retries": 2}).value == 1.0  # type: ignore[union-attr]
        assert len(fake.bodies) == 3
    with serving(lambda number, _: (503, "yes")[number]) as fake:
        failed = outcome({"type": "judge", "url": fake.url, "retries": 0})
    assert isinstance(failed, Failure) and "HTTP 503" in failed.reason


def test_a_refusal_is_not_asked_again() -> None:
    with serving(lambda *_: 401) as fake:
        failed = outcome({"type": "judge", "url": fake.url, "retries": 3})
    assert isinstance(failed, Failure) and "HTTP 401" in failed.reason and len(fake.bodies) == 1


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}'])
def test_nonsense_costs_the_sample(body: bytes) -> None:
    with serving(lambda *_: body) as fake:
        failed = outcome({"type": "judge", "url": fake.url})
    assert isinstance(failed, Failure) and "EndpointFailed" in failed.reason


def test_an_endpoint_that_hangs_costs_the_sample_after_its_own_timeout() -> None:
    release = threading.Event()
    with serving(lambda *_: "yes" if release.wait(20) else None) as fake:
        failed = outcome({"type": "judge", "url": fake.url, "timeout_s": 0.05, "retries": 0})
        late = outcome({"type": "judge", "url": fake.url, "retries": 0}, timeout_s=0.05)
        release.set()
    assert isinstance(failed, Failure) and "timed out" in failed.reason
    assert isinstance(late, Failure) and late.reason == "timed out after 0.05 s"


def test_nobody_listens() -> None:
    with serving(lambda *_: "yes") as fake:
        gone = fake.url
    failed = outcome({"type": "judge", "url": gone, "retries": 1})
    assert isinstance(failed, Failure) and gone in failed.reason


def test_a_key_that_is_not_set_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(EndpointFailed, match="NO_SUCH_KEY"):
        ChatEndpoint("http://127.0.0.1:1/v1", "m", api_key_env="NO_SUCH_KEY", retries=0)("?")


def test_a_function_may_be_the_judge(tmp_path) -> None:
    path = tmp_path / "own_judge.py"
    path.write_text("def ask(prompt):\n    return 'yes' if 'it is 42' in prompt else 'no'\n")
    spec = {"type": "judge", "path": f"{path}:ask", "template": "{question} {response}"}
    assert outcome(spec).correct and not outcome(spec, "it is 41").correct  # type: ignore[union-attr]
    verifier = pickle.loads(pickle.dumps(build_reward(spec)))
    assert verifier("it is 42", sample_of(ITEM), ITEM).value == 1.0, "judges go to worker processes"


@pytest.mark.parametrize("spec", [{}, {"url": "http://x", "path": "a:b"}])
def test_a_judge_is_one_model(spec: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="url or a path"):
        build_reward({"type": "judge", **spec})


def test_a_template_that_names_no_field_of_the_item_costs_the_sample(tmp_path) -> None:
    path = tmp_path / "silent_judge.py"
    path.write_text("def ask(prompt):\n    return 'yes'\n")
    failed = outcome({"type": "judge", "path": f"{path}:ask", "template": "{rubric}"})
    assert isinstance(failed, Failure) and "rubric" in failed.reason
