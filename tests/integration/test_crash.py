"""SIGKILL at any moment: no rollout lost, none trained twice; synchronous runs end bit for bit as if nothing had happened."""

from __future__ import annotations

import json
import random
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from april.observe.sinks import read_jsonl
from tests.integration.crash_helpers import check_updates, final_weights, recipe_for, run_and_kill, run_logged

SYNC = ("schedule.type=sync",)
APRIL = ("schedule.over_provision=1.5", "schedule.max_lag_steps=2")
BOUNDED = ("schedule.type=bounded_async", "schedule.max_lag_steps=2")


@pytest.fixture(scope="module")
def whole_sync(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted synchronous run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    folder.mkdir()
    run_logged(folder, False, SYNC)
    return folder


def killed_run(folder: Path, overrides: tuple[str, ...], seed: int, kills: int) -> int:
    """Kill a run `kills` times at seeded moments, then let it finish; returns how many kills came in time."""
    moments = random.Random(seed)
    killed, resume = 0, False
    for _ in range(kills):
        killed += run_and_kill(folder, resume, overrides, moments.randrange(1, 40_000))
        resume = (folder / "recipe.toml").exists()
    run_logged(folder, resume, overrides)
    return killed


def check_whole(folder: Path) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    counts = summary["ledger"]["counts"]
    assert summary["ledger_balanced"] and summary["ledger"]["issued"] == sum(counts.values())
    assert check_updates(folder, 4) == counts["trained"] == 64
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3], "metrics hold each step once"


def same_bits(one: Path, other: Path) -> bool:
    first, second = final_weights(one), final_weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_synchronous_run_killed_five_times_ends_bit_for_bit_like_the_whole_one(tmp_path: Path, whole_sync: Path) -> None:
    folder = tmp_path / "run"
    assert killed_run(folder, SYNC, seed=1, kills=5) >= 3, "most kills must come before the end, or this shows nothing"
    check_whole(folder)
    assert same_bits(folder, whole_sync)


def test_a_partial_rollout_run_killed_five_times_loses_and_repeats_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert killed_run(folder, APRIL, seed=2, kills=5) >= 3, "most kills must come before the end, or this shows nothing"
    check_whole(folder)


def test_the_comparison_of_weights_can_fail(tmp_path: Path, whole_sync: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    run_logged(folder, False, (*SYNC, "seed=1"))
    assert not same_bits(folder, whole_sync)


def test_updates_behind_the_newest_checkpoint_are_done_again(tmp_path: Path, whole_sync: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole_sync, folder)
    last = sorted((folder / "checkpoints").glob("step-*"))[-1]
    assert last.name == "step-000004"
    shutil.rmtree(last)  # as if the crash had come before it was written; its journal is the one of step 2
    run_logged(folder, True, SYNC)
    assert same_bits(folder, whole_sync)
    check_updates(folder, 4)


def test_without_a_journal_the_records_are_those_of_the_steps_that_count(tmp_path: Path) -> None:
    folder, overrides = tmp_path / "run", (*SYNC, "checkpoint.journal=false", "observe.transcripts_every_steps=1")
    folder.mkdir()
    run_logged(folder, False, overrides)
    before = {name: read_jsonl(folder / f"{name}.jsonl") for name in ("metrics", "evaluations", "lengths", "timeline")}
    shutil.rmtree(folder / "checkpoints" / "step-000004")  # as if the crash had come before it was written
    run_logged(folder, True, (*overrides, "training.lr=1e-9"))
    metrics, evaluations, lengths, timeline = (read_jsonl(folder / f"{name}.jsonl") for name in before)
    assert metrics[:2] == before["metrics"][:2] and [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert metrics[1]["lr"] > 1e-6 > 1e-9 >= metrics[2]["lr"] > 0 and metrics[3]["time_s"] > metrics[2]["time_s"]
    assert [record["step"] for record in evaluations] == [0, 4] and evaluations[0] == before["evaluations"][0]
    assert evaluations[1]["time_s"] > metrics[3]["time_s"]
    assert [record["step"] for record in lengths] == [step for step in range(4) for _ in range(4)]
    texts = [(record["source"], record["step"]) for record in read_jsonl(folder / "transcripts.jsonl")]
    assert len(texts) == 8 and {("train", step) for step in range(4)} == set(texts)
    spans = [record for record in timeline if record.get("track") == "driver"]
    assert all(one["end_s"] <= other["start_s"] for one, other in pairwise(spans)), "nothing runs twice at once"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 12))
@pytest.mark.parametrize("schedule", [SYNC, APRIL, BOUNDED], ids=["sync", "april", "bounded_async"])
def test_killed_at_many_more_moments(tmp_path: Path, whole_sync: Path, schedule: tuple[str, ...], seed: int) -> None:
    folder = tmp_path / "run"
    killed_run(folder, schedule, seed=seed, kills=5)
    check_whole(folder)
    assert schedule is not SYNC or same_bits(folder, whole_sync)


def test_parked_samples_keep_their_tokens_over_a_crash(tmp_path: Path) -> None:
    from april.run.build import build
    from april.run.resume import restore

    folder = tmp_path / "run"
    run_and_kill(folder, False, APRIL, 9_000)
    parts = build(recipe_for(folder, *APRIL))
    restore(parts)
    kept = sum(len(sample) for state in parts.pool.groups.values() for sample in state.samples.values())
    assert parts.pool.ledger.balanced and parts.pool.num_running == 0
    assert kept > 0, "nothing was written down before the crash"
