"""The status of a run: written whole, rarely, and not believed when its process is gone."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from april.core.errors import DataError
from april.observe.status import STATUS_FILE, StatusWriter, read_status, status_lines

FACTS: dict[str, Any] = {
    "name": "sums",
    "step": 3,
    "steps": 10,
    "version": 3,
    "ledger": {"issued": 5, "balanced": True, "counts": {"running": 2, "trained": 3, "failed": 0}},
    "engines": [
        {"name": "embedded 1", "running": 2, "waiting": 0, "version": 3, "process": 77, "restarts": 1, "state": "serving"}
    ],
    "waits": [{"owner": "embedded 1", "stage": "generate", "num": 9, "what": ["g1", "g2"], "for_s": 4.2, "left_s": 115.0}],
    "losses": ["the embedded 1 process 76 ended"],
}


def test_a_running_run_tells_who_waits_for_what(tmp_path: Path) -> None:
    writer = StatusWriter(tmp_path, lambda: FACTS)
    writer.enter("rollout")
    record = read_status(tmp_path)
    assert (record["state"], record["phase"], record["pid"]) == ("running", "rollout", os.getpid())
    text = "\n".join(status_lines(record))
    assert "sums: running" in text and "step 3 of 10, version 3; now: rollout" in text
    assert "5 issued = 2 running, 3 trained" in text and "NOT BALANCED" not in text
    assert "engine embedded 1: serving, version 3, 2 running, 0 waiting, process 77, 1 restarts" in text
    assert "waits: generate: 9 in embedded 1, for 4 s, given up in 115 s: g1, g2 and 7 more" in text
    assert "lost: the embedded 1 process 76 ended" in text
    assert [path.name for path in tmp_path.iterdir()] == [STATUS_FILE], "nothing else is left lying there"


def test_it_is_written_rarely(tmp_path: Path) -> None:
    calls: list[int] = []
    writer = StatusWriter(tmp_path, lambda: {"step": calls.append(1)})
    for _ in range(1000):
        writer.beat()
    assert len(calls) == 1
    writer.write()
    assert len(calls) == 2, "what must be said is said at once"
    writer.enter("rollout")
    assert len(calls) == 2
    writer.enter("checkpoint", at_once=True)
    assert len(calls) == 3 and read_status(tmp_path)["phase"] == "checkpoint"


@pytest.mark.parametrize(("state", "words"), [("finished", "finished"), ("interrupted", "can be resumed"), ("failed", "no disk")])
def test_an_end_is_told_with_its_reason(tmp_path: Path, state: str, words: str) -> None:
    StatusWriter(tmp_path, lambda: FACTS).write(state, "no disk" if state == "failed" else None)
    record = read_status(tmp_path)
    lines = status_lines(record)
    assert record["state"] == state and words in lines[0]
    assert not any("waits" in line for line in lines), "nobody waits any more"


def _write(folder: Path) -> None:
    StatusWriter(folder, lambda: FACTS).write()


def test_a_run_whose_process_is_gone_is_dead(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=_write, args=(tmp_path,))
    child.start()
    child.join()
    record = read_status(tmp_path)
    assert record["state"] == "dead"
    lines = status_lines(record)
    assert "dead" in lines[0] and any("--resume" in line for line in lines)


def test_another_process_with_the_same_number_is_not_the_run(tmp_path: Path) -> None:
    StatusWriter(tmp_path, dict).write()
    path = tmp_path / STATUS_FILE
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "born": "0"}))
    assert read_status(tmp_path)["state"] == "dead"


def test_on_another_machine_only_the_age_is_known(tmp_path: Path) -> None:
    StatusWriter(tmp_path, dict).write()
    path = tmp_path / STATUS_FILE
    record = json.loads(path.read_text()) | {"host": socket.gethostname() + "-2"}
    path.write_text(json.dumps(record))
    assert read_status(tmp_path, record["written_s"] + 5)["state"] == "running"
    assert read_status(tmp_path, record["written_s"] + 500)["state"] == "unknown"


def test_no_run_and_a_broken_file_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no run"):
        read_status(tmp_path)
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(DataError, match="a run without a status"):
        read_status(tmp_path)
    (tmp_path / STATUS_FILE).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_status(tmp_path)


def test_the_command_prints_one_line_of_json(tmp_path: Path) -> None:
    StatusWriter(tmp_path, lambda: FACTS).write("finished")
    done = subprocess.run([sys.executable, "-m", "april", "status", str(tmp_path), "--json"], capture_output=True, text=True)
    assert done.returncode == 0 and json.loads(done.stdout)["state"] == "finished"
    code = "import april.observe.status, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
