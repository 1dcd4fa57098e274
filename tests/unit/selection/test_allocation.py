"""Formulas of allocation: literal numbers, limits and controls."""

from __future__ import annotations

import pytest

from april.core.errors import DataError
from april.selection import allocation


def test_student_quantiles_are_those_of_the_tables() -> None:
    table = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 10: 2.2281, 30: 2.0423, 60: 2.0003, 120: 1.9799}
    assert {degrees: round(allocation.student_quantile(0.975, degrees), 4) for degrees in table} == table
    assert round(allocation.student_quantile(0.9, 7), 4) == 1.4149


def test_one_more_rollout_helps_most_where_little_is_known() -> None:
    gains = [allocation.uncertainty_gain(0.5, count) for count in (2, 4, 8, 16)]
    assert gains == sorted(gains, reverse=True) and gains[-1] > 0
    assert allocation.uncertainty_gain(0.0, 4) == 0.0
    normal = 1.96 * 0.5 * (4**-0.5 - 5**-0.5)
    assert abs(normal - allocation.uncertainty_gain(0.5, 4)) > 0.05, "a normal interval would be another number"
    with pytest.raises(DataError, match="two values"):
        allocation.half_width(0.5, 1)


def test_aepo_splits_by_the_difference_of_entropies() -> None:
    assert allocation.whole_rollouts(1.0, 1.0, 16) == 8.0
    assert allocation.whole_rollouts(900.0, 0.0, 16) == pytest.approx(16) and allocation.whole_rollouts(0.0, 900.0, 16) == 0.0
    assert allocation.branch_score(0.5, 0.0, consecutive=20) == pytest.approx(0.0)


def test_cuts_lie_inside_the_reasoning() -> None:
    assert allocation.cut_points(100) == [25, 50, 75]
    assert allocation.cut_points(100, first_fraction=0.5, step_fraction=0.5) == [50]
    assert allocation.cut_points(1) == []


def test_forks_share_the_beginning() -> None:
    assert allocation.fork_cost(3, 0, 2) == (3, 1.0)
    assert allocation.fork_cost(1, 1, 1) == (2, 0.75)
