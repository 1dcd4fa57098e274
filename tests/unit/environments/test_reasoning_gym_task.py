from collections import Counter

import pytest
from pydantic import ValidationError

from april.core.errors import RecipeError
from april.environments.reasoning_gym import ReasoningGymTask, make_dataset, task_names
from april.rewards.build import build_reward
from april.rewards.judge import check_gold
from april.text.prompts import build_prompts

pytest.importorskip("reasoning_gym")

CHAIN = {"name": "chain_sum", "options": {"min_terms": 2, "max_terms": 3, "max_digits": 2}}


class Bytes:
    def encode(self, text):
        return list(text.encode())

    def render(self, messages, *, chat=False):
        return messages


def test_items_are_the_same_at_every_call_and_have_all_fields() -> None:
    task = ReasoningGymTask(**CHAIN, size=5, seed=3)
    items = task.load()
    assert items == task.load()
    assert [item["id"] for item in items] == [f"chain_sum-s3-{i}" for i in range(5)]
    assert str(eval(items[0]["metadata"]["expression"])) == items[0]["answer"]
    assert items[0]["task"] == {"name": "chain_sum", "options": CHAIN["options"]}
    assert ReasoningGymTask(**CHAIN, size=5, seed=4).load() != items


def test_a_mixture_follows_its_weights_and_each_part_its_own_order() -> None:
    parts = ({"name": "chain_sum", "weight": 3.0, "options": CHAIN["options"]}, {"name": "leg_counting", "weight": 1.0})
    items = ReasoningGymTask(mixture=parts, size=400, seed=1).load()
    counts = Counter(item["task"]["name"] for item in items)
    assert counts.total() == 400 and 260 <= counts["chain_sum"] <= 340
    alone = ReasoningGymTask(**CHAIN, size=400, seed=1).load()
    mixed = [item["question"] for item in items if item["task"]["name"] == "chain_sum"]
    assert mixed == [item["question"] for item in alone[: len(mixed)]]
    assert len({item["id"] for item in items}) == 400


@pytest.mark.parametrize("name", ["chain_sum", "leg_counting", "countdown", "spell_backward", "basic_arithmetic"])
def test_gold_answers_earn_the_full_reward(name: str) -> None:
    task = ReasoningGymTask(name=name, size=3, gold_template="so <answer>{answer}</answer>")
    items = task.load()
    golds = list(zip(build_prompts(items, Bytes()), [task.gold(item) for item in items], strict=True))
    verifier = build_reward({**task.default_reward(), "answer_pattern": "<answer>(.*?)</answer>"})
    assert check_gold(verifier, golds) == []
    wrong = check_gold(verifier, [(prompt, "<answer>no idea</answer>") for prompt, _ in golds])
    assert len(wrong) == 3 and "not correct" in wrong[0]


def test_a_gold_template_with_a_wrong_field_is_explained() -> None:
    task = ReasoningGymTask(name="chain_sum", gold_template="{anwser}")
    with pytest.raises(RecipeError, match="names a field") as info:
        task.gold({"question": "?", "answer": "1"})
    assert "task.gold_template" in str(info.value)


def test_an_unknown_task_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="unknown task") as info:
        ReasoningGymTask(name="chain_sun").load()
    assert "did you mean 'chain_sum'?" in str(info.value) and "task.name" in str(info.value)
    with pytest.raises(RecipeError, match="such as") as info:
        ReasoningGymTask(mixture=({"name": "chain_sum"}, {"name": "zzzz"})).load()
    assert "task.mixture[1].name" in str(info.value) and len(str(info.value)) < 600


def test_a_bad_option_lists_the_accepted_ones() -> None:
    with pytest.raises(RecipeError, match="unknown option of chain_sum") as info:
        ReasoningGymTask(name="chain_sum", options={"max_term": 4}).load()
    assert "max_terms" in str(info.value) and "did you mean 'max_terms'?" in str(info.value)


@pytest.mark.parametrize("options", [{"min_terms": 5, "max_terms": 3}, {"max_terms": "many"}])
def test_refused_values_are_shown(options: dict) -> None:
    with pytest.raises(RecipeError, match="refuses its options") as info:
        ReasoningGymTask(name="chain_sum", options=options).load()
    assert f"max_terms={options['max_terms']!r}" in str(info.value)


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ValidationError, match="either `name` or `mixture`"):
        ReasoningGymTask()
    with pytest.raises(ValidationError, match="either `name` or `mixture`"):
        ReasoningGymTask(name="chain_sum", mixture=({"name": "chain_sum"},))
    with pytest.raises(ValidationError, match="belong to the task"):
        ReasoningGymTask(name="chain_sum", options={"size": 3})
    with pytest.raises(ValidationError, match="no effect"):
        ReasoningGymTask(mixture=({"name": "chain_sum"},), options={"max_terms": 2})


def test_all_tasks_are_listed() -> None:
    names = task_names()
    assert len(names) >= 100 and names == sorted(names)
    assert len(make_dataset("chain_sum", {"size": 7, "seed": 0})) == 7
