"""The comparison of whole runs: same problems and options on both sides, seconds paired seed by seed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from april.bench import grpo_bench
from april.bench.grpo_bench import WORKLOADS, GrpoOptions, run_grpo_bench, training_s
from april.config.resolve import resolve
from april.core.errors import EngineError


@pytest.mark.parametrize("workload", WORKLOADS)
def test_the_recipe_of_each_workload_is_valid(workload: str) -> None:
    recipe = resolve("quickstart", overrides=list(WORKLOADS[workload])).recipe
    assert recipe.task.type == recipe.evaluation_task.type == "reasoning_gym"


def test_ratios_are_paired_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"april": [2.0, 1.0, 4.0], "april-sync": [4.0, 2.0, 8.0], "trl": [8.0, 6.0, 8.0]}

    def april(_options: Any, seed: int, _folder: Path, side: str) -> dict[str, Any]:
        return {"wall_s": seconds[side][seed], "accuracy": 0.5}

    monkeypatch.setattr(grpo_bench, "_april", april)
    monkeypatch.setattr(grpo_bench, "_trl", lambda _options, seed, _folder: {"wall_s": seconds["trl"][seed], "accuracy": 0.25})
    result = run_grpo_bench(GrpoOptions("long-tailed"), tmp_path, lambda _line: None)
    assert result["speedup_over_trl"]["april"]["runs"] == [4.0, 6.0, 2.0]
    assert result["speedup_over_trl"]["april"]["mean"] == 4.0
    assert result["speedup_over_trl"]["april-sync"]["runs"] == [2.0, 3.0, 1.0]
    assert result["accuracy_over_trl"]["april"]["runs"] == [0.25, 0.25, 0.25]
    assert result["options"]["model"] == "packaged"


def test_seconds_count_what_is_written_between_steps() -> None:
    rows = [{"time_s": 12.0, "step_s": 2.0}, {"time_s": 15.0, "step_s": 2.0}, {"time_s": 19.0, "step_s": 2.5}]
    assert training_s(rows) == 9.0  # the steps alone are 6.5
    assert training_s(rows[:1]) == 2.0


def test_trl_gets_the_problems_and_options_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = iter(['{"wall_s": 3.0, "num_samples": 64, "num_tokens": 900}', '{"sampled": {"accuracy": 0.25}}'])
    commands: list[list[str]] = []

    def run(command: list[str], _threads: int, _log: Path) -> str:
        commands.append(command)
        return next(replies)

    monkeypatch.setattr(grpo_bench, "_run", run)
    done = grpo_bench._trl(GrpoOptions("even", steps=4), 1, tmp_path / "trl")
    spec = json.loads((tmp_path / "trl.json").read_text())
    assert done == {"wall_s": 3.0, "num_samples": 64, "num_tokens": 900, "accuracy": 0.25}
    assert (spec["steps"], spec["seed"], spec["lr"], spec["group_size"]) == (4, 1, 5e-5, 8)
    assert all(item["prompt"].count(" ") == 26 for item in spec["items"]), "sums of 14 numbers"
    assert commands[1][-3:] == ["--model", str(tmp_path / "trl"), "--json"]


def test_a_run_that_fails_names_its_log(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="a compared run failed") as info:
        grpo_bench._run(["false"], 1, tmp_path / "x.log")
    assert "x.log" in str(info.value)
