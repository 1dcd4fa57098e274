"""Trainer and engine in processes of their own: the same run, also when one of them, or all of it, is killed in the middle."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from april.core.errors import ProcessError
from april.core.event import Event, Finished
from april.core.ids import SampleId
from april.run.loop import Run
from tests.integration.crash_helpers import check_updates, final_weights, progress_of, recipe_for

SMALL = ("steps=3", "checkpoint.every_steps=2", "limits.restart_pause_s=0")
SYNC = ("schedule.type=sync", *SMALL)
BOTH = ("training.process=child", "engine.process=child")
APRIL = ("schedule.over_provision=1.5", "schedule.max_lag_steps=2", *SMALL)
BOUNDED = ("schedule.type=bounded_async", "schedule.max_lag_steps=2", *SMALL)


class Witness:
    """Writes down all tokens, and calls somebody after each event."""

    def __init__(self, run: Run, then: Callable[[int], None] = lambda _num_finished: None) -> None:
        self.tokens: dict[str, list[int]] = {}
        self.lost: list[SampleId] = []
        self.num_finished, self.then = 0, then
        run.parts.driver.watcher = self
        journal = run.parts.pool.listener

        def listener(name: str, arguments: dict[str, Any]) -> None:
            if name == "lose":
                self.lost.append(arguments["sample"])
            journal(name, arguments)

        run.parts.pool.listener = listener

    def on_start(self, samples: Sequence[SampleId], time_s: float) -> None:
        pass

    def on_event(self, event: Event) -> None:
        segment = getattr(event, "segment", None)
        if segment is not None:
            self.tokens.setdefault(str(event.id), []).extend(segment.token_ids.tolist())  # type: ignore[union-attr]
        if isinstance(event, Finished):
            self.num_finished += 1
            self.then(self.num_finished)


def run_witnessed(folder: Path, *overrides: str, then: Callable[[Run, int], None] = lambda _run, _n: None) -> tuple[Run, Witness]:
    """Run to the end; updates.jsonl has every batch that was handed to the trainer."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(recipe_for(folder, *overrides), resume=(folder / "recipe.toml").exists(), quiet=None)
    witness = Witness(run, lambda num_finished: then(run, num_finished))
    log_updates(run, folder)
    run.run()
    return run, witness


def log_updates(run: Run, folder: Path) -> None:
    plain_submit = run.parts.trainer.submit

    def submit(batch: Any) -> None:
        ids = [str(sample.id) for group in batch.groups for sample, _ in group.rewarded]
        with (folder / "updates.jsonl").open("a") as out:
            out.write(json.dumps({"step": batch.step, "ids": ids, "version": batch.version}) + "\n")
        plain_submit(batch)

    run.parts.trainer.submit = submit  # type: ignore[method-assign]


def check_whole(folder: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    counts = summary["ledger"]["counts"]
    assert summary["ledger_balanced"] and summary["ledger"]["issued"] == sum(counts.values())
    assert check_updates(folder, 3) == counts["trained"] == 48
    return summary


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]]]:
    """A synchronous run with everything in one process, and its tokens."""
    folder = tmp_path_factory.mktemp("one") / "run"
    return folder, run_witnessed(folder, *SYNC)[1].tokens


def test_a_synchronous_run_is_the_same_in_one_process_and_in_three(
    tmp_path: Path, one_process: tuple[Path, dict[str, list[int]]]
) -> None:
    folder = tmp_path / "run"
    run, witness = run_witnessed(folder, *SYNC, *BOTH)
    whole, tokens = one_process
    assert witness.tokens == tokens
    first, second = final_weights(whole), final_weights(folder)
    assert all(torch.equal(first[name], second[name]) for name in first)
    check_whole(folder)
    rows = rows_of(folder)
    assert all(row["weights_bytes"] > 1e6 and row["weights_write_s"] > 0 and row["weights_read_s"] > 0 for row in rows)
    assert [row["overlap_tokens"] for row in rows] == [0, 0, 0], "a synchronous schedule starts nothing during an update"
    assert run.parts.trainer.pid is None and run.parts.engine.pid is None, "no process is left"  # type: ignore[union-attr,attr-defined]


