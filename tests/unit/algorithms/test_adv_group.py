"""Advantages that compare samples with their siblings: literal numbers, and variants that must differ."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from adv_fixtures import F64, of_samples, ragged
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from april.algorithms.advantages import group, sets
from april.algorithms.advantages.statistics import decayed_sums, joined, normalised
from april.algorithms.columns import Layout, TokenBatch
from april.algorithms.specs.advantages import Decoupled
from april.core.errors import DataError


def test_joined_numbers_rows_by_all_keys() -> None:
    ids, num = joined(torch.tensor([5, 5, 7, 5]), torch.tensor([-1, 2**62, -1, -1]))
    assert num == 3 and ids[0] == ids[3] and len({int(i) for i in ids}) == 3


def test_decayed_sums_restart_at_the_end_of_a_segment() -> None:
    values, decay = torch.tensor([1.0, 2, 4, 8, 16], dtype=F64), torch.tensor([0.5, 0.5, 0, 1, 0], dtype=F64)
    assert decayed_sums(values, decay, 3).tolist() == [3, 4, 4, 24, 16]
    assert decayed_sums(values, decay, 2).tolist() != [3, 4, 4, 24, 16]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0, 1), st.integers(0, 1000))
def test_decayed_sums_are_the_recursion(lengths: list[int], gamma: float, seed: int) -> None:
    values = torch.randn(sum(lengths), generator=torch.Generator().manual_seed(seed), dtype=F64)
    last = torch.zeros(sum(lengths)).bool()
    last[torch.tensor(lengths).cumsum(0) - 1] = True
    expected, x = [], 0.0
    for value, end in zip(reversed(values.tolist()), reversed(last.tolist()), strict=True):
        x = value + (0.0 if end else gamma * x)
        expected.insert(0, x)
    got = decayed_sums(values, gamma * (~last).to(F64), max(lengths))
    assert torch.allclose(got, torch.tensor(expected, dtype=F64), atol=1e-12)


def test_options_of_group_relative() -> None:
    tokens = ragged([1] * 6, [0, 0, 0, 1, 1, 2], reward=[1.0, 0, 0.5, 0.25, 0.75, 9])
    spread = torch.tensor([1.0, 0, 0.5, 0.25, 0.75, 9], dtype=F64).std().item() + 1e-6
    batch = group.group_relative(tokens, std="batch")
    assert of_samples(batch, tokens) == [round(x / spread, 6) for x in (0.5, -0.5, 0, -0.25, 0.25, 0)]
    alone = group.group_relative(tokens, std="none", leave_one_out=True, singleton="raw")
    assert of_samples(alone, tokens) == [0.75, -0.75, 0, -0.5, 0.5, 9]
    assert torch.equal(alone, group.leave_one_out(tokens, singleton="raw"))
    assert not torch.equal(alone, group.leave_one_out(tokens))


def test_equal_rewards_give_zero_in_float32_too() -> None:
    ids = torch.zeros(7, dtype=torch.int64)
    for dtype in (torch.float32, F64):
        assert not normalised(torch.full((7,), 0.7, dtype=dtype), ids, 1, std="sample").any()
        assert normalised(torch.tensor([0.7] * 6 + [0.701], dtype=dtype), ids, 1, std="sample").abs().min() > 0.1


def test_optimal_baseline_weighs_by_length() -> None:
    tokens = ragged([1, 3, 2], [0, 0, 1], reward=[1.0, 0, 5])
    assert of_samples(group.optimal_baseline(tokens), tokens) == [0.75, -0.25, 0]
    assert of_samples(group.optimal_baseline(tokens, singleton="raw"), tokens) == [0.75, -0.25, 5]
    masked = ragged([1, 3, 2], [0, 0, 1], mask=[1, 1, 0, 0, 1, 1], reward=[1.0, 0, 5])
    assert of_samples(group.optimal_baseline(masked), masked) == [0.5, -0.5, 0]


def test_maximum_likelihood_weighs_rare_successes_most() -> None:
    tokens = ragged([1] * 8, [0] * 4 + [1] * 4, reward=[1.0, 0, 0, 0, 1, 1, 1, 0])
    found = of_samples(group.maximum_likelihood(tokens, eps=1e-12), tokens)
    assert found == [3, -1, -1, -1, 0.333333, 0.333333, 0.333333, -1]
    # the score function of log P(correct) averages to N r_i / K - 1
    assert found[0] == 4 / 1 - 1 and of_samples(group.group_relative(tokens, std="none"), tokens)[0] == 0.75


def test_maximum_likelihood_refuses_punished_failures() -> None:
    tokens = ragged([1] * 4, [0] * 4, reward=[1.0, -1, -1, -1])
    with pytest.raises(DataError, match="no rate of success") as error:
        group.maximum_likelihood(tokens)
    assert "a reward of -1" in str(error.value) and "algorithm.reward" in str(error.value)


def best_of_k(correct: Sequence[int], k: int) -> list[float]:
    """By counting: every subset of k is a member of a population of rewards; a sample gets the mean of its subsets' credit."""
    from itertools import combinations

    subsets = list(combinations(range(len(correct)), k))
    rewards = [max(correct[i] for i in subset) for subset in subsets]
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(mean * (1 - mean))
    out = []
    for member in range(len(correct)):
        own = [(r - mean) / std for subset, r in zip(subsets, rewards, strict=True) if member in subset]
        out.append(round(sum(own) / len(own), 6))
    return out


