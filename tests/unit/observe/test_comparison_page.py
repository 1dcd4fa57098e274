"""The page of a comparison says what its JSON holds."""

from __future__ import annotations

from typing import Any

from april.observe.comparison_page import comparison_page


def figure(mean: float, high: float | None = None) -> dict[str, Any]:
    return {"mean": mean, "low": None if high is None else 2 * mean - high, "high": high, "runs": [mean]}


def data() -> dict[str, Any]:
    arm = {
        "accuracy_after": figure(0.9, 0.93),
        "wall_s": figure(12.0),
        "rollout_s": figure(1.3),
        "tokens_generated": figure(137510.0, 155470.0),
        "clip_fraction": figure(0.00123),
        "curve": [[0, 0.3], [4, 0.9]],
    }
    speedups = {
        "fast": {
            "rollout": figure(2.0),
            "steps": {"mean": 1.5, "low": 1.2, "high": 1.8},
            "wall": {"mean": 1.1, "low": None, "high": None},
        }
    }
    return {
        "name": "two", "jobs": 2, "measures": ["clip_fraction"], "recipe": "quickstart", "overrides": ["steps=4"], "seeds": 3,
        "baseline": "slow", "target_accuracy": 0.85, "arms": {"slow": arm, "fast": arm}, "speedups": speedups,
    }  # fmt: skip


def test_figures_carry_their_interval_and_the_command_its_jobs() -> None:
    page = comparison_page(data())
    assert "`april compare two --jobs 2`" in page and "with `steps=4`" in page
    assert "| fast | 90.0 ± 3.0 | 137,510 ± 17,960 | 1.30 | 12.00 | 0.0012 |" in page, "a column without any figure is left out"
    assert "| fast | 2.00 | 1.50 (1.20 to 1.80) | 1.10 |" in page
    assert "| slow | 30.0 | 90.0 |" in page and "85.0 %" in page
    assert "idle slots" not in page


def test_a_comparison_of_what_is_learned_shows_no_times() -> None:
    page = comparison_page(data() | {"times": False})
    assert "| fast | 90.0 ± 3.0 | 137,510 ± 17,960 | 0.0012 |" in page and "not equally many tokens" in page
    assert "Seconds" not in page and "target" not in page and "| fast | 30.0 | 90.0 |" in page


def test_who_hardly_waits_has_no_ratio_of_waiting() -> None:
    given = data()
    given["arms"] = {**given["arms"], "fast": {**given["arms"]["fast"], "rollout_s": figure(1.1)}}
    page = comparison_page(given)
    assert "| fast | - | 1.50 (1.20 to 1.80) | 1.10 |" in page and "10 % of its whole run or more" in page
