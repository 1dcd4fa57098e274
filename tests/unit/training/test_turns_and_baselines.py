"""Columns of turns, and of greedy members, from groups."""

from __future__ import annotations

import math

import pytest
import torch

from april.algorithms.composers import max_variance
from april.core.errors import DataError
from april.core.group import Batch, Group, Reward
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment, Span
from april.core.sampling import SamplingSpec
from april.training.batch import assemble, trainable

GROUP = GroupId(0, 0, "p")


def turns_of(member: int, said: str) -> Sample:
    """A response where "e" are tokens of the environment; each letter's token is its position."""
    spans, start = [], 0
    for position in range(1, len(said) + 1):
        if position == len(said) or said[position] != said[start]:
            environment = said[start] == "e"
            spans.append(Span(start, position, -1 if environment else 0, "environment" if environment else "sampled"))  # type: ignore[arg-type]
            start = position
    own = [letter == "p" for letter in said]
    return Sample(
        GROUP.member(member), Prompt("p", [1]), SamplingSpec(32), list(range(len(said))), [-1.0 if p else 0.0 for p in own],  # type: ignore[arg-type]
        own, tuple(spans), stop="eos",  # type: ignore[arg-type]
    )  # fmt: skip


def test_turns_come_from_spans_and_only_when_asked() -> None:
    samples = (turns_of(0, "peppep"), turns_of(1, "peppe"))
    batch = Batch(0, 0, (Group(GROUP, samples, (Reward(1.0), Reward(0.0))),))  # type: ignore[arg-type]
    tokens = assemble(batch, needs=("turn",)).tokens
    assert tokens["turn"].tolist() == [0, 1, 1, 1, 2, 2, 0, 1, 1, 1, 1]
    anchor = tokens["anchor"].tolist()
    assert anchor[0] == anchor[6] == 0 and anchor[1] == anchor[7] != anchor[4]
    assert "turn" not in assemble(batch).tokens


def sampled(member: int, temperature: float) -> Sample:
    spec = SamplingSpec(max_new_tokens=4, temperature=temperature)
    return Sample(GROUP.member(member), Prompt("p", [1]), spec).extended(Segment([3, 4], [-1, -1], 0)).finished("eos")  # type: ignore[arg-type]


def test_greedy_members_give_the_baseline_and_do_not_train() -> None:
    samples = (sampled(0, 1.0), sampled(1, 1.0), sampled(2, 0.0))
    batch = Batch(0, 0, (Group(GROUP, samples, (Reward(1.0), Reward(0.0), Reward(0.5))),))  # type: ignore[arg-type]
    data = assemble(batch, needs=("baseline",))
    assert [sample.id.member for sample in data.samples] == [0, 1] and data.tokens["baseline"].tolist() == [0.5] * 4
    assert (data.num_left_out, data.num_failed) == (0, 0)
    with pytest.raises(DataError, match="greedy samples cannot be trained on") as error:
        assemble(batch)
    assert "m2" in str(error.value)
    without = Batch(0, 0, (Group(GROUP, (sampled(0, 1.0),), (Reward(1.0),)),))  # type: ignore[arg-type]
    assert math.isnan(float(assemble(without, needs=("baseline",)).tokens["baseline"][0]))
    assert assemble(batch, needs=("baseline",)).tokens["reward"].dtype == torch.float64


def test_composers_choose_among_sampled_members_and_keep_the_baseline() -> None:
    samples = tuple(sampled(member, float(member < 4)) for member in range(5))
    rewards = tuple(Reward(value) for value in (0.5, 1.0, 0.0, 0.5, -9.0))
    batch, needs = Batch(0, 0, (Group(GROUP, samples, rewards),)), ("baseline",)  # type: ignore[arg-type]
    data = assemble(batch, max_variance(trainable(batch, needs), keep_fraction=0.5), needs)
    assert [sample.id.member for sample in data.samples] == [1, 2] and data.num_left_out == 2
    assert data.tokens["baseline"].tolist() == [-9.0] * 4