@pytest.mark.parametrize(("correct", "k"), [([1, 0, 0, 0], 2), ([1, 1, 0, 0, 0, 0], 3), ([1, 0, 0, 0, 0, 0, 0, 0], 4)])
def test_pass_at_k_is_the_mean_over_all_subsets(correct: list[int], k: int) -> None:
    tokens = ragged([1] * len(correct), [0] * len(correct), correct=[float(c) for c in correct])
    assert of_samples(group.pass_at_k(tokens, k=k, eps=0.0), tokens) == best_of_k(correct, k)
    assert of_samples(group.pass_at_k(tokens, k=1, eps=0.0), tokens) == best_of_k(correct, 1)
    assert of_samples(group.pass_at_k(tokens, k=1, eps=0.0), tokens) != best_of_k(correct, k)


def test_pass_at_k_is_zero_where_all_subsets_agree() -> None:
    tokens = ragged([1] * 7, [0] * 4 + [1] * 3, correct=[1.0, 1, 1, 0, 1, 0, 0])
    assert not group.pass_at_k(tokens, k=2)[:4].any() and group.pass_at_k(tokens, k=2)[4:].all()
    assert not group.pass_at_k(tokens, k=4).any()


def test_decoupled_keeps_apart_what_a_sum_mixes() -> None:
    columns = {"part.a": [1.0, 0, 0, 1], "part.b": [0.0, 1, 0, math.nan], "reward": [1.0, 1, 0, 1]}
    tokens = ragged([1] * 4, [0] * 4, **columns)
    found = of_samples(group.decoupled(tokens, parts={"a": 1.0, "b": 1.0}, eps=0.0), tokens)
    assert found == [0.288675, 0.288675, -1.443376, 0.866025]
    summed = of_samples(group.group_relative(tokens, eps=0.0), tokens)
    assert summed == [0.5, 0.5, -1.5, 0.5]
    halved = of_samples(group.decoupled(tokens, parts={"a": 1.0, "b": 0.5}, eps=0.0), tokens)
    assert halved == [0.57735, -0.288675, -1.154701, 0.866025]


def test_a_part_that_no_reward_has_is_refused_unless_its_weight_is_zero() -> None:
    tokens = ragged([1, 1], [0, 0], reward=[1.0, 0], **{"part.a": [1.0, 0], "part.b": [math.nan, math.nan]})
    with pytest.raises(DataError, match="no reward has a part of this name") as error:
        group.decoupled(tokens, parts={"a": 1.0, "b": 1.0})
    assert "part.b" in str(error.value) and "b = 0" in str(error.value)
    assert of_samples(group.decoupled(tokens, parts={"a": 1.0, "b": 0.0}), tokens)[0] > 0.7
    assert Decoupled(parts={"a": 1.0, "b": 0.0}).needs == {"part.a"}
    with pytest.raises(ValidationError, match="other than 0") as refused:
        Decoupled(parts={"a": 0.0})
    assert refused.value.error_count() == 1


def test_rubric_without_any_confidence_weighs_equally() -> None:
    columns = {"part.a": [1.0, 0], "part.b": [0.0, 0.5], "part.a_confidence": [0.0, 0], "part.b_confidence": [0.0, 0]}
    tokens = ragged([1, 1], [0, 0], **columns)
    assert of_samples(group.rubric(tokens, items={"a": 3.0, "b": 1.0}), tokens) == [0.3125, -0.3125]
    sure = ragged([1, 1], [0, 0], **{**columns, "part.b_confidence": [1.0, 1]})
    assert of_samples(group.rubric(sure, items={"a": 3.0, "b": 1.0}), sure) == [-0.25, 0.25]


