"""Groups to columns, micro-batches and learning rates."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_fixtures import make_batch, make_group, make_sample

from april.core.errors import DataError
from april.core.group import Batch, Group, Reward
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment, Span
from april.core.sampling import SamplingSpec
from april.training.batch import assemble
from april.training.config import OptimizerConfig, learning_rate
from april.training.pack import micro_batches, mini_batches


def test_columns_by_hand() -> None:
    rng = np.random.default_rng(0)
    group = make_group(0, [1.0, None, 0.0], rng, lengths=[2, 4, 3])
    data = assemble(Batch(0, 0, (group,)))
    assert data.tokens.layout.offsets.tolist() == [0, 2, 5] and data.num_failed == 1
    assert data.tokens["reward"].tolist() == [1, 1, 0, 0, 0]
    assert data.tokens["token_ids"].tolist() == [*group.samples[0].token_ids, *group.samples[2].token_ids]
    assert [sample.id.member for sample in data.samples] == [0, 2]


def test_lag_and_what_is_too_stale() -> None:
    rng = np.random.default_rng(0)
    group = GroupId(0, 0, "p")
    samples = (make_sample(group, 0, 0, rng, [(2, 3), (1, 5)]), make_sample(group, 1, 0, rng, [(1, 4), (2, 5)]))
    batch = Batch(5, 5, (Group(group, samples, (Reward(1.0), Reward(0.0))),), max_token_lag=1)
    tokens = assemble(batch).tokens
    assert tokens["lag"].tolist() == [2, 2, 0, 1, 0, 0]
    assert tokens["mask"].all() and tokens["trained"].tolist() == [False, False, True, True, True, True]
    assert assemble(replace(batch, max_token_lag=None)).tokens["trained"].all()


def test_environment_tokens_are_neither_masked_in_nor_stale() -> None:
    group = GroupId(0, 0, "p")
    sample = Sample(
        group.member(0), Prompt("p", [1]), SamplingSpec(8), [5, 6, 7], [-1, 0, -1], [True, False, True],  # type: ignore[arg-type]
        (Span(0, 1, 4), Span(1, 2, -1, "environment"), Span(2, 3, 4)), stop="eos",
    )  # fmt: skip
    tokens = assemble(Batch(5, 5, (Group(group, (sample,), (Reward(1.0),)),))).tokens
    assert tokens["mask"].tolist() == [True, False, True] and tokens["lag"].tolist() == [1, 0, 1]


def one_sample(spec: SamplingSpec, version: int = 0, **changes: object) -> Batch:
    group = GroupId(0, 0, "p")
    sample = Sample(group.member(0), Prompt("p", [1]), spec).extended(Segment([3, 4], [-1, -1], version))  # type: ignore[arg-type]
    sample = replace(sample.finished("eos"), **changes)  # type: ignore[arg-type]
    return Batch(0, 0, (Group(group, (sample,), (Reward(1.0),)),))


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (one_sample(SamplingSpec(4, temperature=0.0)), "greedy"),
        (one_sample(SamplingSpec(4, top_p=0.9)), "kept set is stored"),
        (one_sample(SamplingSpec(4, top_k=5)), "kept set is stored"),
        (one_sample(SamplingSpec(4), version=3), "newer than the weights"),
        (one_sample(SamplingSpec(4), spans=(Span(0, 2, -1, "forced"),)), "no policy sampled"),
    ],
)
def test_samples_that_cannot_be_trained_on_are_refused_by_name(batch: Batch, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        assemble(batch)
    assert "g0/e0/p/m0" in str(error.value)


def test_a_batch_of_failures_has_no_tokens() -> None:
    data = assemble(make_batch([[None, None]]))
    assert data.tokens.layout.num_tokens == 0 and data.num_failed == 2


@given(st.lists(st.integers(1, 60), max_size=40), st.integers(1, 100), st.booleans())
@settings(max_examples=60, deadline=None)
def test_micro_batches_hold_every_sample_once_within_the_budget(lengths: list[int], budget: int, padded: bool) -> None:
    parts = micro_batches(lengths, budget, padded=padded)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    for part in parts:
        sizes = [lengths[index] for index in part]
        assert len(part) == 1 or (max(sizes) * len(sizes) if padded else sum(sizes)) <= budget
    assert parts == micro_batches(lengths, budget, padded=padded)


def test_micro_batches_by_hand() -> None:
    assert micro_batches([3, 9, 4, 4], 10) == [[1], [2, 3], [0]]
    assert micro_batches([3, 9, 4, 4], 12, padded=True) == [[1], [2, 3, 0]]
    assert micro_batches([3, 9, 4, 4], 12, groups=[0, 0, 1, 1]) == [[1, 0], [2, 3]]
    assert micro_batches([3, 9, 4, 4], 10, groups=[0, 0, 1, 1]) == [[1], [0, 2], [3]]
    assert micro_batches([3, 9, 4, 4], 10, groups=[0, 0, 1, 1], whole=True) == [[1, 0], [2, 3]]
    assert micro_batches([3, 2, 4, 4], 12, padded=True, groups=[1, 0, 1, 0], whole=True) == [[2, 0], [3, 1]]


def test_mini_batches_keep_groups_whole() -> None:
    assert mini_batches([0, 0, 1, 1, 3, 3], 2) == [[0, 1, 2, 3], [4, 5]]
    assert mini_batches([0, 0, 1], 5) == [[0, 1], [2]] and mini_batches([], 3) == []


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.86819805, 0.55, 0.23180195]),
    ],
)
def test_learning_rates(schedule: str, expected: list[float]) -> None:
    config = OptimizerConfig(lr=1.0, schedule=schedule, warmup_steps=2, min_lr_fraction=0.1)  # type: ignore[arg-type]
    assert [learning_rate(config, step, 6) for step in range(6)] == pytest.approx(expected)


def test_a_rate_without_an_end_stays_at_its_peak() -> None:
    config = OptimizerConfig(lr=2.0, schedule="cosine", warmup_steps=1)
    assert [learning_rate(config, step, None) for step in (0, 1, 50)] == [2.0, 2.0, 2.0]
    assert learning_rate(config, 50, 100) < 2.0


def test_float_columns_are_exact_on_the_controller() -> None:
    tokens = assemble(make_batch([[0.1, 0.2]])).tokens
    assert tokens["reward"].dtype == torch.float64 and tokens["reward"][0] == 0.1
