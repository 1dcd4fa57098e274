import math
from itertools import combinations

import numpy as np
import pytest

from april.core.errors import DataError
from april.observe.statistics import (
    Estimate,
    mean_interval,
    paired_difference,
    pass_at_k,
    t_quantile_975,
    wilson_interval,
)


def test_pass_at_k_literal_numbers() -> None:
    # n = 10, c = 3: 1 - C(7, k) / C(10, k)
    assert pass_at_k(10, [3], 1)[0] == pytest.approx(0.3)
    assert pass_at_k(10, [3], 5)[0] == pytest.approx(1 - 21 / 252)
    assert pass_at_k(10, [3], 8)[0] == 1.0
    assert pass_at_k([4, 4, 2], [0, 4, 1], 2).tolist() == [0.0, 1.0, 1.0]


def test_pass_at_k_is_the_mean_over_all_subsets() -> None:
    right = [True, False, True, False, False, False]
    subsets = [any(right[i] for i in chosen) for chosen in combinations(range(6), 3)]
    assert pass_at_k(6, [2], 3)[0] == pytest.approx(np.mean(subsets))
    plug_in = 1 - (1 - 2 / 6) ** 3
    assert abs(plug_in - np.mean(subsets)) > 0.05, "the biased estimator must differ, or the test shows nothing"


@pytest.mark.parametrize(("total", "correct", "k"), [(4, 1, 5), (4, 1, 0), (4, 5, 1), (4, -1, 1)])
def test_pass_at_k_refuses(total: int, correct: int, k: int) -> None:
    with pytest.raises(DataError):
        pass_at_k(total, [correct], k)
    assert pass_at_k(4, [4], 4)[0] == 1.0


def test_wilson_literal_numbers() -> None:
    half = wilson_interval(5, 10)
    assert (half.value, half.num) == (0.5, 10)
    assert (half.low, half.high) == pytest.approx((0.236593, 0.763407), abs=1e-6)
    none = wilson_interval(0, 10)
    assert none.low == 0.0 and none.high == pytest.approx(0.277533, abs=1e-6)
    wide = wilson_interval(81, 263)
    assert (wide.low, wide.high) == pytest.approx((0.255289, 0.366210), abs=1e-4)
    assert wilson_interval(10, 10).high == 1.0


def test_wilson_refuses() -> None:
    for counts in ((1, 0), (3, 2), (-1, 2)):
        with pytest.raises(DataError):
            wilson_interval(*counts)
    assert wilson_interval(0, 1).value == 0.0


def test_paired_difference_is_mcnemars_table() -> None:
    # 100 problems: 40 right both times, 30 gained, 10 lost, 20 wrong both times
    before = [1] * 40 + [0] * 30 + [1] * 10 + [0] * 20
    after = [1] * 40 + [1] * 30 + [0] * 10 + [0] * 20
    estimate = paired_difference(before, after)
    half = 1.959964 * math.sqrt(30 + 10 - (30 - 10) ** 2 / 100) / 100
    assert estimate.value == pytest.approx(0.2)
    assert (estimate.low, estimate.high) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    unpaired = 1.959964 * math.sqrt(0.5 * 0.5 / 100 + 0.7 * 0.3 / 100)
    assert half < 0.95 * unpaired, "pairing must narrow the interval here"


def test_the_closed_form_agrees_with_resampled_problems() -> None:
    before = [1] * 40 + [0] * 30 + [1] * 10 + [0] * 20
    after = [1] * 40 + [1] * 30 + [0] * 10 + [0] * 20
    closed, differences = paired_difference(before, after), np.subtract(after, before)
    resampled = differences[np.random.Generator(np.random.PCG64(3)).integers(0, 100, (10_000, 100))].mean(axis=1)
    assert (closed.low, closed.high) == pytest.approx(tuple(np.quantile(resampled, [0.025, 0.975])), abs=0.015)


def test_a_difference_of_nothing_covers_zero() -> None:
    scores = np.arange(50) % 2
    estimate = paired_difference(scores, scores[::-1])
    assert estimate.value == 0 and estimate.low < 0 < estimate.high


def test_scores_that_cannot_be_paired() -> None:
    for before, after in (([], []), ([1], [1, 2]), ([[1]], [[1]])):
        with pytest.raises(DataError, match="paired"):
            paired_difference(before, after)
    assert paired_difference([0], [1]).value == 1


def test_mean_interval_literal_numbers() -> None:
    three = mean_interval([0.6, 0.7, 0.8])
    assert three.value == pytest.approx(0.7)
    assert three.high - three.value == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    single = mean_interval([0.5])
    assert single.low == -math.inf and single.high == math.inf
    with pytest.raises(DataError):
        mean_interval([])


def test_t_quantiles() -> None:
    known = {1: 12.706, 4: 2.776, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980, 10_000: 1.960}
    assert {degrees: round(t_quantile_975(degrees), 3) for degrees in known} == known
    assert t_quantile_975(31) < t_quantile_975(30)
    with pytest.raises(DataError):
        t_quantile_975(0)


def test_an_estimate_prints_its_interval() -> None:
    assert str(Estimate(0.5, 0.25, 0.75, 10)) == "0.500 [0.250, 0.750]"
