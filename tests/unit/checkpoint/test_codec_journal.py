"""Core data as bytes and back, and the journal: exact, checked, cut where it was torn."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_helpers import SPEC, make_prompts, make_segment

from april.checkpoint.codec import decode_frames, encode, intact_length
from april.checkpoint.journal import Journal, read_journal, rewrite_journal
from april.core.errors import CheckpointError
from april.core.group import Failure, Reward
from april.core.ids import NO_VERSION, GroupId
from april.core.sample import Parent, Sample, Segment, Span
from april.core.sampling import AdaptiveTemperature, SamplingSpec
from april.rollout.view import Status

PROMPT = make_prompts(1)[0]
PROMPTS = {PROMPT.id: PROMPT}
GROUP = GroupId(3, 1, "p0")
HEADER_BYTES = 12


def there_and_back(value: Any) -> Any:
    (copy,) = decode_frames(encode(value), "test", PROMPTS)
    return copy


def a_sample() -> Sample:
    entropies, routes = np.array([0.1, np.nan], np.float32), np.array([[[0, 256]], [[65535, 65535]]], np.uint16)
    logprobs = np.array([-np.float32(1e-38), -87.3], np.float32)
    rare = Segment(np.array([2**31 - 1, 0]), logprobs, 4, "engine/µ", entropies, routes, routes[:1])
    grown = Sample(
        GROUP.member(1),
        PROMPT,
        SamplingSpec(8, 0.7, 0.9, 5, (1, 2), ("\n\n", "</s>"), True, 2**40),
        parent=Parent(GROUP.member(0), 0),
    )
    return grown.extended(rare).finished("stop")


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**70),
        0.1,
        float("inf"),
        "µ\x00\n",
        [],
        (),
        {},
        [1, (2, [3, (4,)])],
        {1: "a", "1": "b", (1, 2): None, GROUP: {}, None: 0},
        GROUP,
        GROUP.member(2)._replace(branch="0.1"),
        Span(0, 3, NO_VERSION, "environment"),
        Parent(GROUP.member(0), 3),
        SamplingSpec(5, 0.3, 0.5, 7, (1,), ("x",), True, 9),
        SamplingSpec(5, entropy=True, adaptive=AdaptiveTemperature(0.05, -0.3, 1.5, 0.25)),
        Reward(-0.3, True, {"format": 0.1}),
        Failure("time out"),
    ],
    ids=repr,
)
def test_every_plain_core_value_comes_back_equal_and_of_its_type(value: Any) -> None:
    copy = there_and_back(value)
    assert copy == value
    assert type(copy) is type(value)


def test_a_sample_comes_back_bit_for_bit() -> None:
    """Invariants 8 to 12 across a checkpoint: arrays, spans, spec, stop, parent."""
    sample = a_sample()
    copy = there_and_back(sample)
    for name in ("token_ids", "behaviour_logprobs", "loss_mask", "entropies", "routes", "prompt_routes"):
        ours, theirs = getattr(sample, name), getattr(copy, name)
        assert (ours.dtype, ours.tobytes()) == (theirs.dtype, theirs.tobytes()), name
        assert not theirs.flags.writeable
    for name in ("id", "spec", "spans", "stop", "parent"):
        assert getattr(copy, name) == getattr(sample, name), name
    assert copy.prompt is PROMPT
    empty = there_and_back(Sample(GROUP.member(0), PROMPT, SPEC))
    assert (len(empty), empty.entropies, empty.stop) == (0, None, None)


def test_a_segment_comes_back_bit_for_bit() -> None:
    segment = make_segment(3, version=7)
    copy = there_and_back({"segment": segment, "none": None})["segment"]
    assert copy.logprobs.tobytes() == segment.logprobs.tobytes()
    assert (copy.version, copy.sampler, copy.entropies) == (7, "test", None)


@settings(max_examples=60)
@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from(["<i4", "<i8", "<f4", "<f8", "|b1", "<u8", "<f2"]),
    before=st.text(max_size=3),
)
def test_arrays_of_any_shape_come_back_bit_for_bit(shape: list[int], dtype: str, before: str) -> None:
    array = np.frombuffer(np.random.default_rng(0).bytes(512), np.uint8)[: int(np.prod(shape))].astype(dtype).reshape(shape)
    copy = there_and_back([before, array, array[::-1] if shape else array])
    assert (copy[1].dtype, copy[1].shape, copy[1].tobytes()) == (array.dtype, array.shape, array.tobytes())
    assert copy[2].tobytes() == (array[::-1] if shape else array).tobytes()


def test_numpy_scalars_and_statuses_become_plain_values() -> None:
    assert there_and_back([np.float32(0.5), np.int64(3), np.bool_(True), Status.PARKED]) == [0.5, 3, True, "parked"]


@pytest.mark.parametrize("value", [{1, 2}, object(), b"bytes", np.array([object()]), lambda: None])
def test_what_cannot_be_saved_is_refused_when_it_is_saved(value: object) -> None:
    with pytest.raises(CheckpointError, match="cannot be saved"):
        encode({"x": value})


def test_a_prompt_that_left_the_data_set_is_named() -> None:
    with pytest.raises(CheckpointError, match="not in the data set any more") as caught:
        decode_frames(encode(a_sample()), "test", {})
    assert caught.value.got == "p0"


def test_every_damaged_byte_is_noticed() -> None:
    """Invariant 32: a flipped byte is an error, but in the payload of a journal's last record, which may be torn."""
    values = [{"a": 1}, a_sample(), (make_segment(2), "end")]
    frames = [encode(value) for value in values]
    data = b"".join(frames)
    ends = [0, len(frames[0]), len(frames[0]) + len(frames[1]), len(data)]
    assert len(decode_frames(data, "f", PROMPTS)) == 3
    for at in range(len(data)):
        bad = bytearray(data)
        bad[at] ^= 0x41
        whole = sum(end <= at for end in ends[1:])
        with pytest.raises(CheckpointError, match="damaged"):
            decode_frames(bytes(bad), "f", PROMPTS)
        if at >= ends[2] + HEADER_BYTES:
            assert len(decode_frames(bytes(bad), "f", PROMPTS, torn_tail=True)) == 2
            assert intact_length(bytes(bad), "f") == ends[2]
            continue
        for read in (lambda data: decode_frames(data, "f", PROMPTS, torn_tail=True), lambda data: intact_length(data, "f")):
            with pytest.raises(CheckpointError, match=f"a bad frame at byte {ends[whole]}"):
                read(bytes(bad))


