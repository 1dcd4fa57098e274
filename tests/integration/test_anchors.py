"""Baselines measured before training, and a run that reads them."""

from __future__ import annotations

from pathlib import Path

import torch

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
    recipe = resolve("quickstart", overrides=[*overrides, f'task={{type="jsonl",path="{out}"}}', "algorithm.preset=remax"])
    read = task_of(recipe.recipe).load()  # type: ignore[arg-type]
    assert [(item["id"], item["baseline"]) for item in read] == [(item["id"], item["baseline"]) for item in measured]
    assert all(item["task"]["name"] == "chain_sum" and item["solution"].startswith(" = ") for item in read)
    assert recipe.recipe.algorithm.requires >= {"item.baseline"}  # type: ignore[attr-defined]
