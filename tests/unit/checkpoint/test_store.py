"""Checkpoint folders: whole or not there, damage refused with the last good one named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from april.checkpoint.store import SCHEMA, CheckpointStore, problem_of, step_of
from april.core.errors import CheckpointError, ResourceError


def writes(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "model").mkdir()
        (folder / "model" / "weights.bin").write_text(text)
        (folder / "rollout.bin").write_bytes(b"\x00" + text.encode())

    return write


def contents(folder: Path) -> str:
    return (folder / "model" / "weights.bin").read_text()


def test_the_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "c", keep=3)
    assert store.latest() is None
    for step in (5, 10, 100):
        store.save(step, writes(f"step {step}"))
    newest = store.latest()
    assert newest is not None
    assert (contents(newest), step_of(newest), problem_of(newest)) == ("step 100", 100, None)


def test_old_ones_go_and_the_kept_ones_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in range(5):
        store.save(step, writes(str(step)))
    assert [path.name for path in store.all()] == ["step-000003", "step-000004"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_same_step_twice_never_overwrites(tmp_path: Path) -> None:
    """A run that was stopped and continued in one step: the former checkpoint stays until the new one is whole."""
    store = CheckpointStore(tmp_path, keep=2)
    store.save(7, writes("first"))
    store.save(7, writes("second"))
    newest = store.latest()
    assert newest is not None
    assert (contents(newest), step_of(newest)) == ("second", 7)
    assert contents(store.all()[0]) == "first"
    store.save(8, writes("third"))
    assert contents(store.latest()) == "third"  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bug"), OSError(28, "No space left on device")])
def test_a_crash_while_writing_leaves_the_former_one(tmp_path: Path, error: BaseException) -> None:
    """Invariant 30: atomic."""
    store = CheckpointStore(tmp_path)
    store.save(1, writes("good"))

    def crash(folder: Path) -> None:
        writes("half")(folder)
        raise error

    expected = ResourceError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        store.save(2, crash)
    newest = store.latest()
    assert newest is not None
    assert contents(newest) == "good"
    assert [path.name for path in store.all()] == ["step-000001"]
    store.save(2, writes("again"))
    assert contents(store.latest()) == "again"  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000001", "step-000002"]


def test_a_full_disk_is_said_so(tmp_path: Path) -> None:
    def full(_folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ResourceError, match="No space left on device") as caught:
        CheckpointStore(tmp_path).save(3, full)
    assert "intact" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_every_damaged_byte_is_refused_and_the_last_good_one_is_named(tmp_path: Path) -> None:
    """Invariant 32: weights, state or manifest, any byte, and a file that is gone."""
    store = CheckpointStore(tmp_path)
    good, bad = store.save(1, writes("good")), store.save(2, writes("bad"))
    for file in (bad / "model" / "weights.bin", bad / "rollout.bin", bad / "manifest.json"):
        whole = file.read_bytes()
        for at in range(len(whole)):
            if chr(whole[at]).isspace():
                continue
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x03]) + whole[at + 1 :])
            with pytest.raises(CheckpointError, match="newest checkpoint is damaged") as caught:
                store.latest()
            assert str(good) in str(caught.value.hint)
        file.unlink()
        with pytest.raises(CheckpointError, match=file.name):
            store.latest()
        file.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError):
            store.latest()
        file.write_bytes(whole)
    assert store.latest() == bad


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"schema": 1}', '{"schema": 1, "step": 1, "files": [1]}'])
def test_a_manifest_of_another_shape_is_damage(tmp_path: Path, text: str) -> None:
    store = CheckpointStore(tmp_path)
    folder = store.save(1, writes("x"))
    (folder / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match="no good one is left"):
        store.latest()


@pytest.mark.parametrize("schema", [SCHEMA - 1, SCHEMA + 1, None])
def test_another_schema_is_refused(tmp_path: Path, schema: int | None) -> None:
    """Invariant 32."""
    store = CheckpointStore(tmp_path)
    folder = store.save(1, writes("x"))
    manifest = json.loads((folder / "manifest.json").read_text()) | {"schema": schema}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=f"schema {schema}, this version reads {SCHEMA}"):
        store.latest()
