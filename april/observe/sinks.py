"""Where the numbers of a run go: JSON lines, TensorBoard, or several at once.

A record is one flat mapping per step. Files survive a crash: each line is flushed, a torn last line is cut when the
file is opened again, and a run that goes on drops the records of steps that it is about to repeat.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from april.core.errors import RecipeError, ResourceError

Record = Mapping[str, Any]


class Sink(Protocol):
    """Takes records of a run."""

    def write(self, record: Record) -> None:
        """Keep one record; its "step" is the x axis."""
        ...

    def truncate_from(self, step: int) -> None:
        """Drop records whose step is `step` or later: the run goes on from there."""
        ...

    def close(self) -> None: ...


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: numbers that are not finite become null, numpy becomes Python, the rest text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file in order, one at a time; a torn or foreign line is skipped, a missing file is empty."""
    if not Path(path).is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                yield record


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file; see `read_lines`."""
    return list(read_lines(path))


class JsonlSink:
    """One JSON object a line, flushed after each.

    Args:
        path: file that is created or continued.

    Raises:
        ResourceError: the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        with _disk(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _cut_torn_line(self.path)
            self._file = self.path.open("a", encoding="utf-8")

    def write(self, record: Record) -> None:
        self.write_all((record,))

    def write_all(self, records: Sequence[Record]) -> None:
        """Write several records and flush once."""
        lines = [json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records]
        with _disk(self.path):
            self._file.write("".join(lines))
            self._file.flush()

    def truncate_from(self, step: int) -> None:
        self.keep_if(lambda record: not isinstance(record.get("step"), int | float) or record["step"] < step)

    def keep_if(self, keep: Callable[[Record], bool]) -> None:
        """Rewrite the file with the records that satisfy `keep`, unless all do; a crash leaves the old or the new file."""
        if all(map(keep, read_lines(self.path))):
            return
        aside = self.path.with_suffix(self.path.suffix + ".tmp")
        with _disk(self.path):
            self._file.close()
            with open(aside, "w", encoding="utf-8") as file:
                for record in read_lines(self.path):
                    if keep(record):
                        file.write(json.dumps(record, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, self.path)
            self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Scalars for TensorBoard, one curve per numeric key.

    Args:
        folder: log directory.
        prefix: put before each name, such as "train/".

    Raises:
        RecipeError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, prefix: str = "") -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise RecipeError(
                "TensorBoard is not installed",
                where="observe.tensorboard",
                got=str(error),
                hint="pip install 'april-rl[tensorboard]', or leave this sink out",
            ) from error
        self._events: Any = event_pb2
        self._summaries: Any = summary_pb2
        self._prefix = prefix
        self._writer: Any = EventFileWriter(str(folder))

    def write(self, record: Record) -> None:
        numbers = {key: value for key, value in plain(record).items() if key != "step" and isinstance(value, int | float)}
        values = [self._summaries.Summary.Value(tag=self._prefix + key, simple_value=value) for key, value in numbers.items()]
        self._add(int(record.get("step", 0)), summary=self._summaries.Summary(value=values))

    def truncate_from(self, step: int) -> None:
        """Tell TensorBoard to hide what it has from `step` on."""
        self._add(step, session_log=self._events.SessionLog(status=self._events.SessionLog.START))

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._events.Event(wall_time=time.time(), step=step, **content))


class Sinks:
    """Hands each record to every sink; closing closes all of them even when one fails."""

    def __init__(self, sinks: Sequence[Sink] = ()) -> None:
        self.sinks = tuple(sinks)

    def write(self, record: Record) -> None:
        for sink in self.sinks:
            sink.write(record)

    def truncate_from(self, step: int) -> None:
        for sink in self.sinks:
            sink.truncate_from(step)

    def close(self) -> None:
        errors: list[Exception] = []
        for sink in self.sinks:
            try:
                sink.close()
            except Exception as error:
                errors.append(error)
        if errors:
            raise errors[0]


class _disk:
    """Turns an operating-system error into one that names the file and the next step."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise ResourceError(
                "a file of the run cannot be written",
                where=str(self.path),
                got=str(error),
                hint="free disk space or choose another run folder",
            ) from error


def _cut_torn_line(path: Path) -> None:
    """Remove what follows the last newline: a line that a crash left unfinished."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "rb+") as file:
        end = file.seek(0, os.SEEK_END)
        keep, block = 0, 65536
        position = end
        while position > 0:
            start = max(0, position - block)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                keep = start + found + 1
                break
            position = start
        if keep < end:
            file.truncate(keep)
