"""Who was running and who waited, second by second: recorded as JSON lines, shown by Perfetto.

timeline.jsonl   {"track": "trainer", "name": "update", "start_s": 1.0, "end_s": 1.5, "step": 3, "args": {...}}
                 {"track": "sample", "name": "g7/e0/p3/m1", "start_s": .., "end_s": .., "state": "parked", "step": 3}
                 {"counter": "running", "time_s": 1.25, "value": 14, "step": 3}
trace.json       the same as Chrome trace events, in microseconds
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeGuard

from april.core.clock import Clock
from april.observe.sinks import JsonlSink, Record, plain, read_lines

State = Literal["running", "parked", "scoring"]

RUN_PID, SAMPLES_PID = 1, 2
TRACK_ORDER = ("driver", "trainer", "slots", "reward")
COLOURS = {"running": "thread_state_running", "parked": "thread_state_iowait", "scoring": "thread_state_runnable"}


class Timeline:
    """Records spans, sample lifetimes and counters; holds at most `flush_every` records in memory.

    `step` is an attribute: set it when a step begins; records carry the step in which they end. So is `offset_s`.

    Args:
        path: timeline.jsonl, created or continued; None records nothing.
        clock: the run's clock, wall or virtual.
        offset_s: added to the clock, so that a resumed run goes on where it stopped.
        flush_every: records between two writes to disk.
    """

    def __init__(self, path: Path | None, clock: Clock, *, offset_s: float = 0.0, flush_every: int = 256) -> None:
        self.step, self.offset_s = 0, offset_s
        self._clock, self._flush_every = clock, flush_every
        self._sink = None if path is None else JsonlSink(path)
        self._buffer: list[Record] = []
        self._open: dict[str, tuple[State, float]] = {}
        self._values: dict[str, float] = {}

    def now(self) -> float:
        """Seconds since the run first started."""
        return self._clock.now() + self.offset_s

    @contextmanager
    def span(self, track: str, name: str, **args: Any) -> Iterator[None]:
        """Record the time that the body takes, also when it raises."""
        start_s = self.now()
        try:
            yield
        finally:
            self.record(track, name, start_s, self.now(), **args)

    def record(self, track: str, name: str, start_s: float, end_s: float, **args: Any) -> None:
        """Record a span whose times are known (from `now`)."""
        entry: dict[str, Any] = {"track": track, "name": name, "start_s": start_s, "end_s": end_s, "step": self.step}
        if args:
            entry["args"] = args
        self._add(entry)

    def begin(self, sample: str, state: State, time_s: float | None = None) -> None:
        """A sample enters a state; the one it was in ends. Entering the same state again changes nothing.

        Args:
            sample: printed sample id.
            state: what the sample does from now on.
            time_s: clock time of an event; now by default.
        """
        known = self._open.get(sample)
        if known is not None and known[0] == state:
            return
        self.end(sample, time_s)
        if self._sink is not None:
            self._open[sample] = (state, self._at(time_s))

    def end(self, sample: str, time_s: float | None = None) -> None:
        """A sample leaves its state for good; unknown samples are ignored."""
        known = self._open.pop(sample, None)
        if known is None:
            return
        state, start_s = known
        end_s = max(start_s, self._at(time_s))
        self._add({"track": "sample", "name": sample, "start_s": start_s, "end_s": end_s, "state": state, "step": self.step})

    def counter(self, name: str, value: float, time_s: float | None = None) -> None:
        """Sample a count; repeated equal values are not written."""
        if self._values.get(name) == value:
            return
        self._values[name] = value
        self._add({"counter": name, "time_s": self._at(time_s), "value": value, "step": self.step})

    def truncate_from(self, step: int) -> None:
        """Drop records of this step and later ones: the run repeats them."""
        self.flush()
        if self._sink is not None:
            self._sink.truncate_from(step)

    def flush(self) -> None:
        """Write what is held in memory."""
        if self._sink is not None and self._buffer:
            self._sink.write_all(self._buffer)
        self._buffer.clear()

    def close(self) -> None:
        """End all open samples and close the file."""
        for sample in list(self._open):
            self.end(sample)
        self.flush()
        if self._sink is not None:
            self._sink.close()
            self._sink = None

    def _at(self, time_s: float | None) -> float:
        return self.now() if time_s is None else time_s + self.offset_s

    def _add(self, entry: Record) -> None:
        if self._sink is None:
            return
        self._buffer.append(entry)
        if len(self._buffer) >= self._flush_every:
            self.flush()


def write_trace(timeline_path: Path, trace_path: Path) -> int:
    """Convert a timeline to Chrome Trace Event JSON (opens in Perfetto and chrome://tracing).

    Spans become "X" events of one thread per track (more when spans overlap without nesting), samples one thread per
    concurrent life, counters "C" events; "M" events name processes and threads. Times are microseconds.

    Returns:
        Number of events written.
    """
    spans, samples, counters = _sorted_records(timeline_path)
    written = 0
    with open(trace_path, "w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[')
        for event in _events(spans, samples, counters):
            file.write((",\n" if written else "\n") + json.dumps(plain(event), ensure_ascii=False))
            written += 1
        file.write("\n]}\n")
    return written


def _events(spans: list[Record], samples: list[Record], counters: list[Record]) -> Iterator[dict[str, Any]]:
    yield _meta("process_name", RUN_PID, 0, "run")
    yield _meta("process_name", SAMPLES_PID, 0, "samples")
    threads: dict[tuple[str, int], int] = {}
    lanes: dict[str, list[list[float]]] = {}
    for record in spans:
        track = str(record["track"])
        lane = _nesting_lane(lanes.setdefault(track, []), record["start_s"], record["end_s"])
        if (track, lane) not in threads:
            threads[track, lane] = _thread_id(track, len(threads))
            yield _meta("thread_name", RUN_PID, threads[track, lane], track if lane == 0 else f"{track} {lane + 1}")
        yield _complete(record, RUN_PID, threads[track, lane])
    lives = life_lanes(samples)
    for lane in sorted(set(lives.values())):
        yield _meta("thread_name", SAMPLES_PID, lane + 1, f"place {lane + 1:03d}")
    for record in samples:
        yield _complete(record, SAMPLES_PID, lives[record["name"]] + 1)
    for record in counters:
        name = str(record["counter"])
        value = {name: record["value"]}
        yield {"ph": "C", "name": name, "pid": RUN_PID, "tid": 0, "ts": _microseconds(record["time_s"]), "args": value}


def life_lanes(samples: list[Record]) -> dict[str, int]:
    """A row for each sample, from its first start to its last end, so that rows are few and lives never overlap."""
    lives: dict[str, tuple[float, float]] = {}
    for record in samples:
        start_s, end_s = lives.get(record["name"], (record["start_s"], record["end_s"]))
        lives[record["name"]] = (min(start_s, record["start_s"]), max(end_s, record["end_s"]))
    free: list[tuple[float, int]] = []
    out: dict[str, int] = {}
    for name, (start_s, end_s) in sorted(lives.items(), key=lambda item: (item[1][0], item[0])):
        lane = heapq.heappop(free)[1] if free and free[0][0] <= start_s else len(free)
        out[name] = lane
        heapq.heappush(free, (end_s, lane))
    return out


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value can be drawn."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _sorted_records(path: Path) -> tuple[list[Record], list[Record], list[Record]]:
    """Spans, sample lives and counters in order of time; records without their fields are skipped."""
    spans: list[Record] = []
    samples: list[Record] = []
    counters: list[Record] = []
    for record in read_lines(path):
        if "counter" in record and is_number(record.get("time_s")) and is_number(record.get("value")):
            counters.append(record)
        elif "track" in record and is_number(record.get("start_s")) and is_number(record.get("end_s")):
            (samples if record["track"] == "sample" else spans).append({"name": "", **record})
    for part in (spans, samples):
        part.sort(key=lambda record: (record["start_s"], -record["end_s"]))
    counters.sort(key=lambda record: record["time_s"])
    return spans, samples, counters


def _nesting_lane(lanes: list[list[float]], start_s: float, end_s: float) -> int:
    """First lane whose open spans have ended or enclose this one; lanes hold stacks of ends."""
    for index, ends in enumerate(lanes):
        while ends and ends[-1] <= start_s:
            ends.pop()
        if not ends or ends[-1] >= end_s:
            ends.append(end_s)
            return index
    lanes.append([end_s])
    return len(lanes) - 1


def _thread_id(track: str, known: int) -> int:
    return 1 + (TRACK_ORDER.index(track) if track in TRACK_ORDER else len(TRACK_ORDER)) * 100 + known


def _complete(record: Record, pid: int, tid: int) -> dict[str, Any]:
    args: dict[str, Any] = dict(record["args"]) if isinstance(record.get("args"), Mapping) else {}
    event: dict[str, Any] = {
        "ph": "X",
        "name": str(record["name"]),
        "cat": str(record["track"]),
        "pid": pid,
        "tid": tid,
        "ts": _microseconds(record["start_s"]),
        "dur": max(0.0, _microseconds(record["end_s"]) - _microseconds(record["start_s"])),
    }
    if "step" in record:
        args["step"] = record["step"]
    state = record.get("state")
    if isinstance(state, str):
        args["sample"], event["name"] = event["name"], state
        if state in COLOURS:
            event["cname"] = COLOURS[state]
    return event | {"args": args}


def _meta(kind: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _microseconds(time_s: float) -> float:
    return round(time_s * 1e6, 3)
