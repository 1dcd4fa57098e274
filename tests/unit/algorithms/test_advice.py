"""What is said about groups without signal, and when."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from april.algorithms.advice import better_group_size, expected_no_signal, notes


def test_prompts_that_are_all_alike_follow_the_binomial() -> None:
    correct = [2] * 81 + [1] * 18 + [0]  # p = 0.9, and pairs as chance would have them
    assert expected_no_signal(correct, [2] * 100, 2) == pytest.approx(0.82)
    assert expected_no_signal(correct, [2] * 100, 8) == pytest.approx(0.9**8 + 0.1**8, abs=1e-6)


def test_prompts_that_differ_keep_more_groups_silent() -> None:
    alike, apart = [1] * 50 + [2] * 25 + [0] * 25, [1] * 20 + [2] * 40 + [0] * 40
    assert expected_no_signal(alike, [2] * 100, 8) == pytest.approx(2 / 2**8, abs=1e-6)
    assert expected_no_signal(apart, [2] * 100, 8) > 0.4
    assert expected_no_signal(apart, [2] * 100, 2) == pytest.approx(0.8)


def test_the_share_at_other_sizes_is_that_of_simulated_groups() -> None:
    rng = np.random.default_rng(1)
    rates = rng.beta(2.0, 0.7, 20_000)
    small = rng.binomial(4, rates)
    for size in (4, 8, 16):
        drawn = rng.binomial(size, rates)
        truth = np.mean((drawn == 0) | (drawn == size))
        assert expected_no_signal(small.tolist(), [4] * len(small), size) == pytest.approx(truth, abs=0.015)


def test_degenerate_groups() -> None:
    assert math.isnan(expected_no_signal([1, 0], [1, 1], 8)) and math.isnan(expected_no_signal([], [], 8))
    assert expected_no_signal([2, 2], [2, 2], 64) == 1.0 and expected_no_signal([2, 0], [2, 2], 64) == 1.0
    assert better_group_size([2, 0], [2, 2]) is None and better_group_size([], []) is None
    assert better_group_size([1] * 8, [1] * 8) is None


def test_the_better_size_halves_what_is_lost() -> None:
    correct = [2] * 76 + [1] * 23 + [0] * 1
    found = better_group_size(correct, [2] * 100)
    assert found is not None and found[0] == 8
    assert found[1] <= 0.77 / 2 < expected_no_signal(correct, [2] * 100, 4)


ROW = {
    "num_groups": 10.0,
    "no_signal_groups": 8.0,
    "group_size": 2.0,
    "advised_group_size": 8.0,
    "advised_no_signal_fraction": 0.3,
    "weight_ess_fraction": 0.9,
    "clip_fraction": 0.01,
}


def test_the_sentence() -> None:
    (note,) = notes(ROW)
    assert note.kind == "no_signal"
    assert note.text == "8 of 10 groups carry no signal at this pass rate with group size 2; 8 would leave 3"
    (note,) = notes({key: value for key, value in ROW.items() if not key.startswith("advised")})
    assert "larger groups would not help" in note.text
    assert notes({**ROW, "no_signal_groups": 4.0}) == [] and notes({}) == []


def test_weights_and_clips_far_from_the_policy_are_told() -> None:
    kinds = [note.kind for note in notes({"weight_ess_fraction": 0.2, "clip_fraction": 0.5})]
    assert kinds == ["weight_ess", "clip"]
    assert "20%" in notes({"weight_ess_fraction": 0.2})[0].text and notes({"clip_fraction": math.nan}) == []


def test_it_needs_no_torch() -> None:
    code = "import sys, april.algorithms.advice; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