def test_token_weighted_falls_back_beyond_its_limit() -> None:
    tokens = ragged([1, 99], [0, 0], reward=[1.0, 0])
    assert of_samples(group.token_weighted(tokens, limit=100.0), tokens)[0] > 9.9
    assert of_samples(group.token_weighted(tokens), tokens) == [0.707106, -0.100503]


def test_polychromic_sets() -> None:
    drawn = sets.drawn_sets(8, 4, 4, seed=3)
    assert drawn.shape == (4, 4) and torch.bincount(drawn.reshape(-1)).tolist() == [2] * 8
    assert not torch.equal(drawn, sets.drawn_sets(8, 4, 4, seed=4))
    same = torch.tensor([7, 7, 7, 8])
    assert sets.set_scores(torch.tensor([1.0, 0, 1, 1]), same, torch.arange(4)).item() == 0.75 * 0.5


def test_polychromic_rewards_what_is_rare_and_right() -> None:
    ids = [1, 1, 1, 1, 1, 1, 1, 2]
    tokens = ragged([1] * 8, [0] * 8, reward=[1.0] * 8, token_ids=ids)
    found = tokens.layout.first(sets.polychromic(tokens, num_sets=8))
    assert found[7] > 0 and found[7] == found.max() and abs(float(found.sum())) < 1e-9
    alike = ragged([1] * 8, [0] * 8, reward=[1.0] * 8, token_ids=[1] * 8)
    assert not sets.polychromic(alike).any()
    small = ragged([1] * 3, [0] * 3, reward=[1.0, 0, 0], token_ids=[1, 2, 3])
    assert not sets.polychromic(small).any()


ALL: dict[str, Callable[[TokenBatch], Tensor]] = {
    "group": group.group_relative,
    "population": lambda tokens: group.group_relative(tokens, std="population"),
    "batch": lambda tokens: group.group_relative(tokens, std="batch"),
    "siblings": lambda tokens: group.group_relative(tokens, std="siblings", leave_one_out=True),
    "leave_one_out": group.leave_one_out,
    "optimal_baseline": group.optimal_baseline,
    "maximum_likelihood": group.maximum_likelihood,
    "pass_at_k": lambda tokens: group.pass_at_k(tokens, k=2),
    "decoupled": lambda tokens: group.decoupled(tokens, parts={"a": 1.0}),
    "rubric": lambda tokens: group.rubric(tokens, items={"a": 1.0}),
    "token_weighted": group.token_weighted,
    "polychromic": lambda tokens: sets.polychromic(tokens, set_size=2),
}


def random_batch(seed: int, rewards: Sequence[float] = (0.0, 0.3, 1.0)) -> TokenBatch:
    """Four groups of four different responses."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 5, (16,), generator=generator)
    reward = torch.tensor(rewards, dtype=F64)[torch.randint(len(rewards), (16,), generator=generator)]
    part = torch.rand(16, generator=generator, dtype=F64)
    columns = {"reward": reward, "correct": (reward == 1).to(F64), "part.a": part, "part.a_confidence": part}
    tokens = ragged(lengths.tolist(), [g for g in range(4) for _ in range(4)], **columns)
    return tokens.with_columns(token_ids=tokens.layout.spread(torch.arange(16)))


@pytest.mark.parametrize("name", ALL)
def test_permuting_groups_and_their_members_changes_nothing(name: str) -> None:
    straight = random_batch(5)
    order = torch.tensor([4 * group + member for group in (2, 0, 3, 1) for member in (3, 1, 0, 2)])
    mixed = straight.take(order)
    moved = TokenBatch(Layout(mixed.layout.offsets, straight.layout.group_of_sample, 4), mixed.columns)
    a = straight.layout.first(ALL[name](straight))[order]
    b = moved.layout.first(ALL[name](moved))
    assert torch.allclose(a, b, atol=1e-12) and a.abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("decoupled", "rubric", "polychromic")])
def test_groups_that_agree_and_masked_ones_give_zero_and_never_nan(name: str) -> None:
    alike = random_batch(5, rewards=(0.7,))
    found = ALL[name](alike)
    assert torch.equal(found, torch.zeros_like(found))
    off = torch.zeros_like(alike["mask"])
    masked = random_batch(5).with_columns(mask=off, trained=off)
    assert ALL[name](masked).isfinite().all()
    nobody = masked.take(torch.zeros(0, dtype=torch.int64))
    assert ALL[name](nobody).shape == (0,)
