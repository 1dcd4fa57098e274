"""The journal: every transition since the last checkpoint, appended as it happens.

A frame is written with one `write` per batch of events, so a killed process loses at most the frame it was writing; an `fsync` at
each step makes it survive a power cut as well.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from april.checkpoint.codec import decode_frames, encode, intact_length
from april.core.prompt import Prompt

Record = tuple[str, dict[str, Any]]


class Journal:
    """An append-only file of (name, arguments) records; a torn tail is cut off when it is opened again.

    Raises:
        CheckpointError: the file that is there is damaged, which is more than a torn tail; it is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            data = path.read_bytes()
            if (whole := intact_length(data, str(path))) < len(data):
                os.truncate(path, whole)
        self._file = path.open("ab", buffering=0)
        self._pending: list[bytes] = []

    def append(self, name: str, arguments: dict[str, Any]) -> None:
        """Remember a record; it is on its way to the file with the next `flush`."""
        self._pending.append(encode((name, arguments)))

    def flush(self, fsync: bool = False) -> None:
        """Hand everything to the operating system; with `fsync`, to the disk."""
        if self._pending:
            left = memoryview(b"".join(self._pending))
            self._pending.clear()
            while left:  # a write may take a part only
                left = left[self._file.write(left) :]
        if fsync:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.flush()
        self._file.close()


def read_journal(path: Path, prompts: Mapping[str, Prompt]) -> list[Record]:
    """All whole records of a journal; none when there is no file.

    Raises:
        CheckpointError: a record in the middle is damaged, or names a prompt that the data set lacks.
    """
    if not path.exists():
        return []
    return [(name, arguments) for name, arguments in decode_frames(path.read_bytes(), str(path), prompts, torn_tail=True)]


def rewrite_journal(path: Path, records: list[Record]) -> None:
    """Replace a journal atomically by these records."""
    draft = path.with_suffix(".draft")
    draft.write_bytes(b"".join(encode(record) for record in records))
    os.replace(draft, path)
