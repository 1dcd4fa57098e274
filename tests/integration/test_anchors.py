"""Baselines measured before training, and by greedy members during it."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import april
from april.config.resolve import resolve
from april.run.anchors import measure_baselines
from april.run.data import task_of


def test_measured_baselines_come_back_as_numbers_of_the_items(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    out = tmp_path / "measured.jsonl"
    options = ["evaluation.num_problems=4", "task.size=60", "evaluation_task.size=60", "sampling.max_new_tokens=48"]
    overrides = [*options, f"out={tmp_path / 'run'}"]
    measured = measure_baselines("quickstart", out, mode="sampled", num_samples=3, num_problems=6, overrides=overrides)
    assert len(measured) == 6 and all(round(item["baseline"] * 3, 9) in (0, 1, 2, 3) for item in measured)
    recipe = resolve("quickstart", overrides=[*overrides, f'task={{type="jsonl",path="{out}"}}', "algorithm.preset=pvpo"])
    read = task_of(recipe.recipe).load()  # type: ignore[arg-type]
    assert [(item["id"], item["baseline"]) for item in read] == [(item["id"], item["baseline"]) for item in measured]
    assert all(item["task"]["name"] == "chain_sum" and item["solution"].startswith(" = ") for item in read)
    assert recipe.recipe.algorithm.requires >= {"item.baseline"}  # type: ignore[attr-defined]


def test_greedy_members_measure_the_baseline_of_a_run_that_is_resumed(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = {
        "base": "quickstart",
        "out": str(tmp_path / "run"),
        "algorithm": {"preset": "remax"},
        "schedule": {"type": "april", "over_provision": 2.0, "max_lag_steps": 2},
        "batch": {"groups_per_step": 2, "group_size": 3},
        "sampling": {"max_new_tokens": 24},
        "evaluation": {"num_problems": 4},
    }
    april.train({**recipe, "steps": 2})
    resumed = april.train({**recipe, "steps": 4}, resume=True)
    groups = [json.loads(line) for line in (tmp_path / "run" / "lengths.jsonl").read_text().splitlines()]
    assert len(groups) == 8 and all(len(group["tokens"]) == 3 for group in groups)
    assert resumed.summary["ledger_balanced"] and resumed.summary["ledger"]["counts"]["trained"] == 4 * 2 * (3 + 1)
    assert resumed.summary["samples_trained"] == 4 * 2 * 3
