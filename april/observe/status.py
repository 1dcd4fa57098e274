"""The status of a run: one small file that the run replaces now and then, and what a reader makes of it.

    run  -- write: a new file, moved over the old one -->  status.json  -- read_status -->  `april status FOLDER`

A reader on the same machine also sees whether the process still lives, so a file that says "running" cannot deceive.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from april.core.errors import DataError

STATUS_FILE = "status.json"
EVERY_S = 1.0
SHARE = 0.005
"""Of the run's time that may go into writing its status."""
OLD_S = 60.0
"""A run on another machine whose file is older than this may be dead."""


class StatusWriter:
    """Writes the status of this process's run.

    Args:
        folder: of the run.
        collect: what there is to say; called only when something is written.
    """

    def __init__(self, folder: Path, collect: Callable[[], Mapping[str, Any]]) -> None:
        self._path, self._collect = folder / STATUS_FILE, collect
        self._next_s = -math.inf
        self._owner = {"pid": os.getpid(), "host": socket.gethostname(), "born": _birth(os.getpid())}
        self.phase = "start"

    def beat(self) -> None:
        """Write, unless that has been done a moment ago."""
        if time.monotonic() >= self._next_s:
            self.write()

    def enter(self, phase: str, *, at_once: bool = False) -> None:
        """The run does something else from now on: "rollout", "update", "publish", "evaluate", ...

        Args:
            phase: what it does.
            at_once: write even if that has been done a moment ago.
        """
        self.phase = phase
        if at_once:
            self.write()
        else:
            self.beat()

    def write(self, state: str = "running", why: str | None = None) -> None:
        """Write now.

        Args:
            state: "running", "finished", "interrupted" or "failed".
            why: what ended the run.
        """
        start_s = time.monotonic()
        record = {**self._owner, "state": state, "why": why, "written_s": time.time(), "phase": self.phase, **self._collect()}
        spare = self._path.with_name(f".{STATUS_FILE}.{os.getpid()}")
        spare.write_text(json.dumps(record, default=str) + "\n")
        spare.replace(self._path)
        self._next_s = start_s + max(EVERY_S, (time.monotonic() - start_s) / SHARE)


def read_status(folder: Path, now_s: float | None = None) -> dict[str, Any]:
    """What a run says of itself, with `state` corrected by what can be seen from here, and `age_s`.

    Returns:
        the file's record; `state` is "running", "finished", "interrupted", "failed", "dead" (it says that it runs, and its
        process is gone) or "unknown" (the same, on another machine, with an old file).

    Raises:
        DataError: there is no run, or it has written no status.
    """
    path = folder / STATUS_FILE
    try:
        record: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        got = "a run without a status" if (folder / "recipe.toml").is_file() else "no run"
        raise DataError(
            "there is no status",
            where=str(folder),
            got=got,
            expected=f"the folder of a run, with {STATUS_FILE}",
            hint="check the path; a run writes its status as soon as it begins",
        ) from None
    except ValueError as error:
        raise DataError("a status cannot be read", where=str(path), got=str(error), expected="JSON") from error
    record["age_s"] = max(0.0, (time.time() if now_s is None else now_s) - float(record["written_s"]))
    if record["state"] == "running":
        record["state"] = _seen(record)
    return record


def _seen(record: Mapping[str, Any]) -> str:
    if record["host"] != socket.gethostname():
        return "running" if record["age_s"] < OLD_S else "unknown"
    born = _birth(int(record["pid"]))
    return "running" if born is not None and born == record["born"] else "dead"


def _birth(pid: int) -> str | None:
    """Something that two processes of one number do not share: when it was started; None when there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def status_lines(record: Mapping[str, Any]) -> list[str]:
    """The status for a terminal: the run, its engines, and who waits for what."""
    state, why = str(record["state"]), record.get("why")
    head = f"{record.get('name', 'run')}: {_STATES[state]}" + (f": {why}" if why else "")
    lines = [head, f"  step {record.get('step', 0)} of {record.get('steps', '?')}, version {record.get('version', 0)}"]
    if state in ("running", "unknown"):
        lines[-1] += f"; now: {record['phase']}"
    lines[-1] += f"; written {record['age_s']:.0f} s ago by process {record['pid']} on {record['host']}"
    ledger = record.get("ledger") or {}
    if counts := {place: count for place, count in ledger.get("counts", {}).items() if count}:
        told = ", ".join(f"{count} {place}" for place, count in counts.items())
        lines.append(f"  samples: {ledger['issued']} issued = {told}" + ("" if ledger["balanced"] else "; NOT BALANCED"))
    if state == "dead":
        lines.append(f"  next: `april train --resume {record.get('folder', 'FOLDER')}` goes on with what was written")
    if state in ("running", "unknown"):
        lines += [_engine_line(engine) for engine in record.get("engines", ())]
        lines += [_wait_line(wait) for wait in record.get("waits", ())]
    lines += [f"  lost: {loss}" for loss in record.get("losses", ())]
    return lines


_STATES = {
    "running": "running",
    "finished": "finished",
    "interrupted": "stopped when asked; it can be resumed",
    "failed": "ended with an error",
    "dead": "dead: its process is gone, and it did not say why",
    "unknown": "perhaps dead: it runs on another machine and has written nothing for a while",
}


def _engine_line(engine: Mapping[str, Any]) -> str:
    process = f", process {engine['process']}" if engine.get("process") else ""
    restarts = f", {engine['restarts']} restarts" if engine.get("restarts") else ""
    doing = f"{engine['running']} running, {engine['waiting']} waiting"
    return f"  engine {engine['name']}: {engine['state']}, version {engine['version']}, {doing}{process}{restarts}"


def _wait_line(wait: Mapping[str, Any]) -> str:
    left = "" if wait["left_s"] is None else f", given up in {wait['left_s']:.0f} s"
    more = f" and {wait['num'] - len(wait['what'])} more" if wait["num"] > len(wait["what"]) else ""
    ids = ", ".join(wait["what"])
    return f"  waits: {wait['stage']}: {wait['num']} in {wait['owner']}, for {wait['for_s']:.0f} s{left}: {ids}{more}"
