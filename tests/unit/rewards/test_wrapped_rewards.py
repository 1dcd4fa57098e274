"""Rewards on top of others, and those of workflows and predictions."""

from __future__ import annotations

import json

import pytest
from fake_endpoint import serving
from reward_cases import sample_of

from april.core.errors import RecipeError
from april.core.group import Failure, Reward
from april.rewards.build import build_reward
from april.rewards.flaws import process_reward
from april.rewards.judge import judge
from april.rewards.meta import Prediction, Rollouts, meta_parts
from april.rewards.traces import answer_slips, error_share
from april.rewards.workflow import coupling, ordered, success_probability


def score(spec: object, text: str, item: dict[str, object]):
    return judge(build_reward(spec), text, sample_of(item), 20.0)  # type: ignore[arg-type]


ITEM = {"question": "6 * 7?", "answer": "42"}

# -- flaws ---------------------------------------------------------------------------------------------------------------


def checked(url: str, **options: object) -> dict[str, object]:
    return {"type": "flaw_check", "reward": "exact", "judge": {"type": "judge", "url": url, "retries": 0}, **options}


def test_only_right_answers_are_sent_to_the_judge() -> None:
    with serving(lambda *_: "a guess: yes") as fake:
        right, wrong = score(checked(fake.url), "42", ITEM), score(checked(fake.url), "41", ITEM)
    assert len(fake.bodies) == 1 and "mistake" in fake.bodies[0]["messages"][0]["content"]
    assert (right.value, right.correct, right.parts["flawed"], right.parts["unjudged"]) == (1.0, True, 1.0, 0.0)
    assert "flawed" not in wrong.parts and wrong == score("exact", "41", ITEM)


def test_without_a_verdict_an_answer_is_sound_and_counted() -> None:
    for reply in ("hm", 500):
        with serving(lambda *_, reply=reply: reply) as fake:
            got = score(checked(fake.url), "42", ITEM)
            failed = score(checked(fake.url, on_failure="fail"), "42", ITEM)
        assert (got.parts["flawed"], got.parts["unjudged"]) == (0.0, 1.0) and isinstance(failed, Failure)
    with serving(lambda *_: "no") as fake:
        assert score(checked(fake.url), "42", ITEM).parts["unjudged"] == 0.0


def test_the_judge_of_a_flaw_check_may_bring_its_own_template() -> None:
    with serving(lambda *_: "no") as fake:
        own = {"type": "flaw_check", "reward": "exact", "judge": {"url": fake.url, "template": "look: {response}"}}
        assert score(own, "42", ITEM).parts["flawed"] == 0.0
    assert fake.bodies[0]["messages"][0]["content"] == "look: 42"


def test_error_steps_by_hand() -> None:
    assert [process_reward(*case) for case in [(4, 4, 8), (0, 4, 8), (-1, -1, 8), (2, -1, 8), (None, -1, 8)]] == [
        1,
        0.5,
        1,
        -1,
        -1,
    ]
    item = {"error_step": 2, "num_steps": 4}
    assert score("error_step", r"first wrong: \boxed{3}", item).value == 0.75
    assert score("error_step", "all fine", item) == Reward(-1.0, False, {"answered": 0.0})
    assert score("error_step", r"\boxed{2}", item).correct


# -- tool calls ----------------------------------------------------------------------------------------------------------


def test_slips_become_parts_and_the_reward_stays() -> None:
    spec = {"type": "tool_trace", "reward": {"type": "exact", "answer_pattern": "<answer>(.*?)</answer>"}}
    text = "<tool_response>Error</tool_response><tool_response>4</tool_response><answer>42</answer>"
    got = score(spec, text, ITEM)
    assert (got.value, got.correct) == (1.0, True) and (got.parts["tool_error"], got.parts["answer_format"]) == (0.5, 0.0)
    assert got.parts["score"] == 1.0, "the parts of the inner reward are kept"


@pytest.mark.parametrize(
    ("text", "slips"),
    [
        ("<answer>1</answer>", 0.0),
        ("1", 1.0),
        ("<answer>1", 1.0),
        ("<answer>1</answer></answer>", 1.0),
        ("<answer>1</answer>" * 2, 1.0),
    ],
)
def test_answers_given_once(text: str, slips: float) -> None:
    assert answer_slips(text) == slips


def test_repeated_answers_are_counted_by_turn() -> None:
    turn = "<|im_start|>assistant{}<|im_end|>"
    text = "".join(turn.format(part) for part in ("a", "b", "c", "<answer>1</answer><answer>2</answer>"))
    assert answer_slips(text) == 0.25 and answer_slips(text, turn_pattern="never") == 1.0
    assert error_share("no call") == 0.5 and error_share("<tool_response>fine</tool_response>") == 0.0


