import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from april import registry
from april.core.errors import DataError
from april.environments.base import Task, distinct, split, without
from april.environments.items import ItemsTask
from april.environments.jsonl import JsonlTask

GSM8K = {"question": "2 boxes of 21 eggs?", "answer": "2*21 = <<2*21=42>>42 eggs.\n#### 42"}


def write(path: Path, *lines: object) -> str:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_jsonl_reads_worked_solutions(tmp_path: Path) -> None:
    task = JsonlTask(path=write(tmp_path / "g.jsonl", GSM8K, "", GSM8K | {"id": "own", "level": 3}), answer_pattern="#### (.+)")
    first, second = task.load()
    assert first["id"] == "g-1" and first["answer"] == "42" and first["question"] == GSM8K["question"] and first["metadata"] == {}
    assert second["id"] == "own" and second["metadata"] == {"id": "own", "level": 3}
    assert task.gold(first) == GSM8K["answer"]
    assert task.default_reward() == {"type": "math", "answer_pattern": "#### (.+)"}


def test_jsonl_fields_and_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", {"q": "a", "a": 1}, {"q": "b", "a": 2})
    items = JsonlTask(path=path, question_field="q", answer_field="a", limit=1).load()
    assert [(item["question"], item["answer"]) for item in items] == [("a", "1")]
    assert JsonlTask(path=path).default_reward() == {"type": "math"}


def test_a_missing_file_names_a_near_one(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", GSM8K)
    with pytest.raises(DataError, match="does not exist") as info:
        JsonlTask(path=str(tmp_path / "trian.jsonl")).load()
    assert "did you mean 'train.jsonl'?" in str(info.value)
    with pytest.raises(DataError, match="working directory"):
        JsonlTask(path=str(tmp_path / "no" / "folder.jsonl")).load()


@pytest.mark.parametrize("lines", [[], ["", "  "]])
def test_an_empty_file_is_an_error(tmp_path: Path, lines: list[str]) -> None:
    with pytest.raises(DataError, match="data set is empty") as info:
        JsonlTask(path=write(tmp_path / "empty.jsonl", *lines)).load()
    assert "empty.jsonl" in str(info.value)


@pytest.mark.parametrize(
    ("bad", "what", "detail"),
    [
        ('{"question": ', "not JSON", "Expecting value"),
        ("[1, 2]", "not a JSON object", "[1, 2]"),
        ({"questoin": "?", "answer": "1"}, "no 'question'", "did you mean 'questoin'?"),
        ({"question": "?", "answer": None}, "no 'answer'", "task.answer_field"),
        ({"question": "?", "answer": "none"}, "does not match", "#### (.+)"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, bad: object, what: str, detail: str) -> None:
    with pytest.raises(DataError, match=what) as info:
        JsonlTask(path=write(tmp_path / "g.jsonl", GSM8K, bad), answer_pattern="#### (.+)").load()
    assert "g.jsonl, line 2" in str(info.value) and detail in str(info.value) and len(str(info.value).splitlines()) <= 6


def test_a_broken_pattern_is_refused_in_the_recipe() -> None:
    with pytest.raises(ValidationError, match="not a regular expression"):
        JsonlTask(path="x", answer_pattern="(")
    assert JsonlTask(path="x", answer_pattern="(a)").answer_pattern == "(a)"


def test_items_from_a_notebook() -> None:
    task = ItemsTask(items=[{"question": "a", "answer": "b"}, {"question": "c", "answer": "d", "id": 7, "solution": "so d"}])
    first, second = task.load()
    assert first == {"metadata": {}, "question": "a", "answer": "b", "id": "item-0"}
    assert second["id"] == "7" and task.gold(second) == "so d" and task.gold(first) == "b"
    assert task.default_reward() == {"type": "exact"}


def test_items_faults() -> None:
    with pytest.raises(DataError, match="data set is empty"):
        ItemsTask(items=[]).load()
    with pytest.raises(DataError, match="no 'answer'") as info:
        ItemsTask(items=[{"question": "a"}]).load()
    assert "task.items[0]" in str(info.value)


def numbered(count: int, copies: int = 1) -> list[dict]:
    return [{"id": f"{i}-{c}", "question": f"q{i}", "answer": str(i)} for i in range(count) for c in range(copies)]


def test_split_never_leaks_a_question() -> None:
    items = numbered(30, copies=3)
    training, held_out = split(items, 10, seed=1)
    held = {item["question"] for item in held_out}
    assert len(held_out) == len(held) == 10
    assert len(training) == 60 and not held & {item["question"] for item in training}
    naive = [item for item in items if item["id"] not in {held_item["id"] for held_item in held_out}]
    assert held & {item["question"] for item in naive}, "the control must leak, or the test shows nothing"


def test_split_is_decided_by_the_seed() -> None:
    items = numbered(40)
    ids = [[item["id"] for item in split(items, 8, seed)[1]] for seed in (1, 1, 2)]
    assert ids[0] == ids[1] != ids[2]


def test_two_questions_that_become_one_prompt_are_one_problem() -> None:
    items = [
        {"id": f"{i}{way}", "question": f"{way} {i}", "answer": "", "metadata": i} for i in range(10) for way in ("Add", "Sum")
    ]
    training, held_out = split(items, 4, seed=0, key=lambda item: str(item["metadata"]))
    assert not {item["metadata"] for item in held_out} & {item["metadata"] for item in training}
    assert len(training) == 12
    training, held_out = split(items, 4, seed=0)
    assert {item["metadata"] for item in held_out} & {item["metadata"] for item in training}, "without the key they leak"


def test_distinct_takes_what_there_is() -> None:
    chosen = distinct(numbered(3, copies=4), 10, seed=2)
    assert sorted(item["question"] for item in chosen) == ["q0", "q1", "q2"]
    assert len(distinct(numbered(3, copies=4), 2, seed=2)) == 2


def test_without_takes_the_questions_of_another_set_away() -> None:
    rest = without(numbered(4), [{"id": "z", "question": " q2 "}])
    assert [item["question"] for item in rest] == ["q0", "q1", "q3"]


@pytest.mark.parametrize(("num_items", "num_held_out"), [(5, 5), (5, 6), (0, 1)])
def test_too_few_problems_to_hold_out(num_items: int, num_held_out: int) -> None:
    with pytest.raises(DataError, match="too small") as info:
        split(numbered(num_items, copies=2), num_held_out, seed=0)
    assert f"{num_items} different questions" in str(info.value)


def test_the_registry_knows_the_tasks() -> None:
    task: Task = registry.parse("task", {"type": "items", "items": [{"question": "a", "answer": "b"}]}, "task")  # type: ignore[assignment]
    assert task.load()[0]["question"] == "a"
    assert set(registry.names("task")) >= {"reasoning_gym", "jsonl", "items"}
