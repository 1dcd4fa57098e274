"""Runs that train adapters: in one process, with processes for engine and trainer, on ranks; resumed and evaluated."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from april.api import evaluate, export
from april.core.errors import CheckpointError
from april.models.policy import Policy
from april.run.loop import Run
from tests.integration.crash_helpers import recipe_for

pytestmark = pytest.mark.slow
LORA = ("training.lora.rank=2", "training.lora.alpha=8", "training.lr=2e-3", "schedule.type=sync", "steps=3")
FLOAT64 = ("training.dtype=float64",)
CHILDREN = ("training.process=child", "engine.process=child", "training.threads=1", "engine.threads=1")


def run(folder: Path, *overrides: str) -> Run:
    torch.set_num_threads(1)
    found = Run(recipe_for(folder, *LORA, *overrides), resume=(folder / "recipe.toml").exists(), quiet=None)
    found.run()
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "adapter" / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("lora") / "run"
    run(folder, *FLOAT64)
    return folder


def test_the_engine_serves_what_is_trained(alone: Path) -> None:
    assert [row["step"] for row in rows(alone)] == [0, 1, 2]
    assert all(row["mismatch_abs_max"] < 1e-6 and row["grad_norm"] > 0 for row in rows(alone))
    assert float(max(tensor.abs().max() for name, tensor in adapters(alone).items() if "lora_B" in name)) > 1e-4


@pytest.mark.parametrize("transport", ["disk", "broadcast"])
def test_adapters_go_through_every_transport(alone: Path, tmp_path: Path, transport: str) -> None:
    run(tmp_path / "run", *FLOAT64, *CHILDREN, f"publishing.transport={transport}")
    found, expected = adapters(tmp_path / "run"), adapters(alone)
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-9


def test_other_processes_get_adapters_only_and_make_the_same_run(alone: Path, tmp_path: Path) -> None:
    run(tmp_path / "lora", *FLOAT64, *CHILDREN)
    found, expected = adapters(tmp_path / "lora"), adapters(alone)
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-9
    run(tmp_path / "full", *FLOAT64, *CHILDREN, "training.lora=false")  # the same recipe, all weights
    num_bytes = [rows(tmp_path / name)[-1]["weights_bytes"] for name in ("lora", "full")]
    assert 0 < num_bytes[0] < 0.1 * num_bytes[1], num_bytes


def test_two_ranks_make_the_run_of_one_process(alone: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", *FLOAT64, "training.ranks=2", "training.threads=1")
    found, expected = adapters(tmp_path / "run"), adapters(alone)
    assert max(float((found[name] - expected[name]).abs().max()) for name in expected) < 1e-9


def test_a_run_is_continued_bit_for_bit(alone: Path, tmp_path: Path) -> None:
    run(tmp_path / "run", *FLOAT64, "steps=2")
    run(tmp_path / "run", *FLOAT64)
    found, expected = adapters(tmp_path / "run"), adapters(alone)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_checkpoint_is_evaluated_with_its_adapters(alone: Path) -> None:
    last = [json.loads(line) for line in (alone / "evaluations.jsonl").read_text().splitlines()][-1]
    (found,) = evaluate(str(alone))
    assert last["step"] == 3 and found.accuracy == last["accuracy"]
    assert found.to_record(3, 0.0)["length_mean"] == last["length_mean"]
    (base,) = evaluate(str(alone), model="packaged")
    assert any(
        (a.token_ids.shape != b.token_ids.shape) or (a.token_ids != b.token_ids).any()
        for a, b in zip(base.samples, found.samples, strict=True)
    )


def test_an_export_is_what_transformers_loads(alone: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = export(alone, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = Policy.load(sorted((alone / "checkpoints").glob("step-*"))[-1] / "adapter")
    ids = AutoTokenizer.from_pretrained(folder)("3 + 4 - 5", return_tensors="pt").input_ids
    base = Policy.load(str(files("april") / "assets" / "policy"))
    with torch.no_grad():
        logits, expected, before = (one(ids).logits for one in (theirs, ours.module, base.module))
    assert torch.equal(logits, expected) and not torch.allclose(logits, before, atol=1e-3)
    assert "adapter_config.json" not in {path.name for path in folder.iterdir()}
    (found,) = evaluate(str(alone), model=folder)
    assert found.accuracy == evaluate(str(alone))[0].accuracy
    with pytest.raises(CheckpointError, match="in use"):
        export(alone, folder)
