from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from observe_fake_run import make_run

from april.core.clock import VirtualClock
from april.observe.sinks import read_jsonl
from april.observe.trace import Timeline, life_lanes, write_trace


def test_spans_samples_and_counters_are_written_with_their_times(tmp_path: Path) -> None:
    clock = VirtualClock()
    line = Timeline(tmp_path / "t.jsonl", clock, offset_s=10.0)
    line.begin("s0", "running")
    with line.span("trainer", "update", loss=0.5):
        clock.wait_until(2.0)
    line.begin("s0", "parked")
    line.begin("s0", "parked")
    line.step = 1
    line.end("s0", time_s=3.0)
    line.end("unknown")
    line.counter("running", 4)
    line.counter("running", 4)
    line.counter("running", 3, time_s=2.5)
    line.close()
    assert read_jsonl(tmp_path / "t.jsonl") == [
        {"track": "trainer", "name": "update", "start_s": 10.0, "end_s": 12.0, "step": 0, "args": {"loss": 0.5}},
        {"track": "sample", "name": "s0", "start_s": 10.0, "end_s": 12.0, "state": "running", "step": 0},
        {"track": "sample", "name": "s0", "start_s": 12.0, "end_s": 13.0, "state": "parked", "step": 1},
        {"counter": "running", "time_s": 12.0, "value": 4, "step": 1},
        {"counter": "running", "time_s": 12.5, "value": 3, "step": 1},
    ]


def test_a_span_is_recorded_when_its_body_raises(tmp_path: Path) -> None:
    line = Timeline(tmp_path / "t.jsonl", VirtualClock())
    with pytest.raises(ValueError, match="boom"), line.span("reward", "judge"):
        raise ValueError("boom")
    line.flush()
    assert [r["name"] for r in read_jsonl(tmp_path / "t.jsonl")] == ["judge"]


def test_memory_is_bounded_and_no_record_is_lost(tmp_path: Path) -> None:
    line = Timeline(tmp_path / "t.jsonl", VirtualClock(), flush_every=10)
    for index in range(25):
        line.record("driver", "tick", index, index + 1)
        assert len(line._buffer) < 10
    assert len(read_jsonl(tmp_path / "t.jsonl")) == 20
    line.close()
    assert len(read_jsonl(tmp_path / "t.jsonl")) == 25


def test_closing_ends_open_samples_and_recording_nowhere_costs_nothing(tmp_path: Path) -> None:
    line = Timeline(tmp_path / "t.jsonl", VirtualClock())
    line.begin("s0", "running")
    line.close()
    assert [r["state"] for r in read_jsonl(tmp_path / "t.jsonl")] == ["running"]
    nowhere = Timeline(None, VirtualClock())
    nowhere.begin("s0", "running")
    nowhere.counter("running", 1)
    nowhere.truncate_from(0)
    nowhere.close()
    assert nowhere._open == {} and nowhere._buffer == []


def test_a_resumed_timeline_drops_repeated_steps(tmp_path: Path) -> None:
    line = Timeline(tmp_path / "t.jsonl", VirtualClock())
    for line.step in range(4):
        line.record("driver", "rollout", 0.0, 1.0)
    line.truncate_from(2)
    line.record("driver", "again", 0.0, 1.0)
    line.close()
    assert [(r["step"], r["name"]) for r in read_jsonl(tmp_path / "t.jsonl")] == [(0, "rollout"), (1, "rollout"), (3, "again")]


def _trace(folder: Path) -> list[dict[str, Any]]:
    count = write_trace(folder / "timeline.jsonl", folder / "trace.json")
    events: list[dict[str, Any]] = json.loads((folder / "trace.json").read_text())["traceEvents"]
    assert count == len(events)
    return events


def test_the_trace_has_the_structure_that_perfetto_reads(tmp_path: Path) -> None:
    make_run(tmp_path, 6)
    events = _trace(tmp_path)
    needed = {"X": {"name", "pid", "tid", "ts", "dur"}, "C": {"name", "pid", "ts", "args"}, "M": {"name", "pid", "tid", "args"}}
    assert {e["ph"] for e in events} == {"X", "C", "M"}
    assert all(needed[e["ph"]] <= set(e) for e in events)
    assert all(isinstance(e["pid"], int) and isinstance(e["tid"], int) for e in events)
    assert all(e["ts"] >= 0 and e["dur"] >= 0 for e in events if e["ph"] == "X")
    assert all(isinstance(v, int | float) for e in events if e["ph"] == "C" for v in e["args"].values())
    named = {(e["pid"], e["tid"]) for e in events if e["ph"] == "M" and e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} == named
    assert sum(e["ph"] == "X" for e in events) == sum("track" in r for r in read_jsonl(tmp_path / "timeline.jsonl"))


def test_events_of_one_thread_nest_or_follow_each_other(tmp_path: Path) -> None:
    rng = random.Random(0)
    with (tmp_path / "timeline.jsonl").open("w") as file:
        for index in range(300):
            start_s = rng.uniform(0, 20)
            record = {"track": rng.choice(["slots", "driver", "sample"]), "name": f"n{index}", "start_s": start_s}
            file.write(json.dumps(record | {"end_s": start_s + rng.uniform(0, 3), "state": "running"}) + "\n")
    threads: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in _trace(tmp_path):
        if event["ph"] == "X":
            threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(threads) > 3
    for spans in threads.values():
        for i, (a0, a1) in enumerate(spans):
            for b0, b1 in spans[i + 1 :]:
                assert b0 >= a1 - 0.01 or a0 >= b1 - 0.01 or (a0 <= b0 and b1 <= a1 + 0.01) or (b0 <= a0 and a1 <= b1 + 0.01)


def test_lives_that_overlap_never_share_a_row_and_rows_are_few() -> None:
    samples = [{"name": f"s{i}", "start_s": float(i), "end_s": i + 2.5} for i in range(30)]
    lanes = life_lanes(samples)
    assert len(set(lanes.values())) == 3
    assert all(lanes[f"s{i}"] != lanes[f"s{j}"] for i in range(30) for j in range(i + 1, min(30, i + 3)))


def test_microseconds_and_thread_names(tmp_path: Path) -> None:
    line = Timeline(tmp_path / "timeline.jsonl", VirtualClock())
    line.record("trainer", "update", 1.5, 1.75, tokens=3)
    line.close()
    (tmp_path / "timeline.jsonl").open("a").write('{"track": "trainer", "name": "torn", "sta')
    event = next(e for e in _trace(tmp_path) if e["ph"] == "X")
    assert (event["ts"], event["dur"], event["args"]) == (1_500_000.0, 250_000.0, {"tokens": 3, "step": 0})


@pytest.mark.parametrize("content", [None, "", "not json\n", '{"track": "x"}\n{"counter": "y", "time_s": null}\n'])
def test_an_empty_or_missing_timeline_gives_a_valid_empty_trace(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "timeline.jsonl").write_text(content)
    assert [e["ph"] for e in _trace(tmp_path)] == ["M", "M"]