# -- workflows -----------------------------------------------------------------------------------------------------------

TASKS = {"a": {"p": 0.9, "cost": 1.0}, "b": {"p": 0.8, "q": 0.1, "cost": 2.0}, "c": {"p": 0.5, "cost": 0.5}}


def test_a_chain_multiplies_and_an_unused_task_only_costs() -> None:
    chain = {"a": [], "b": ["a"]}
    success = {"a": (0.9, 0.0), "b": (0.8, 0.1), "c": (0.5, 0.0)}
    assert success_probability(chain, success, "b") == pytest.approx(0.9 * 0.8 + 0.1 * 0.1)
    assert success_probability({"c": [], **chain}, success, "b") == pytest.approx(0.73)
    assert success_probability(chain, success, "a") == pytest.approx(0.9), "not the joint success of all tasks"


def test_workflow_reward_from_a_response() -> None:
    spec = {"type": "workflow", "gain": 10.0, "penalty_weight": 1.0}
    got = score(spec, 'plan: {"a": [], "b": ["a"]}', {"tasks": TASKS})
    assert got.value == pytest.approx(7.3 - 3.0 - 1.0) and got.correct and got.parts["p_output"] == pytest.approx(0.73)


@pytest.mark.parametrize(
    "graph", ["no plan", "[1]", "{}", {"a": ["b"], "b": ["a"]}, {"x": []}, {"a": ["b"]}, {"a": "b"}, {"a": [], "b": 3}]
)
def test_no_graph_no_reward(graph: object) -> None:
    text = graph if isinstance(graph, str) else json.dumps(graph)
    assert score("workflow", text, {"tasks": TASKS}) == Reward(0.0, False, {"answered": 0.0})


def test_order_and_coupling_of_graphs() -> None:
    assert ordered({"c": ["b"], "b": ["a"], "a": []}) == ["a", "b", "c"] and ordered({"a": ["a"]}) == []
    assert coupling({"a": [], "b": ["a"], "c": ["a", "b"]}) == 1.0 and coupling({"a": []}) == 0.0


# -- predictions ---------------------------------------------------------------------------------------------------------

MADE = [{"response": "by parity", "correct": True, "length_tokens": n} for n in (10, 30)] + [
    {"response": "guess", "correct": False, "length_tokens": 90}
]


def test_meta_prediction_from_a_response() -> None:
    item = {"question": "find x", "rollouts": MADE}
    said = {"notions": ["parity"], "length_tokens": 20, "num_passes": 6}
    got = score({"type": "meta_prediction", "num_rollouts": 9}, f"I think {json.dumps(said)}", item)
    assert got.value == pytest.approx(1.0) and got.parts["length"] == 1.0
    assert score("meta_prediction", "no idea", item).parts == {"answered": 0.0}
    assert score("meta_prediction", '{"notions": "parity", "length_tokens": 1, "num_passes": 1}', item).parts == {"answered": 0.0}


def test_predictions_about_solutions_to_come_are_parts() -> None:
    got = score("meta_prediction", '{"notions": [], "length_tokens": 20, "num_passes": 6}', {"question": "find x"})
    assert got == Reward(0.0, False, {"answered": 1.0, "num_passes": 6.0, "length_tokens": 20.0})


def test_predictions_that_say_nothing_earn_nothing() -> None:
    rollouts = Rollouts("use parity", ["by parity", "by parity"], [True, False], [10, 20])
    parts = meta_parts(Prediction(["parity"], 10, 4), rollouts)
    assert parts["notion"] == 0.0, "it stands in the problem"
    assert parts["length"] == 0.0 and parts["pass_rate"] == pytest.approx(1.0)
    unsolved = Rollouts("", ["a"], [False], [10])
    assert meta_parts(Prediction([], 10, 0), unsolved) == {"notion": 0.0, "pass_rate": 1.0, "length": 0.0}


# -- marks ---------------------------------------------------------------------------------------------------------------


def test_marks_of_the_form_become_parts() -> None:
    spec = {
        "type": "patterns",
        "reward": {"type": "exact", "answer_pattern": "= (.+)"},
        "patterns": {"reasoning": "(?s)<think>.+</think>"},
    }
    reasoned, direct = score(spec, "<think>six\nsevens</think> = 42", ITEM), score(spec, "= 42", ITEM)
    assert (reasoned.value, reasoned.parts) == (1.0, {"answered": 1.0, "score": 1.0, "reasoning": 1.0})
    assert direct.parts["reasoning"] == 0.0 and direct.correct
    with pytest.raises(RecipeError, match="not a regular expression"):
        build_reward({**spec, "patterns": {"reasoning": "("}})
