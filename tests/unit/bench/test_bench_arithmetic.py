"""Medians, ratios and the roofline, with literal numbers."""

from __future__ import annotations

import numpy as np
import pytest

from april.bench import probes
from april.bench.arithmetic import decode_roofline, probe_rows, ratio, running_rows, spread, step_bound_s
from april.bench.shapes import SHAPES
from april.bench.summary import best_probe
from april.core.errors import DataError
from april.models.linear import FrozenLinear


def test_spread_is_the_median_with_the_extremes():
    assert spread([3.0, 1.0, 10.0]).to_json() == {"median": 3.0, "low": 1.0, "high": 10.0, "num": 3}
    assert spread([1.0, 2.0]).median == 1.5
    with pytest.raises(DataError, match="at least one"):
        spread([])


def test_ratio_is_taken_round_by_round():
    # round by round 2, 5, 4; the ratio of the medians would be 20 / 5 = 4 as well, that of the means 4.06
    assert ratio([10.0, 20.0, 40.0], [5.0, 4.0, 10.0]).to_json() == {"median": 4.0, "low": 2.0, "high": 5.0, "num": 3}
    # a peer that was given one round only is compared with the first of ours
    assert ratio([10.0, 20.0, 40.0], [5.0]).to_json() == {"median": 2.0, "low": 2.0, "high": 2.0, "num": 1}
    # a slow machine in one round hits both sides and leaves no trace
    assert ratio([10.0, 1.0], [5.0, 0.5]).high == 2.0
    with pytest.raises(DataError):
        ratio([1.0], [])


def test_running_rows_counts_who_still_runs_at_each_step():
    assert running_rows(np.array([1, 3, 3, 5])).tolist() == [4, 3, 3, 1, 1]
    assert running_rows(np.array([2, 2])).tolist() == [2, 2]


def test_roofline_of_equal_lengths_is_steps_times_one_step():
    bound = decode_roofline(np.array([3, 3]), 10, {1: 1.0, 2: 1.5}, kv_bytes_per_token=100, bytes_per_s=1000.0)
    # steps 1 and 2 with two rows each; context 10 + 2 and 10 + 3 tokens
    assert bound.matmul_s == 3.0
    assert bound.kv_s == pytest.approx((2 * 12 + 2 * 13) * 100 / 1000)
    assert bound.total_s == pytest.approx(8.0)
    assert (bound.num_steps, bound.num_tokens) == (2, 4)
    assert bound.tokens_per_s == pytest.approx(0.5)
    assert bound.step_s == pytest.approx(4.0)


def test_roofline_of_a_long_tail_follows_the_shrinking_batch():
    bound = decode_roofline(np.array([2, 2, 2, 3]), 0, {1: 1.0, 2: 2.0, 4: 3.0}, kv_bytes_per_token=1, bytes_per_s=1.0)
    assert bound.matmul_s == 3.0 + 1.0  # four rows, then one
    assert bound.kv_s == 4 * 2 + 1 * 3
    # rows between two probed sizes are interpolated
    between = decode_roofline(np.array([2, 2, 2]), 0, {2: 2.0, 4: 3.0}, 0, 1.0)
    assert between.matmul_s == 2.5
    with pytest.raises(DataError, match="after its first token"):
        decode_roofline(np.array([1, 1]), 0, {1: 1.0}, 1, 1.0)


def test_the_bound_of_a_step_adds_products_and_kv():
    assert step_bound_s(0.25, 4, 12.5, kv_bytes_per_token=100, bytes_per_s=2000.0) == 0.25 + 2.5


def test_the_probe_is_the_fastest_way_of_all_the_models_products(monkeypatch):
    calls: list[int] = []
    packed = FrozenLinear.__call__
    monkeypatch.setattr(FrozenLinear, "__call__", lambda layer, x: calls.append(len(x)) or packed(layer, x))
    seconds = iter([3.0, 2.0, 1.0])
    monkeypatch.setattr(probes, "fastest_s", lambda work, _budget_s: (work(), next(seconds))[1])
    assert probes.MatmulProbe(SHAPES["tiny"], budget_s=0.0).step_s(5) == 1.0
    assert calls == [5] * (2 * 4 + 1), "the engine's own layer, once for each product of two layers and the head"


def test_probed_sizes_are_powers_of_two_and_the_batch_itself():
    assert probe_rows(1) == [1]
    assert probe_rows(16) == [1, 2, 4, 8, 16]
    assert probe_rows(20) == [1, 2, 4, 8, 16, 20]


def test_the_better_of_two_probes_is_the_faster_number_of_each():
    before = {"matmul_step_s": {"1": 2.0, "8": 5.0}, "copy_bytes": 64, "copy_bytes_per_s": 7.0, "square_flops_per_s_single": 1.0}
    after = {"matmul_step_s": {"1": 3.0, "8": 4.0}, "copy_bytes": 64, "copy_bytes_per_s": 6.0, "square_flops_per_s_single": 2.0}
    assert best_probe(before, after) == {
        "matmul_step_s": {"1": 2.0, "8": 4.0},
        "copy_bytes": 64,
        "copy_bytes_per_s": 7.0,
        "square_flops_per_s_single": 2.0,
    }
