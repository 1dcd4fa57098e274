"""What makes optimiser steps out of a batch: order of the steps, what is kept, when it ends, which arm is pulled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from april.algorithms.losses.compose import Algorithm
from april.algorithms.spec import AlgorithmConfig
from april.algorithms.update import Work, bandit_epochs, entropy_z, plain, slow_fast, thompson_draws, ucb_scores
from april.core.errors import RecipeError
from april.core.metric import Mean


def recorded(num_parts: int = 1, **fields: object) -> tuple[Work, list[int]]:
    order: list[int] = []
    return Work(lambda part: (order.append(part), True)[1], num_parts=num_parts, **fields), order  # type: ignore[arg-type]


def test_plain_takes_each_mini_batch_once_an_epoch() -> None:
    work, order = recorded(2, num_epochs=2)
    plain(work)
    assert order == [0, 1, 0, 1]


def test_slow_fast_walks_each_mini_batch_to_its_own_end() -> None:
    work, order = recorded(2)
    metrics = slow_fast(work, fast_steps=2)
    assert order == [0, 0, 0, 1, 1, 1] and metrics["reposition_alpha"].value == 0.8


@pytest.mark.parametrize(("alpha", "expected"), [(0.0, 10.0 - 1), (1.0, 10.0 - 4), (0.5, 10.0 - 1.5 - 1)])
def test_alpha_is_the_share_of_the_way_that_is_kept(alpha: float, expected: float) -> None:
    theta = torch.tensor([10.0])

    def step(part: int) -> bool:
        theta.sub_(1)
        return True

    slow_fast(Work(step, parameters=[theta]), fast_steps=3, alpha=alpha)
    assert float(theta) == expected


def test_weights_that_did_not_move_are_not_touched() -> None:
    theta = torch.tensor([0.1, float("nan")])
    slow_fast(Work(lambda part: False, parameters=[theta]), fast_steps=2)
    assert float(theta[0]) == np.float32(0.1)


def test_an_abnormal_entropy_ends_the_fast_steps_for_good() -> None:
    state: dict[str, object] = {}
    counts = []
    for entropy in (1.0, 1.1, 0.9, 1.0, 0.2, 1.0, 1.0):
        work, order = recorded(entropy=entropy, state=state)
        slow_fast(work, fast_steps=3, window_steps=5, threshold=1.9)
        counts.append(len(order))
    assert counts == [4, 4, 4, 4, 4, 1, 1] and state["off"] is True
    calm: dict[str, object] = {}
    for entropy in (1.0, 1.1, 0.9, 1.0, 0.95, 1.0):
        slow_fast(recorded(entropy=entropy, state=calm)[0], window_steps=5, threshold=1.9)
    assert calm["off"] is False and len(calm["entropies"]) == 5  # type: ignore[arg-type]


def test_no_spread_is_no_trigger() -> None:
    assert entropy_z([1.0, 1.0, 1.0]) == 0.0
    assert entropy_z([0.0, 0.0, 3.0]) == pytest.approx(math.sqrt(2))


def test_ucb_by_hand() -> None:
    scores = ucb_scores([0.6, 0.7, 0.65], [5, 10, 2], 1.0)
    assert scores == pytest.approx([1.352757, 1.232279, 1.840213], abs=1e-6) and int(np.argmax(scores)) == 2
    assert ucb_scores([0.6, 0.7, 0.65], [5, 10, 2], 0.0) != pytest.approx(scores, abs=1e-3)


def test_thompson_draws_are_addressed_and_spread_with_the_noise() -> None:
    rewards = [[0.1, 0.3], [0.5]]
    assert thompson_draws(rewards, 0.1, 3) == thompson_draws(rewards, 0.1, 3) != thompson_draws(rewards, 0.1, 4)
    drawn = np.array([thompson_draws(rewards, 0.1, index) for index in range(2000)])
    assert drawn.mean(0) == pytest.approx([0.2, 0.5], abs=0.01)
    assert drawn.std(0) == pytest.approx([math.sqrt(0.01 / 2 + 0.01), 0.1], abs=0.01)


@pytest.mark.parametrize("rule", ["ucb", "thompson"])
def test_the_bandit_finds_the_arm_that_pays(rule: str) -> None:
    """Stationary: the mean reward after an arm is drawn around 0.3, 0.5, 0.4 with deviation 0.1."""
    rng = np.random.default_rng(0)
    state: dict[str, object] = {}
    reward, taken = 0.4, []
    for index in range(800):
        work, order = recorded(index=index, reward_mean=reward, state=state)
        bandit_epochs(work, arms=(1, 2, 3), rule=rule, exploration=0.2, baseline_decay=0.99)  # type: ignore[arg-type]
        taken.append(len(order))
        reward = float(rng.normal((0.3, 0.5, 0.4)[len(order) - 1], 0.1))
    assert taken.count(1) >= 2 and np.mean(np.array(taken[-300:]) == 2) >= 0.8


def test_round_robin_and_the_kl_limit() -> None:
    state: dict[str, object] = {}
    taken = []
    for index in range(6):
        work, order = recorded(index=index, reward_mean=0.5, state=state)
        work.metrics.append({"kl_proximal": Mean(0.9 if index == 3 else 0.0, 1)})
        bandit_epochs(work, arms=(2, 1, 5), rule="round_robin", max_kl=0.5)
        taken.append(len(order))
    assert taken == [2, 1, 5, 2, 1, 5]  # after the fourth batch the smallest; that counts as its turn
    state["kl"] = 0.9
    work, order = recorded(state=state)
    bandit_epochs(work, arms=(2, 1, 5), rule="ucb", max_kl=0.5)
    assert len(order) == 1


def test_a_reward_that_is_not_finite_counts_for_nothing_and_other_arms_start_afresh() -> None:
    state: dict[str, object] = {}
    for reward in (0.5, math.nan, 0.7):
        bandit_epochs(recorded(reward_mean=reward, state=state)[0], arms=(1, 2))
    assert sum(map(len, state["rewards"])) == 1  # type: ignore[arg-type, call-overload]
    bandit_epochs(recorded(reward_mean=0.5, state=state)[0], arms=(1, 2, 3))
    assert state["trials"] == [1, 0, 0]


def test_configs_reach_their_functions() -> None:
    atoms = Algorithm.of(AlgorithmConfig.model_validate({"update": {"type": "slow_fast", "fast_steps": 5}}))
    work, order = recorded()
    atoms.update(work)
    assert len(order) == 6
    with pytest.raises(RecipeError, match="different numbers") as error:
        AlgorithmConfig.model_validate({"update": {"type": "bandit_epochs", "arms": [1, 1]}})
    assert "algorithm.update.arms" in str(error.value)
