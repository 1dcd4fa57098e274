"""`april status`: what a run is doing."""

from __future__ import annotations

from pathlib import Path


def status_command(folder: Path, as_json: bool) -> None:
    """Print the status of the run in a folder."""
    from april.cli.output import emit
    from april.observe.status import read_status, status_lines

    record = read_status(folder)
    if as_json:
        emit(record)
    else:
        print("\n".join(status_lines(record)))
