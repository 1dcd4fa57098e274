from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from april.core.errors import RecipeError, ResourceError
from april.observe.sinks import JsonlSink, Sinks, TensorBoardSink, plain, read_jsonl


def test_a_record_comes_back_and_what_json_cannot_hold_becomes_plain(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "deep" / "m.jsonl")
    sink.write({"step": 0, "nan": float("nan"), "inf": -float("inf"), "np": np.float32(0.5), "path": Path("a"), "flag": True})
    sink.write({"array": np.array([1.0, np.nan]), "tuple": (1, {"x": np.int64(2)}), "text": "ü\n<"})
    assert read_jsonl(sink.path) == [
        {"step": 0, "nan": None, "inf": None, "np": 0.5, "path": "a", "flag": True},
        {"array": [1.0, None], "tuple": [1, {"x": 2}], "text": "ü\n<"},
    ]


def test_each_line_is_on_disk_before_the_sink_is_closed(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    for step in range(3):
        sink.write({"step": step})
        assert len((tmp_path / "m.jsonl").read_text().splitlines()) == step + 1


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_torn_anywhere_is_skipped_by_readers_and_cut_on_reopening(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "m.jsonl"
    whole = '{"step": 0}\n{"step": 1}\n'
    path.write_text(whole[: len(whole) - cut])
    # A cut of only the newline leaves an object that a reader understands, but a writer must not append to that line.
    assert [r["step"] for r in read_jsonl(path)] == ([0, 1] if cut == 1 else [0])
    JsonlSink(path).write({"step": 7})
    assert [r["step"] for r in read_jsonl(path)] == [0, 7]


def test_a_torn_line_longer_than_the_read_block_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\n{"text": "' + "x" * 200_000)
    JsonlSink(path).close()
    assert path.read_text() == '{"step": 0}\n'


def test_a_file_that_is_one_torn_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step"')
    JsonlSink(path).close()
    assert path.read_text() == ""


def test_a_resumed_run_drops_what_it_repeats_and_goes_on(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "m.jsonl")
    for step in range(5):
        sink.write({"step": step})
    sink.write({"note": "no step"})
    sink.truncate_from(3)
    sink.write({"step": 3, "again": True})
    assert read_jsonl(sink.path) == [{"step": 0}, {"step": 1}, {"step": 2}, {"note": "no step"}, {"step": 3, "again": True}]
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]


def test_readers_skip_foreign_lines_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_bytes(b'[1]\n\n{"step": 1}\n\xff\xfe garbage\n3\n')
    assert read_jsonl(tmp_path / "m.jsonl") == [{"step": 1}]
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_a_disk_that_refuses_is_an_error_with_the_file_and_the_next_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="free disk space"):
        JsonlSink(tmp_path / "file" / "m.jsonl")
    sink = JsonlSink(tmp_path / "m.jsonl")
    sink.close()

    class Full:
        def write(self, text: str) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    sink._file = Full()  # type: ignore[assignment]
    with pytest.raises(ResourceError, match="No space left"):
        sink.write({"step": 1})


class Memory:
    def __init__(self, fails: bool = False) -> None:
        self.records: list[Any] = []
        self.closed, self.fails = False, fails

    def write(self, record: Any) -> None:
        self.records.append(record)

    def truncate_from(self, step: int) -> None:
        self.records = [r for r in self.records if r["step"] < step]

    def close(self) -> None:
        self.closed = True
        if self.fails:
            raise ValueError("close failed")


def test_every_sink_gets_every_record_and_all_are_closed_though_one_fails() -> None:
    first, second = Memory(fails=True), Memory()
    sinks = Sinks([first, second])
    sinks.write({"step": 0})
    sinks.write({"step": 1})
    sinks.truncate_from(1)
    assert first.records == second.records == [{"step": 0}]
    with pytest.raises(ValueError, match="close failed"):
        sinks.close()
    assert second.closed


def test_without_tensorboard_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "tensorboard.compat", "tensorboard.compat.proto"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(RecipeError, match=r"april-rl\[tensorboard\]"):
        TensorBoardSink(tmp_path)


def test_tensorboard_gets_numbers_only(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_file_loader")
    sink = TensorBoardSink(tmp_path, prefix="train/")
    sink.write({"step": 3, "loss": 0.5, "bad": float("nan"), "text": "x"})
    sink.truncate_from(2)
    sink.close()
    events = [e for file in tmp_path.iterdir() for e in loader.EventFileLoader(str(file)).Load()]
    assert [(e.step, v.tag) for e in events for v in e.summary.value] == [(3, "train/loss")]
    assert [e.step for e in events if e.HasField("session_log")] == [2]


def test_plain_keeps_integers_and_booleans_apart() -> None:
    assert plain({1: True, "n": 1, "none": None}) == {"1": True, "n": 1, "none": None}
    assert plain(np.bool_(True)) is True
