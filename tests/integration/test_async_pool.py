"""Two engines behind one in a real run: one of them dies, the other goes on, and nothing is lost."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from april.observe.status import read_status, status_lines
from april.run.loop import Run
from tests.integration.test_async_processes import APRIL, SYNC, check_whole, rows_of, run_witnessed

POOL = ("engine.replicas=2", "engine.steps_per_poll=1", "engine.report_every_tokens=4", "evaluation.modes=[]")


def test_two_engines_in_one_process_share_the_samples(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run, _ = run_witnessed(folder, *SYNC, *POOL)
    check_whole(folder)
    shares = [member.numbers[3] for member in run.parts.engine._members.values()]  # type: ignore[attr-defined]
    assert min(shares) > 0.2 * sum(shares) > 0
    assert rows_of(folder)[-1]["tokens_generated"] == sum(shares)
    record = read_status(folder)
    assert (record["state"], record["step"], record["ledger"]["balanced"]) == ("finished", 3, True)


@pytest.mark.slow
def test_one_of_two_engines_is_killed_and_the_other_goes_on(tmp_path: Path) -> None:
    folder, seen = tmp_path / "run", dict[str, Any]()

    def kill(run: Run, num_finished: int) -> None:
        if num_finished == 20 and not seen:
            run.status.write()
            seen["lines"] = status_lines(read_status(folder))
            members = run.parts.engine.engines  # type: ignore[attr-defined]
            seen["pid"] = members["embedded 1"].pid
            os.kill(seen["pid"], signal.SIGKILL)

    run, witness = run_witnessed(folder, *APRIL, *POOL, "engine.process=child", then=kill)
    check_whole(folder)
    text = "\n".join(seen["lines"])
    assert "engine embedded 0: serving" in text and f"process {seen['pid']}" in text
    assert "waits: generate" in text, "who waits for what, while it runs"
    assert witness.lost and run.parts.engine.num_restarts == 1  # type: ignore[attr-defined]
    assert any("ended by SIGKILL" in loss for loss in read_status(folder)["losses"])
