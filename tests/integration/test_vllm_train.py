"""`april train` with a vLLM server that April starts: it trains, serves what was published, and costs nothing when it dies."""

from __future__ import annotations

import importlib.util
import os
import signal
from pathlib import Path

import pytest
import torch

from april.run.loop import Run
from tests.integration.crash_helpers import recipe_for
from tests.integration.test_async_processes import APRIL, SYNC, Witness, check_whole, log_updates, rows_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the extra april-rl[vllm] is not installed"),
    pytest.mark.filterwarnings("ignore"),
]
SERVER = ("engine.type=vllm_server", "engine.max_running=24", "engine.kv_tokens=8192", "evaluation.modes=[]")


def processes(parent: int) -> list[int]:
    """All processes below one, nearest first."""
    below: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                above = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            below.setdefault(above, []).append(int(folder.name))
    found = list(below.get(parent, ()))
    for pid in found:
        found += below.get(pid, ())
    return found


def alive(pid: int) -> bool:
    """Whether a process is there and not a mere entry for its parent."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def test_a_server_trains_and_serves_what_was_published(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    folder = tmp_path / "run"
    folder.mkdir()
    run = Run(recipe_for(folder, *SYNC, *SERVER, "training.lr=1e-3"), quiet=None)
    log_updates(run, folder)
    run.run()
    check_whole(folder)
    rows = rows_of(folder)
    assert [row["mismatch_abs_max"] < 2e-3 for row in rows] == [True] * 3, "the trainer's log-probs of each version's own tokens"
    assert all(row["grad_norm"] > 0 for row in rows)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("number", "told"), [(signal.SIGKILL, "the server ended"), (signal.SIGSTOP, "the server said nothing for")]
)
def test_a_server_that_dies_or_hangs_is_replaced(tmp_path: Path, number: signal.Signals, told: str) -> None:
    """The API server itself, below April's process: what it had streamed stays, and another server goes on."""
    torch.set_num_threads(1)
    folder, former = tmp_path / "run", list[int]()
    folder.mkdir()
    options = ("engine.report_every_tokens=4", "engine.stream_every_tokens=2", "engine.silence_s=20")
    run = Run(recipe_for(folder, *APRIL, *SERVER, *options), quiet=None)

    def hurt(num_finished: int) -> None:
        if num_finished >= 16 and not former and run.parts.engine.load().running >= 8:
            former.extend(processes(run.parts.engine.pid))  # type: ignore[attr-defined]
            for pid in former[1:]:  # the first one watches over the others
                os.kill(pid, number)

    witness = Witness(run, hurt)
    log_updates(run, folder)
    run.run()
    assert len(former) >= 3, "the guard, the API server, its engine core"
    assert told in "; ".join(run.parts.engine.all_losses)  # type: ignore[attr-defined]
    check_whole(folder)
    assert witness.lost and run.parts.engine.num_restarts >= 1  # type: ignore[attr-defined]
    assert not any(map(alive, former)), "nothing of the former server is left"
