"""The command line, called in this process, on runs of a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

TINY = (
    "steps=2",
    "task.size=60",
    "evaluation_task.size=20",
    "sampling.max_new_tokens=48",
    "batch.groups_per_step=2",
    "batch.group_size=4",
    "engine.max_running=16",
    "engine.report_every_tokens=8",
    "engine.steps_per_poll=4",
    "evaluation.num_problems=4",
    "checkpoint.every_steps=1",
)
LABELS = ("where:", "got:", "expected:", "next:")


@dataclass(frozen=True)
class Called:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one line on standard output."""
        lines = self.out.splitlines()
        assert len(lines) == 1, f"standard output must be one line of JSON, got {lines[:5]}"
        return json.loads(lines[0])


Call = Callable[..., Called]


def caller(capfd: pytest.CaptureFixture[str]) -> Call:
    """`call("train", "quickstart", ...)` runs `april train quickstart ...`."""
    from april.cli.main import main

    def call(*arguments: object) -> Called:
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Called(int(stop.value.code or 0), captured.out, captured.err)

    return call


def tiny(folder: Path, *overrides: str) -> list[str]:
    """Arguments of a run of about a second."""
    return ["quickstart", *TINY, f"out={folder}", *overrides]


def check_one_screen(called: Called, *texts: str) -> None:
    """No traceback, at most 12 lines, every label, and each of the texts."""
    assert called.code == 2 and called.out == "", called
    lines = called.err.splitlines()
    assert len(lines) <= 12 and lines[0].startswith("error: ") and "Traceback" not in called.err, called.err
    for label in LABELS:
        assert sum(line.strip().startswith(label) for line in lines) == 1, f"{label} is missing or twice:\n{called.err}"
    for text in texts:
        assert text in called.err, called.err
