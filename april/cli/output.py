"""What commands print: one line of JSON for scripts, tables for people."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from april.observe.sinks import plain


@contextmanager
def only_json(as_json: bool) -> Iterator[None]:
    """With --json, whatever the body prints goes to standard error: standard output is for the one line."""
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield


def emit(payload: dict[str, Any]) -> None:
    """The one JSON line a script reads."""
    print(json.dumps(plain(payload)))


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows of texts in aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip())
