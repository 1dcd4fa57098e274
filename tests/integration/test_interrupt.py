"""SIGINT and SIGTERM: the first stops cleanly with a checkpoint, the second at once; both can be continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from april.engines.embedded.engine import EmbeddedEngine
from april.run.telemetry import Telemetry
from tests.integration.command_helpers import Call, caller, tiny

LONGER = "steps=4", "checkpoint.every_steps=3"


@pytest.fixture
def call(capfd: pytest.CaptureFixture[str]) -> Call:
    return caller(capfd)


def signal_at_step(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: signal.Signals) -> None:
    """Send this process signals as soon as a step is written down, once."""
    plain, sent = Telemetry.trained, []

    def trained(self: Telemetry, batch: object, row: dict[str, object]) -> None:
        plain(self, batch, row)  # type: ignore[arg-type]
        if row["step"] == step and not sent:
            sent.append(step)
            for number in numbers:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(Telemetry, "trained", trained)


def check_finished(call: Call, folder: Path) -> None:
    """Resume the run; it ends with every step done once and every sample accounted for."""
    resumed = call("train", folder, "--resume", "--json")
    assert resumed.code == 0, resumed.err
    summary, ledger = resumed.json, resumed.json["ledger"]
    assert summary["ledger_balanced"] is True and ledger["issued"] == sum(ledger["counts"].values())
    assert summary["steps"] == 4 and summary["samples_trained"] == ledger["counts"]["trained"] == 32
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [0, 1, 2, 3]
    assert summary["accuracy_before"] is not None and summary["accuracy_after_greedy"] is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_stops_with_a_checkpoint(
    number: signal.Signals, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    signal_at_step(monkeypatch, 1, number)
    before = signal.getsignal(number)
    stopped = call("train", *tiny(folder, *LONGER), "--json")
    assert stopped.code == 130 and stopped.json["interrupted"] is True and stopped.json["steps"] == 2
    assert "stopping after the next event" in stopped.err and f"`april train --resume {folder}` goes on" in stopped.err
    assert json.loads((folder / "summary.json").read_text())["ledger_balanced"] is True and (folder / "report.html").exists()
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    assert stopped.json["ledger"]["counts"]["running"] == 0 and stopped.json["ledger"]["issued"] > 16, "work was in flight"
    assert signal.getsignal(number) is before
    check_finished(call, folder)


def test_two_signals_end_at_once_and_the_journal_goes_on(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    signal_at_step(monkeypatch, 1, signal.SIGINT, signal.SIGINT)
    stopped = call("train", *tiny(folder, *LONGER))
    assert stopped.code == 130 and "ended at once" in stopped.out and str(folder) in stopped.out
    assert "Traceback" not in stopped.err and not (folder / "summary.json").exists()
    assert not list((folder / "checkpoints").glob("*")), "there is only the journal to go on from"
    check_finished(call, folder)


def test_a_signal_stops_an_evaluation_too(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, plain, submitted = tmp_path / "run", EmbeddedEngine.submit, []

    def submit(self: EmbeddedEngine, samples: list[object]) -> None:
        submitted.append(len(samples))
        plain(self, samples)  # type: ignore[arg-type]
        if len(submitted) == 2:  # the second mode of the first evaluation
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(EmbeddedEngine, "submit", submit)
    stopped = call("train", *tiny(folder, *LONGER), "--json")
    assert stopped.code == 130 and stopped.json["steps"] == 0 and stopped.json["ledger"]["issued"] == 0
    assert [json.loads(line)["mode"] for line in (folder / "evaluations.jsonl").read_text().splitlines()] == ["greedy"]
    check_finished(call, folder)
    records = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()]
    assert [(r["step"], r["mode"]) for r in records] == [(0, "greedy"), (0, "sampled"), (4, "greedy"), (4, "sampled")]


def test_a_process_on_its_own_obeys(call: Call, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = tiny(folder, "steps=4000", "checkpoint.every_steps=0", "observe.timeline=false")
    process = subprocess.Popen(
        [sys.executable, "-m", "april", "train", *arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 2/"):
            break
    process.send_signal(signal.SIGINT)
    out, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert json.loads(out)["accuracy_before"] is not None and json.loads(out)["accuracy_after"] is None
    assert json.loads(out)["interrupted"] is True and len(out.splitlines()) == 1
    assert json.loads((folder / "summary.json").read_text())["steps"] >= 2
    steps = json.loads(out)["steps"] + 1
    resumed = call("train", folder, f"steps={steps}", "--resume", "--json")
    assert resumed.code == 0 and resumed.json["steps"] == steps and resumed.json["ledger_balanced"] is True
