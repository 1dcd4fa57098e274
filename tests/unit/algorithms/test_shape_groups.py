"""Filters and composers: which groups and members train."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shape_cases import group_of

from april.algorithms.composers import max_variance, resample_on_correct, roc_select, switch_pairs, widest
from april.algorithms.filters import accuracy_range, reward_spread
from april.core.errors import DataError, RecipeError
from april.core.group import Failure, Group, Reward


def kept(group: Group) -> list[int]:
    return [index for index, outcome in enumerate(group.outcomes) if isinstance(outcome, Reward)]


# -- filters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("solved", "reason"), [(0, "too few correct"), (1, "too few correct"), (2, None), (8, None), (9, "too many correct")]
)
def test_accuracy_range(solved: int, reason: str | None) -> None:
    group = group_of([(1.0, True)] * solved + [(0.0, False)] * (10 - solved))
    assert accuracy_range(group) == reason
    assert accuracy_range(group, low_fraction=0.0, high_fraction=1.0) is None


def test_accuracy_counts_rewarded_members_only() -> None:
    assert accuracy_range(group_of([(1.0, True), (0.0, False), *[Failure("x")] * 8])) is None
    assert accuracy_range(group_of([Failure("x")])) == "no rewarded members"


def test_an_empty_range_is_refused() -> None:
    from april.algorithms.spec import AlgorithmConfig

    with pytest.raises(RecipeError, match="low_fraction, high_fraction"):
        AlgorithmConfig.model_validate({"filter": [{"type": "accuracy_range", "low_fraction": 0.9}]})
    assert len(AlgorithmConfig.model_validate({"filter": ["accuracy_range"]}).filter) == 1


def test_reward_spread_looks_at_the_reward_or_a_part() -> None:
    group = group_of([(0.0, False, {"a": 1.0}), (1.0, True, {"a": 1.0}), (1.0, True)])
    assert reward_spread(group) is None and reward_spread(group, part="a") == "rewards too close"
    assert reward_spread(group, min_std=0.6) == "rewards too close"
    assert reward_spread(group, part="b") == "fewer than two rewarded members"


# -- selection of members ------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8), st.data())
def test_widest_is_the_best_of_all_subsets(values: list[float], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(values)))
    best = max(np.var([values[i] for i in subset]) for subset in itertools.combinations(range(len(values)), count))
    chosen = widest(values, count)
    assert len(set(chosen)) == count and np.var([values[i] for i in chosen]) == pytest.approx(best, abs=1e-9)


def test_widest_of_equal_values_are_the_first() -> None:
    assert widest([1.0] * 5, 3) == [0, 1, 2] and widest([1.0], 0) == []
    with pytest.raises(DataError, match="more values"):
        widest([1.0], 2)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.booleans(), min_size=5, max_size=12), st.integers(0, 2), st.integers(0, 2))
def test_resampling_keeps_the_number_and_the_smallest_of_each_kind(right: list[bool], min_wrong: int, min_right: int) -> None:
    rewards = [float(one) for one in right]
    penalties = [0.1 * index for index in range(len(right))]
    chosen = roc_select(rewards, penalties, 4, min_wrong=min_wrong, min_right=min_right, order=range(len(right)))
    assert len(set(chosen)) == 4
    num_right, num_wrong = sum(right), len(right) - sum(right)
    got_right = sum(right[index] for index in chosen)
    assert got_right >= min(min_right, num_right) and 4 - got_right >= min(min_wrong, num_wrong)
    best = [index for index, one in enumerate(right) if one][:got_right]
    assert [index for index in chosen if right[index]] == best, "right ones by their penalty"


def roc_group(serial: int = 0) -> Group:
    slips = [0.5, 0.0, 1.0, 0.2, 0.3]
    right = [(1.0, True, {"tool_error": slip, "answer_format": 0.0}) for slip in slips]
    return group_of([*right, *[(0.0, False)] * 5], serial)


def test_right_members_with_the_fewest_slips_train() -> None:
    (group,) = resample_on_correct([roc_group()], min_wrong=1, min_right=1)
    assert [index for index in kept(group) if index < 5] == [1, 3, 4]
    assert len(kept(group)) == 5
    left = [outcome for outcome in group.outcomes if isinstance(outcome, Failure)]
    assert {failure.reason for failure in left} == {"left out by resample_on_correct"} and len(left) == 5


def test_wrong_members_are_drawn_the_same_way_each_time_and_not_by_arrival() -> None:
    groups = [roc_group(serial) for serial in range(8)]
    chosen = [kept(group) for group in resample_on_correct(groups)]
    assert chosen == [kept(group) for group in resample_on_correct(groups)]
    wrong = {tuple(index for index in members if index >= 5) for members in chosen}
    assert len(wrong) > 1, "not the first ones in every group"
    assert chosen != [kept(group) for group in resample_on_correct(groups, seed=1)]


def test_a_group_with_few_rewards_stays_whole() -> None:
    group = group_of([(1.0, True), (0.0, False), Failure("x"), Failure("x")])
    assert resample_on_correct([group]) == (group,)


def test_max_variance_keeps_the_extremes() -> None:
    group = group_of([(value, value > 0.5) for value in (0.5, 0.0, 0.6, 1.0, 0.4, 0.1, 0.9, 0.5)])
    (chosen,) = max_variance([group], keep_fraction=0.5)
    assert kept(chosen) == [1, 3, 5, 6]
    (pair,) = max_variance([group], keep_fraction=0.01)
    assert kept(pair) == [1, 3], "one member has no siblings to compare with"


# -- pairs ---------------------------------------------------------------------------------------------------------------


def member(correct: bool, reasoned: bool) -> tuple[float, bool, dict[str, float]]:
    return 0.7, correct, {"reasoning": float(reasoned)}


@pytest.mark.parametrize(
    ("direct", "reasoned", "expected"),
    [(True, True, (1.0, 0.0)), (True, False, (1.0, 0.0)), (False, True, (0.0, 1.0)), (False, False, None)],
)
def test_switch_pairs_prefer_the_direct_answer(direct: bool, reasoned: bool, expected: tuple[float, float] | None) -> None:
    made = switch_pairs([group_of([member(direct, False), member(reasoned, True)])])
    got = [tuple(outcome.value for outcome in group.outcomes if isinstance(outcome, Reward)) for group in made]
    assert got == ([] if expected is None else [expected])


def test_switch_pairs_take_solved_members_and_leave_the_others_out() -> None:
    group = group_of([member(False, False), member(False, True), member(True, True), member(False, True), (1.0, True)])
    (pair,) = switch_pairs([group])
    assert kept(pair) == [0, 2] and [pair.outcomes[i].value for i in (0, 2)] == [0.0, 1.0]
    assert switch_pairs([group_of([member(True, True)] * 3)]) == (), "one mode makes no pair"