def test_a_trainer_killed_in_an_update_changes_no_bit(tmp_path: Path, one_process: tuple[Path, dict[str, list[int]]]) -> None:
    """Killed in the last update: the checkpoint of step 2 and the batch are all that is left."""
    folder, pids = tmp_path / "run", []
    folder.mkdir()
    run = Run(recipe_for(folder, *SYNC, "training.process=child"), quiet=None)
    log_updates(run, folder)
    submit = run.parts.trainer.submit

    def submit_and_kill(batch: Any) -> None:
        submit(batch)
        if batch.step == 2:
            pids.append(run.parts.trainer.pid)  # type: ignore[union-attr]
            os.kill(pids[0], signal.SIGKILL)

    run.parts.trainer.submit = submit_and_kill  # type: ignore[method-assign]
    run.run()
    first, second = final_weights(one_process[0]), final_weights(folder)
    assert pids and all(torch.equal(first[name], second[name]) for name in first)
    check_whole(folder)


@pytest.mark.parametrize(
    ("schedule", "how"),
    [
        (APRIL, signal.SIGKILL),
        pytest.param(BOUNDED, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(APRIL, signal.SIGSTOP, marks=pytest.mark.slow),
        pytest.param(SYNC, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
    ids=["april-kill", "bounded_async-kill", "april-hang", "sync-hang"],
)
def test_an_engine_killed_in_the_middle_costs_no_sample(tmp_path: Path, schedule: tuple[str, ...], how: signal.Signals) -> None:
    folder, hurt = tmp_path / "run", []

    def kill(run: Run, num_finished: int) -> None:
        if num_finished == 20 and not hurt:
            hurt.append((run.parts.engine.pid, len(run.parts.pool.running)))  # type: ignore[attr-defined]
            os.kill(hurt[0][0], how)

    options = ("engine.process=child", "engine.steps_per_poll=1", "engine.report_every_tokens=4")
    options += ("limits.engine_silence_s=8",) if how is signal.SIGSTOP else ()
    run, witness = run_witnessed(folder, *schedule, *options, then=kill)
    assert hurt and hurt[0][1] > 1, "samples must run when it is hurt, or this shows nothing"
    assert run.parts.engine.num_restarts >= 1  # type: ignore[attr-defined]
    lost = [len(witness.tokens.get(str(sample), ())) for sample in witness.lost]
    assert lost and max(lost) > 0, "the journal has the losses; what was streamed is kept"
    check_whole(folder)


@pytest.mark.slow
def test_with_fail_a_lost_engine_ends_the_run_and_it_can_be_resumed(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def kill(run: Run, num_finished: int) -> None:
        if num_finished == 20:
            os.kill(run.parts.engine.pid, signal.SIGKILL)  # type: ignore[attr-defined]

    with pytest.raises(ProcessError, match="ended by SIGKILL"):
        run_witnessed(folder, *APRIL, "engine.process=child", "engine.steps_per_poll=1", "limits.on_engine_loss=fail", then=kill)
    run_witnessed(folder, *APRIL)  # continued in one process: where a part computes is no part of the run's state
    check_whole(folder)


def run_in_child(folder: Path, overrides: tuple[str, ...]) -> None:
    run_witnessed(folder, *overrides)


def test_a_whole_run_killed_with_its_processes_is_resumed(tmp_path: Path) -> None:
    folder, overrides = tmp_path / "run", (*BOUNDED, "training.process=child")
    folder.mkdir()
    killed = 0
    for after_bytes in (2_000, 12_000):
        child = multiprocessing.get_context("fork").Process(target=run_in_child, args=(folder, overrides))
        start = progress_of(folder)
        child.start()
        while child.is_alive() and progress_of(folder) < start + after_bytes:
            child.join(0.002)
        killed += child.is_alive()
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
    assert killed, "a kill must come before the end, or this shows nothing"
    run_witnessed(folder, *overrides)
    check_whole(folder)
