"""What a user asks of a run that goes on, from another terminal: a file for each request, in the run's folder.

`april engines FOLDER --add 1`  -- ask -->  requests/*.json  -- take, between two steps -->  the run
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
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


def take(run: Path, note: Callable[[str], None] = lambda _text: None) -> list[dict[str, Any]]:
    """The requests for a run, the first one first; each is given once.

    Args:
        run: its folder.
        note: told of files that hold no request; a run does not end for them.
    """
    found = []
    for path in sorted((run / _FOLDER).glob("*.json")):
        try:
            found.append(_checked(json.loads(path.read_text())))
        except (OSError, ValueError) as error:
            note(f"not a request: {path} ({error})")
        with suppress(OSError):
            path.unlink()
    return found


def _checked(request: Any) -> dict[str, Any]:
    """A request as `ask` writes it.

    Raises:
        ValueError: it is none.
    """
    kinds = {"add": int, "remove": list, "finish": bool}
    if not isinstance(request, dict) or {name: type(value) for name, value in request.items()} != kinds:
        raise ValueError(f"expected a number to add, names to remove, and whether they finish; got {str(request)[:100]}")
    return request
