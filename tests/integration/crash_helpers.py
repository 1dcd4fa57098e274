"""Runs in forked processes that are killed, and what they must have left behind."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

SMALL = (
    "steps=4",
    "task.size=200",
    "sampling.max_new_tokens=96",
    "batch.groups_per_step=4",
    "batch.group_size=4",
    "engine.report_every_tokens=8",
    "engine.steps_per_poll=4",
    "engine.max_running=24",
    "evaluation.num_problems=8",
    "evaluation.modes=['greedy']",
    "checkpoint.every_steps=2",
    "observe.transcripts_every_steps=0",
)


def recipe_for(folder: Path, *overrides: str) -> Any:
    """The quickstart, small enough to be run many times."""
    from april.config.resolve import resolve

    return resolve("quickstart", overrides=[*SMALL, f"out='{folder}'", *overrides])


def run_logged(folder: Path, resume: bool, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Run and write (step, sample ids) of every update to updates.jsonl, also of those that are done again."""
    from april.run.loop import Run
    from april.training.single import Trainer

    torch.set_num_threads(1)
    plain_update = Trainer.update

    def update(self: Trainer, batch: Any) -> Any:
        ids = [str(sample.id) for group in batch.groups for sample, _ in group.rewarded]
        with (folder / "updates.jsonl").open("a") as out:
            out.write(json.dumps({"step": batch.step, "ids": ids, "version": batch.version}) + "\n")
        return plain_update(self, batch)

    Trainer.update = update  # type: ignore[method-assign]
    try:
        return Run(recipe_for(folder, *overrides), resume=resume, quiet=None).run().summary
    finally:
        Trainer.update = plain_update  # type: ignore[method-assign]


def progress_of(folder: Path) -> int:
    """Bytes that a run has written so far: grows with every batch of events."""
    files = [*folder.glob("journal/*.bin"), folder / "metrics.jsonl", folder / "updates.jsonl", folder / "timeline.jsonl"]
    sizes = []
    for file in files:
        try:
            sizes.append(file.stat().st_size)
        except FileNotFoundError:
            continue
    return sum(sizes) + 4096 * sum(1 for _ in folder.glob("checkpoints/step-*"))


def run_and_kill(folder: Path, resume: bool, overrides: tuple[str, ...], after_bytes: int) -> bool:
    """Run in a child and SIGKILL it once it has written that much more; True when the kill came before its end."""
    folder.mkdir(parents=True, exist_ok=True)
    start = progress_of(folder)
    child = multiprocessing.get_context("fork").Process(target=run_logged, args=(folder, resume, overrides), daemon=True)
    child.start()
    while child.is_alive() and progress_of(folder) < start + after_bytes:
        child.join(0.002)
    if child.is_alive():
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        return True
    assert child.exitcode == 0, "the run died by itself"
    return False


def check_updates(folder: Path, steps: int) -> int:
    """Every step was trained on one set of samples, however often it was done again, and no sample in two steps.

    Returns:
        the number of distinct samples trained.
    """
    by_step: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    for line in (folder / "updates.jsonl").read_text().splitlines():
        record = json.loads(line)
        by_step[record["step"]].add(tuple(record["ids"]))
    assert sorted(by_step) == list(range(steps)), "a step is missing"
    assert all(len(sets) == 1 for sets in by_step.values()), "a step was done again on other samples"
    ids = [sample for sets in by_step.values() for sample in next(iter(sets))]
    assert len(ids) == len(set(ids)), "a sample was trained in two steps"
    return len(ids)


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint."""
    newest = sorted((folder / "checkpoints").glob("step-*"))[-1]
    return torch.load(newest / "trainer.pt", weights_only=True)["weights"]  # type: ignore[no-any-return]
