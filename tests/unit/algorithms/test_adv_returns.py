"""Rewards to go and generalised advantage estimation: literal numbers, recursions and faults."""

from __future__ import annotations

import math

import pytest
import torch
from adv_fixtures import F64, ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from april.algorithms.advantages.returns import gae, reward_to_go
from april.algorithms.specs.advantages_credit import Gae, RewardToGo
from april.core.errors import DataError


def test_discounted_returns_by_hand() -> None:
    tokens = ragged([3, 2], [0, 0], reward=[1.0, 2])
    assert reward_to_go(tokens, gamma=0.5).tolist() == [0.25, 0.5, 1, 1, 2]
    assert reward_to_go(tokens).tolist() == [1, 1, 1, 2, 2]


def test_tokens_of_an_environment_are_no_steps() -> None:
    tokens = ragged([5], [0], mask=[1, 0, 0, 1, 0], reward=[1.0], token_reward=[0.0, 0, 0.5, 0, 0.25])
    # what the environment pays counts for the action before it; discounts count actions
    assert reward_to_go(tokens, gamma=0.5).tolist() == [1.125, 0, 0, 1.25, 0]
    leading = ragged([3], [0], mask=[0, 1, 1], reward=[1.0], token_reward=[9.0, 0, 0])
    assert reward_to_go(leading).tolist() == [0, 1, 1]


def test_token_rewards_are_added() -> None:
    tokens = ragged([3], [0], reward=[1.0], token_reward=[-0.1, -0.2, -0.3])
    assert torch.allclose(reward_to_go(tokens), torch.tensor([0.4, 0.5, 0.7], dtype=F64))


def test_baseline_of_the_data() -> None:
    tokens = ragged([2, 1], [0, 1], reward=[1.0, 0]).with_columns(**{"item.b": torch.tensor([0.25, 0.25, 0.5], dtype=F64)})
    assert reward_to_go(tokens, baseline="item.b").tolist() == [0.75, 0.75, -0.5]
    unknown = tokens.with_columns(**{"item.b": torch.tensor([0.25, 0.25, math.nan], dtype=F64)})
    with pytest.raises(DataError, match="samples have no baseline") as error:
        reward_to_go(unknown, baseline="item.b")
    assert "1 of 2 samples" in str(error.value)
    assert RewardToGo(baseline="item.b").needs == {"reward", "mask", "item.b"}


def test_gae_with_lam_one_is_the_return_minus_the_value() -> None:
    tokens = ragged([3, 2], [0, 1], reward=[1.0, 0], value=[0.5, 0.25, 0.75, -1.0, 1.0])
    found = gae(tokens, lam=1.0)
    assert found["advantage"].tolist() == [0.5, 0.75, 0.25, 1.0, -1.0]
    assert found["return"].tolist() == [1, 1, 1, 0, 0]
    one_step = gae(tokens, lam=0.0)
    assert one_step["advantage"].tolist() == [-0.25, 0.5, 0.25, 2.0, -1.0]


def test_the_value_model_may_have_its_own_lam() -> None:
    tokens = ragged([3], [0], reward=[1.0], value=[0.5, 0.25, 0.75])
    found = gae(tokens, lam=0.0, value_lam=1.0)
    assert found["return"].tolist() == [1, 1, 1] and found["advantage"].tolist() == [-0.25, 0.5, 0.25]
    assert gae(tokens, lam=0.0)["return"].tolist() != [1, 1, 1]


def test_held_value_of_a_sample_that_was_cut() -> None:
    tokens = ragged([2, 2], [0, 0], reward=[1.0, 1], value=[0.2, 0.6, 0.2, 0.6], finished=[True, True, False, False])
    held = gae(tokens, lam=1.0, unfinished="hold")["advantage"]
    assert torch.allclose(held, torch.tensor([0.8, 0.4, 0.4, 0.0], dtype=F64))
    counted = gae(tokens, lam=1.0)["advantage"]
    assert torch.allclose(counted, torch.tensor([0.8, 0.4, 0.8, 0.4], dtype=F64))
    single = ragged([1], [0], reward=[1.0], value=[0.3], finished=[False])
    assert gae(single, unfinished="hold")["advantage"].tolist() == [0]


def test_gae_declares_what_it_reads_and_adds() -> None:
    assert Gae().needs == {"reward", "value", "mask", "finished"} and Gae.provides == {"return"}
    tokens = ragged([1], [0], reward=[1.0])
    with pytest.raises(DataError, match="a column is not there") as error:
        gae(tokens)
    assert "value" in str(error.value)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_gae_is_its_recursion(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    mask = torch.rand(total, generator=generator) > 0.3
    columns = {name: torch.randn(total, generator=generator, dtype=F64) for name in ("value", "token_reward")}
    columns["token_reward"] = torch.where(mask, columns["token_reward"], torch.zeros(total, dtype=F64))
    reward = torch.randn(len(lengths), generator=generator, dtype=F64)
    tokens = ragged(lengths, [0] * len(lengths), mask.tolist(), reward=reward, **columns)
    expected = torch.zeros(total, dtype=F64)
    end = 0
    for sample, length in enumerate(lengths):
        rows = [row for row in range(end, end + length) if mask[row]]
        end, following, advantage = end + length, 0.0, 0.0
        for row in reversed(rows):
            paid = float(columns["token_reward"][row]) + (float(reward[sample]) if row == rows[-1] else 0.0)
            advantage = paid + gamma * following - float(columns["value"][row]) + gamma * lam * advantage
            following = float(columns["value"][row])
            expected[row] = advantage
    assert torch.allclose(gae(tokens, gamma=gamma, lam=lam)["advantage"], expected, atol=1e-10)


def test_nothing_masked_in_gives_zeros() -> None:
    tokens = ragged([2, 1], [0, 0], mask=[0, 0, 0], reward=[1.0, 1], value=[1.0, 1, 1], token_reward=[1.0, 1, 1])
    assert not gae(tokens)["advantage"].any() and not reward_to_go(tokens).any()
    nobody = tokens.take(torch.zeros(0, dtype=torch.int64))
    assert gae(nobody)["return"].shape == (0,) and reward_to_go(nobody).shape == (0,)
