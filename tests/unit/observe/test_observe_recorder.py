from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from april.core.group import Failure, Group, Reward
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample, Span
from april.core.sampling import SamplingSpec
from april.observe.recorder import Recorder, choose
from april.observe.sinks import JsonlSink, read_jsonl


def decode(ids: Sequence[int]) -> str:
    return "".join(chr(i) for i in ids)


def group(serial: int, prompt: str, rewards: Sequence[float | None], text: str = "abcd", cut: int = 0) -> Group:
    key = GroupId(serial, 0, prompt)
    spans = (Span(0, cut, 1), Span(cut, len(text), 2)) if cut else (Span(0, len(text), 2),)
    samples = tuple(
        Sample(
            id=key.member(i),
            prompt=Prompt(prompt, np.array([63])),
            spec=SamplingSpec(max_new_tokens=10),
            token_ids=np.array([ord(c) for c in text], np.int32),
            behaviour_logprobs=np.full(len(text), -1.0, np.float32),
            loss_mask=np.ones(len(text), np.bool_),
            spans=spans,
            stop="eos",
        )
        for i in range(len(rewards))
    )
    outcomes = tuple(Failure("timeout") if r is None else Reward(r, correct=r > 0) for r in rewards)
    return Group(key, samples, outcomes)


def test_a_transcript_says_what_was_asked_answered_earned_and_by_which_weights(tmp_path: Path) -> None:
    recorder = Recorder(JsonlSink(tmp_path / "t.jsonl"), decode)
    assert recorder.record(5, [group(0, "p", [1.0, None], cut=3)], version=2) == 1
    (record,) = read_jsonl(tmp_path / "t.jsonl")
    right, failed = record["responses"]
    assert (record["step"], record["version"], record["prompt_id"], record["prompt"], record["group"]) == (
        5,
        2,
        "p",
        "?",
        "g0/e0/p",
    )
    assert right == {
        "text": "abcd", "tokens": 4, "stop": "eos", "segments": [[0, 3, 1], [3, 4, 2]], "text_ends": [3, 4],
        "reward": 1.0, "correct": True, "parts": {},
    }  # fmt: skip
    assert (failed["reward"], failed["correct"], failed["failure"]) == (None, False, "timeout")


def test_where_a_segment_ends_in_the_text_comes_from_the_decoded_prefix(tmp_path: Path) -> None:
    recorder = Recorder(JsonlSink(tmp_path / "t.jsonl"), lambda ids: "two" * len(ids))
    recorder.record(0, [group(0, "p", [1.0], cut=3)], version=2)
    assert read_jsonl(tmp_path / "t.jsonl")[0]["responses"][0]["text_ends"] == [9, 12]


def test_mixed_rewards_come_first_then_prompts_seen_before() -> None:
    groups = [group(0, "easy", [1, 1]), group(1, "mixed", [1, 0]), group(2, "seen", [0, 0]), group(3, "parked", [0, 0], cut=2)]
    assert [g.id.prompt for g in choose(groups, 4, {"seen": 0})] == ["mixed", "seen", "parked", "easy"]


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_does_not_depend_on_the_order_of_groups(seed: int) -> None:
    groups = [group(i, f"p{i % 5}", [i % 2, i % 3], cut=i % 3) for i in range(12)]
    expected = [g.id for g in choose(groups, 3, {"p3": 0})]
    random.Random(seed).shuffle(groups)
    assert [g.id for g in choose(groups, 3, {"p3": 0})] == expected


def test_the_same_prompts_are_revisited_also_after_a_resume(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "t.jsonl")
    Recorder(sink, decode, num_groups=1).record(0, [group(7, "b", [0, 0])], version=0)
    later = [group(8, "a", [0, 0]), group(9, "b", [0, 0])]
    Recorder(sink, decode, num_groups=1).record(1, later, version=1)
    assert [r["prompt_id"] for r in read_jsonl(sink.path)] == ["b", "b"]
    assert [g.id.prompt for g in choose(later, 1, {})] == ["a"]


def test_steps_between_and_surplus_members_are_left_out(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "t.jsonl")
    recorder = Recorder(sink, decode, max_responses=2, every=3)
    assert [recorder.record(step, [group(step, "p", [0, 1, 1])], 0) for step in range(4)] == [1, 0, 0, 1]
    assert [len(r["responses"]) for r in read_jsonl(sink.path)] == [2, 2]
    assert recorder.record(6, [], 0) == 0
