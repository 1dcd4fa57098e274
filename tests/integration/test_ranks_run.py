"""Runs whose trainer has two ranks: as one process does it, also when a rank is killed or hangs in the middle of an update."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from april.core.errors import ProcessError
from april.run.loop import Run
from tests.integration.crash_helpers import check_updates, recipe_for

pytestmark = pytest.mark.slow
SYNC = ("schedule.type=sync", "steps=3", "checkpoint.every_steps=2", "training.dtype=float64", "limits.restart_pause_s=0")
RANKS = ("training.ranks=2", "training.threads=1")


def run_logged(folder: Path, *overrides: str, hurt: tuple[int, signal.Signals] | None = None) -> Run:
    """Run to the end, or to the error; `hurt` is a step and what rank 1 gets in its update."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(recipe_for(folder, *SYNC, *overrides), resume=(folder / "recipe.toml").exists(), quiet=None)
    plain = run.parts.trainer.submit

    def submit(batch: Any) -> None:
        ids = [str(sample.id) for group in batch.groups for sample, _ in group.rewarded]
        with (folder / "updates.jsonl").open("a") as out:
            out.write(json.dumps({"step": batch.step, "ids": ids, "version": batch.version}) + "\n")
        plain(batch)
        if hurt is not None and batch.step == hurt[0]:
            os.kill(run.parts.trainer.pids[1], hurt[1])  # type: ignore[union-attr]

    run.parts.trainer.submit = submit  # type: ignore[method-assign]
    run.run()
    return run


def check_whole(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    counts = summary["ledger"]["counts"]
    assert summary["ledger_balanced"] and summary["ledger"]["issued"] == sum(counts.values())
    assert check_updates(folder, 3) == counts["trained"] == 48


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Those of the exported model of the newest checkpoint."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return load_file(newest / "model" / "model.safetensors")


def ids_of(folder: Path) -> list[list[str]]:
    return [json.loads(line)["ids"] for line in (folder / "updates.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("two") / "run"
    run = run_logged(folder, *RANKS)
    assert run.parts.trainer.pids == [], "no process is left"  # type: ignore[union-attr]
    return folder


def test_two_ranks_make_the_run_of_one_process(two_ranks: Path, tmp_path: Path) -> None:
    run_logged(tmp_path / "run")
    first, second = final_weights(tmp_path / "run"), final_weights(two_ranks)
    assert sorted(first) == sorted(second)
    gap = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert gap < 1e-9 and ids_of(tmp_path / "run") == ids_of(two_ranks)
    check_whole(two_ranks)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "hang"])
def test_a_rank_hurt_in_an_update_changes_no_bit(two_ranks: Path, tmp_path: Path, how: signal.Signals) -> None:
    folder = tmp_path / "run"
    limits = ("limits.train_s=20",) if how is signal.SIGSTOP else ()
    run_logged(folder, *RANKS, *limits, hurt=(2, how))
    first, second = final_weights(two_ranks), final_weights(folder)
    assert all(torch.equal(first[name], second[name]) for name in first)
    check_whole(folder)


def test_with_fail_a_lost_rank_ends_the_run_by_name_and_one_process_goes_on(two_ranks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with pytest.raises(ProcessError, match=r"lost a rank: rank 1 \(process \d+\): .*rank 1 ended by SIGKILL"):
        run_logged(folder, *RANKS, "limits.on_trainer_loss=fail", hurt=(2, signal.SIGKILL))
    run_logged(folder)
    first, second = final_weights(two_ranks), final_weights(folder)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-9
    check_whole(folder)
