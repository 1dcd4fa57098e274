"""What a user asks of a run that goes on, from another terminal: a file for each request, in the run's folder.

`april engines FOLDER --add 1`  -- ask -->  requests/*.json  -- take, between two steps -->  the run
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

_FOLDER = "requests"


def ask(run: Path, request: dict[str, Any]) -> Path:
    """Leave a request for the run in a folder; returns its file, which is gone when the run has taken it."""
    path = run / _FOLDER / f"{time.time_ns():020d}-{os.getpid()}.json"
    path.parent.mkdir(exist_ok=True)
    spare = path.with_suffix(".part")
    spare.write_text(json.dumps(request))
    return spare.replace(path)


def take(run: Path) -> list[dict[str, Any]]:
    """The requests for a run, the first one first; each is given once."""
    found = []
    for path in sorted((run / _FOLDER).glob("*.json")):
        found.append(json.loads(path.read_text()))
        path.unlink()
    return found
