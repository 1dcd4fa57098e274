"""The simulator against reality, small: the same batches in both, and errors that are what they are called."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from april.bench.simulator_bench import SimulatorOptions, compare, markdown, run_simulator_bench
from april.engines.simulated.costs import EngineCosts
from april.simulate.cost import Costs, TrainCosts


def rows(*steps: tuple[float, int]) -> list[dict[str, Any]]:
    return [{"rollout_s": s, "train_s": 2 * s, "step_s": 3 * s, "consumed_tokens": tokens} for s, tokens in steps]


def test_errors_are_relative_and_their_median_counts() -> None:
    measured, told = rows((1.0, 10), (2.0, 20), (4.0, 30)), rows((1.1, 10), (1.0, 21), (4.0, 30))
    arm = compare("sync", measured, told)
    assert arm["rollout_s"]["median_error"] == pytest.approx(0.1) and arm["step_s"]["median_error"] == pytest.approx(0.1)
    assert arm["rollout_s"]["ratio_of_sums"] == pytest.approx(6.1 / 7) and arm["same_batches"] == pytest.approx(2 / 3)


def test_real_runs_are_replayed_batch_by_batch(tmp_path: Path) -> None:
    """Costs that are far off: the times are wrong and say so, yet the batches are those of the real run."""
    slow = Costs(engine=EngineCosts(step_fixed_s=100.0, max_running=8), train=TrainCosts(fixed_s=100.0))
    slow.save(tmp_path / "costs.json")
    small = (
        "engine.max_running=8",
        "batch.groups_per_step=2",
        "batch.group_size=2",
        "sampling.max_new_tokens=24",
        "task.size=60",
    )
    options = SimulatorOptions(overrides=small, steps=2, costs=tmp_path / "costs.json", ratios=(1.5,))
    results = run_simulator_bench(options, tmp_path, lambda _line: None)
    arms = {arm["arm"]: arm for arm in results["arms"]}
    assert list(arms) == ["sync", "april 1.5", "token_budget"] and not results["ok"]
    assert arms["sync"]["same_batches"] == 1.0
    assert all(arm["step_s"]["ratio_of_sums"] > 2 and len(arm["step_s"]["measured"]) == 2 for arm in arms.values())
    assert "| sync |" in markdown(results) and (tmp_path / "token_budget" / "lengths.jsonl").is_file()