def test_a_journal_cut_at_any_byte_gives_its_whole_records() -> None:
    """Invariant 30: a killed process loses at most the record that it was writing."""
    frames = [encode(("name", {"n": n, "array": np.arange(n)})) for n in range(4)]
    data = b"".join(frames)
    for cut in range(len(data) + 1):
        whole = sum(sum(map(len, frames[: n + 1])) <= cut for n in range(4))
        records = decode_frames(data[:cut], "journal", {}, torn_tail=True)
        assert [arguments["n"] for _, arguments in records] == list(range(whole))
        assert intact_length(data[:cut], "journal") == sum(map(len, frames[:whole]))


def names(path: Path) -> list[str]:
    return [name for name, _ in read_journal(path, PROMPTS)]


def test_a_journal_is_on_disk_after_a_flush_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.bin"
    assert read_journal(path, {}) == []
    journal = Journal(path)
    journal.append("one", {"sample": a_sample()})
    assert names(path) == []
    journal.flush()
    assert names(path) == ["one"]
    journal.append("two", {})
    journal.flush(fsync=True)
    journal.append("three", {})
    journal.close()
    assert names(path) == ["one", "two", "three"]


def test_a_journal_with_a_torn_tail_goes_on_behind_its_last_whole_record(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    journal = Journal(path)
    journal.append("one", {})
    journal.append("two", {"segment": make_segment(4)})
    journal.close()
    path.write_bytes(path.read_bytes()[:-3])
    journal = Journal(path)
    journal.append("three", {})
    journal.close()
    assert names(path) == ["one", "three"]


@pytest.mark.parametrize("num_zeros", [1, 5, 16, 9000])
def test_pages_that_did_not_reach_the_disk_are_a_torn_tail(tmp_path: Path, num_zeros: int) -> None:
    path = tmp_path / "journal.bin"
    frames = [encode((name, {})) for name in ("one", "two")]
    path.write_bytes(frames[0] + bytes(num_zeros))
    journal = Journal(path)
    journal.append("three", {})
    journal.close()
    assert names(path) == ["one", "three"]
    path.write_bytes(frames[0] + bytes(num_zeros + 16) + frames[1])
    with pytest.raises(CheckpointError, match="a bad frame"):
        read_journal(path, {})


def test_a_write_that_takes_a_part_is_gone_on_with(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.bin")
    file = journal._file
    journal._file = SimpleNamespace(write=lambda data: file.write(data[:7]), close=file.close)  # type: ignore[assignment]
    for name in ("one", "two"):
        journal.append(name, {})
    journal.close()
    assert names(tmp_path / "journal.bin") == ["one", "two"]


@pytest.mark.parametrize("bit", [3, 30, 70, 130], ids=["length", "a large length", "header", "payload"])
def test_damage_in_the_middle_of_a_journal_is_refused_and_nothing_is_cut(tmp_path: Path, bit: int) -> None:
    path = tmp_path / "journal.bin"
    frames = [encode((name, {})) for name in ("one", "two", "three", "four", "five")]
    data = bytearray(b"".join(frames))
    data[len(frames[0]) + bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))
    told = f"a bad frame at byte {len(frames[0])}"
    with pytest.raises(CheckpointError, match=told):
        read_journal(path, {})
    with pytest.raises(CheckpointError, match=told):
        Journal(path)
    assert path.read_bytes() == data


def test_a_journal_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "journal.bin"
    Journal(path).close()
    rewrite_journal(path, [("kept", {"a": (1, 2)})])
    assert read_journal(path, {}) == [("kept", {"a": (1, 2)})]
    assert [entry.name for entry in tmp_path.iterdir()] == ["journal.bin"]
