"""The benchmark of what a step costs outside the model: it measures the whole pipeline, on a step of the asked size."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from april.algorithms.spec import AlgorithmConfig
from april.bench.columns_bench import ColumnsOptions, make_step, run_columns_bench
from april.training.batch import assemble


def options(**changes: Any) -> ColumnsOptions:
    algorithm = AlgorithmConfig.model_validate({"weights": {"tis": {}}, "penalties": {"k3": {}}})
    return ColumnsOptions(algorithm, **({"tokens": 3000, "samples": 64, "rounds": 2, "threads": 1} | changes))


def test_every_stage_is_measured_and_adds_up() -> None:
    result = run_columns_bench(options(micro_batch_tokens=1000))
    stages = {"assemble", "credit", "batch_metrics", "stage", "micro_batches", "take", "loss", "loss_metrics"}
    assert set(result["stages_s"]) == stages and min(result["stages_s"].values()) > 0
    assert len(result["rounds_s"]) == 2 and result["total_s"] > 0 and result["cpu_s"] > 0
    assert result["num_samples"] == 64 and 2800 < result["num_tokens"] < 3200
    json.dumps(result)


def test_the_step_has_stale_tokens_of_two_ages_and_groups_with_and_without_signal() -> None:
    batch = make_step(options())
    tokens = assemble(batch).tokens
    assert set(tokens["lag"].tolist()) == {0, 2} and tokens.layout.num_groups == 8
    assert 0 < float(tokens["reward"].mean()) < 1 and not tokens["entropy"].isnan().any()
    again = assemble(make_step(options())).tokens
    assert torch.equal(tokens["behaviour"], again["behaviour"])


def test_from_the_command_line(capfd: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from april.cli.bench import app

    sizes = {"--preset": "grpo,ppo", "--tokens": "2000", "--samples": "32", "--rounds": "1", "--threads": "1"}
    found = CliRunner().invoke(app, ["columns", *(word for pair in sizes.items() for word in pair), "--json"])
    out = found.stdout + capfd.readouterr().out
    results = json.loads(out.strip().splitlines()[-1])["results"]
    assert [result["algorithm"] for result in results] == ["grpo", "ppo"] and found.exit_code == 0
