"""What the console says about a recipe while it runs, and how often."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from april.config.recipe import ObserveConfig
from april.core.clock import VirtualClock
from april.core.group import Batch
from april.run.telemetry import NOTE_EVERY_STEPS, Telemetry

ROW: dict[str, Any] = {
    "parked_samples": 0,
    "time_s": 1.0,
    "num_groups": 10.0,
    "no_signal_groups": 8.0,
    "group_size": 2.0,
    "advised_group_size": 8.0,
    "advised_no_signal_fraction": 0.3,
    "clip_fraction": 0.01,
}


def told(folder: Path, rows: list[dict[str, Any]], **options: Any) -> list[str]:
    observe = ObserveConfig(timeline=False, transcripts_every_steps=0)
    options |= {"steps": 99, "first_step": 0, "decode": str, "observe": observe, "quiet": None}
    telemetry = Telemetry(folder, VirtualClock(), title="t", **options)
    lines: list[str] = []
    telemetry.view.note = lines.append  # type: ignore[method-assign]
    for step, row in enumerate(rows):
        telemetry.trained(Batch(step, step, ()), {**row, "step": step})
    telemetry.close()
    return lines


def test_a_note_comes_once_and_again_after_some_steps(tmp_path: Path) -> None:
    lines = told(tmp_path, [ROW] * (NOTE_EVERY_STEPS + 2))
    sentence = "8 of 10 groups carry no signal at this pass rate with group size 2; 8 would leave 3"
    assert lines == [f"step 1: {sentence}", f"step {NOTE_EVERY_STEPS + 1}: {sentence}"]


def test_each_kind_of_note_has_its_own_turn_and_good_steps_have_none(tmp_path: Path) -> None:
    good = {**ROW, "no_signal_groups": 2.0}
    lines = told(tmp_path, [good, ROW, {**good, "clip_fraction": 0.9}, {**ROW, "clip_fraction": 0.9}])
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 3"] and "clipped" in lines[1]


def test_whole_samples_are_often_clipped_and_nobody_is_told(tmp_path: Path) -> None:
    clipped = {**ROW, "no_signal_groups": 2.0, "clip_fraction": 0.6}
    assert told(tmp_path / "gspo", [clipped], clips_samples=True) == []
    assert len(told(tmp_path / "grpo", [clipped])) == 1
