"""Weights in files: only what changed, never half, and damage is refused with its place."""

from __future__ import annotations

import json
import pickle
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from publishing_helpers import same, weights_of
from safetensors import SafetensorError

from april.core.errors import DataError, ProcessError, ResourceError
from april.distributed import disk_weights
from april.distributed.child import Child, Launch
from april.distributed.disk_manifest import Manifest
from april.distributed.disk_weights import DiskWeights
from april.distributed.layout import Layout
from april.distributed.transport import NotYet

MATRIX, VECTOR, HALF, SCALE = 120, 56, 6, 4


def disk(folder: Path, **options: Any) -> DiskWeights:
    return DiskWeights(folder, Layout.of(weights_of(0)), **options)


def fresh(writer: DiskWeights) -> DiskWeights:
    """As another process has it."""
    return pickle.loads(pickle.dumps(writer))  # type: ignore[no-any-return]


def read(reader: DiskWeights, version: int) -> tuple[dict[str, torch.Tensor], int]:
    with reader.reading(version) as weights:
        return dict(weights), weights.num_bytes


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weights_file(folder: Path, version: int) -> Path:
    (path,) = folder.glob(f"weights-{version:06d}-*")
    return path


def test_only_tensors_that_changed_are_written_and_read(tmp_path: Path) -> None:
    writer = disk(tmp_path)
    reader, weights = fresh(writer), weights_of(1)
    first = writer.write(weights, 1).num_bytes
    assert first > MATRIX + VECTOR + HALF + SCALE
    found, num_bytes = read(reader, 1)
    assert same(found, weights) and num_bytes == MATRIX + VECTOR + HALF + SCALE
    weights["vector"] = torch.arange(7, dtype=torch.float64)
    moved = writer.write(weights, 2)
    assert VECTOR < moved.num_bytes < first - MATRIX
    found, num_bytes = read(reader, 2)
    assert same(found, weights) and num_bytes == VECTOR
    assert writer.write(weights, 3).num_bytes == 0 and read(reader, 3)[1] == 0
    assert same(read(reader, 3)[0], weights)
    found, num_bytes = read(fresh(writer), 3)
    assert same(found, weights) and num_bytes == MATRIX + VECTOR + HALF + SCALE, "one that is new reads everything"


def test_bits_are_compared_and_not_numbers(tmp_path: Path) -> None:
    writer = disk(tmp_path)
    weights = weights_of(0)
    writer.write(weights, 1)
    minus = weights | {"scale": torch.tensor(-0.0)}
    assert writer.same(weights, 1) and not writer.same(minus, 1) and not writer.same(weights, 2)
    assert writer.write(minus, 2).num_bytes > 0
    assert torch.signbit(read(fresh(writer), 2)[0]["scale"])


def test_a_reader_that_missed_versions_catches_up_with_what_it_lacks(tmp_path: Path) -> None:
    writer, weights = disk(tmp_path), weights_of(1)
    reader = fresh(writer)
    writer.write(weights, 1)
    read(reader, 1)
    for version, name in ((2, "vector"), (3, "scale"), (4, "vector"), (5, "half")):
        weights = weights | {name: weights[name] + version}
        writer.write(weights, version)
    assert reader.passed(2) and not reader.holds(3) and reader.holds(4) and not reader.passed(4) and not reader.passed(6)
    found, num_bytes = read(reader, 5)
    assert same(found, weights) and num_bytes == VECTOR + SCALE + HALF
    with pytest.raises(NotYet, match="not on the disk") as caught:
        read(reader, 2)
    assert "versions [4, 5]" in str(caught.value.got)


def test_files_that_no_kept_version_names_are_removed_and_no_others(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("not of weights")
    writer, weights = disk(tmp_path), weights_of(1)
    writer.write(weights, 1)
    old = weights_file(tmp_path, 1)
    writer.write(weights | {"vector": weights["vector"] + 1}, 2)
    writer.write(weights | {"vector": weights["vector"] + 2}, 3)
    served = weights_file(tmp_path, 2)
    assert names(tmp_path) >= {"mine.txt", old.name, served.name, "version-000002.json", "version-000003.json"}
    assert not (tmp_path / "version-000001.json").exists() and old.exists(), "later versions take other tensors from it"
    assert same(read(fresh(writer), 2)[0], weights | {"vector": weights["vector"] + 1}), "the one that is served stays whole"
    writer.write(weights_of(9), 4)
    writer.write(weights_of(10), 5)
    manifests = [tmp_path / f"version-00000{version}.json" for version in (4, 5)]
    named = {file for path in manifests for file in Manifest.read(path).sizes}
    assert names(tmp_path) == {"mine.txt", *named, *(path.name for path in manifests)} and not served.exists()
    writer.close()
    assert names(tmp_path) == {"mine.txt"}


def test_a_folder_does_not_grow_over_what_is_read_of_it(tmp_path: Path) -> None:
    layout = Layout.of(weights := {f"t{index}": torch.zeros(4096) for index in range(4)})
    writer = DiskWeights(tmp_path, layout)
    largest = 0
    for version in range(40):
        weights = weights | {f"t{version % 4}": torch.full((4096,), float(version)), "t0": weights["t0"] + 1}
        writer.write(weights, version)
        largest = max(largest, sum(path.stat().st_size for path in tmp_path.glob("weights-*")))
    assert same(read(DiskWeights(tmp_path, layout, session=writer.session), 39)[0], weights)
    assert largest < (disk_weights.MOST_BYTES + 2) * layout.num_bytes


def test_large_sets_are_cut_into_files(tmp_path: Path) -> None:
    writer = disk(tmp_path, file_bytes=130, fsync=True)
    writer.write(weights_of(3), 7)
    assert len(list(tmp_path.glob("weights-000007-*"))) == 2
    assert same(read(fresh(writer), 7)[0], weights_of(3))


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    weights = {"one": whole[:6], "other": whole[6:], "both": whole}
    writer = DiskWeights(tmp_path, Layout.of(weights))
    writer.write(weights, 0)
    assert same(dict(writer.view(0)), weights)


def damage_nothing(path: Path) -> None:
    pass


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def scramble(path: Path) -> None:
    path.write_bytes(b"\xff" * path.stat().st_size)


def rename_tensor(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"scale"', b'"skale"'))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (damage_nothing, None),
        (flip, "SHA-256"),
        (cut, "bytes"),
        (scramble, "header that cannot be read"),
        (rename_tensor, "None"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(tmp_path: Path, damage: Any, told: str | None) -> None:
    writer = disk(tmp_path)
    reader = fresh(writer)
    writer.write(weights_of(1), 1)
    writer.write(weights_of(2), 2)
    damage(weights_file(tmp_path, 2))
    assert same(read(reader, 1)[0], weights_of(1))
    if told is None:
        assert same(read(reader, 2)[0], weights_of(2))
        return
    with pytest.raises(DataError, match="file of weights is damaged") as caught:
        read(reader, 2)
    error = caught.value
    assert told in str(error.got) and "weights-000002" in str(error.where) and error.expected and "--resume" in str(error.hint)
    found, num_bytes = read(reader, 1)
    assert same(found, weights_of(1)) and num_bytes == 0, "what it has stays whole"


@pytest.mark.parametrize("content", ["{", '{"schema": 99}', "[]", '{"schema": 1, "version": 1, "session": "x", "files": {}}'])
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    writer = disk(tmp_path)
    writer.write(weights_of(1), 1)
    (tmp_path / "version-000001.json").write_text(content)
    with pytest.raises(DataError, match="manifest of published weights is damaged"):
        read(fresh(writer), 1)
    assert not writer.holds(1), "so it is written anew"
    writer.write(weights_of(1), 1)
    assert same(read(fresh(writer), 1)[0], weights_of(1))


def test_a_file_that_cannot_be_seen_yet_is_asked_for_again(tmp_path: Path) -> None:
    writer = disk(tmp_path)
    writer.write(weights_of(1), 1)
    path = weights_file(tmp_path, 1)
    path.rename(tmp_path / "elsewhere")
    reader = fresh(writer)
    with pytest.raises(NotYet, match="is not there"):
        read(reader, 1)
    (tmp_path / "elsewhere").rename(path)
    assert same(read(reader, 1)[0], weights_of(1))


def test_another_session_s_versions_do_not_count_and_are_removed(tmp_path: Path) -> None:
    former = disk(tmp_path)
    former.write(weights_of(5), 5)
    writer = disk(tmp_path)
    assert former.holds(5) and not writer.holds(5) and not writer.passed(4)
    with pytest.raises(ProcessError, match="not on the disk"):
        writer.view(5)
    writer.write(weights_of(3), 3)
    assert len(names(tmp_path)) == 2 and not former.holds(5)
    record = json.loads((tmp_path / "version-000003.json").read_text())
    assert record["session"] == writer.session and Manifest.read(tmp_path / "version-000003.json").version == 3


def die_while_writing(channel: Any, writer: DiskWeights, where: str) -> None:
    """A trainer that is killed between two files, or before the manifest gets its name."""
    settle, seen = DiskWeights._settle, []

    def dying(self: DiskWeights, draft: Path, path: Path) -> None:
        seen.append(path.name)
        if path.name.startswith(where) and len(seen) > 1:
            signal.raise_signal(signal.SIGKILL)
        settle(self, draft, path)

    DiskWeights._settle = dying  # type: ignore[method-assign]
    writer.write(weights_of(2), 2)


@pytest.mark.parametrize("where", ["weights", "version"])
def test_a_writer_that_dies_in_the_middle_leaves_no_version(tmp_path: Path, where: str) -> None:
    writer = disk(tmp_path, file_bytes=64)
    reader = fresh(writer)
    writer.write(weights_of(1), 1)
    before = names(tmp_path)
    child = Child(Launch("trainer", die_while_writing, (writer, where)))
    assert child.kill(grace_s=60.0) == "ended by SIGKILL"
    assert len(names(tmp_path)) > len(before), "it left something behind, or this shows nothing"
    assert not reader.holds(2) and reader.holds(1) and same(read(reader, 1)[0], weights_of(1))
    with pytest.raises(NotYet):
        read(reader, 2)
    again = fresh(writer)
    again.write(weights_of(2), 2)
    assert same(read(reader, 2)[0], weights_of(2)) and not any("draft" in name for name in names(tmp_path))
    child.close()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("No space left on device")])
def test_other_tensors_and_a_full_disk_are_refused(tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = disk(tmp_path)
    with pytest.raises(ProcessError, match="do not fit"):
        writer.write({"other": torch.zeros(1)}, 0)

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(disk_weights, "save_file", full)
    with pytest.raises(ResourceError, match="could not be written") as caught:
        writer.write(weights_of(1), 1)
    assert "No space left" in str(caught.value.got) and not writer.holds(1)


def test_a_view_reads_where_it_is_looked_at(tmp_path: Path) -> None:
    writer = disk(tmp_path)
    writer.write(weights_of(1), 1)
    reader = fresh(writer)
    view, path = reader.view(1), weights_file(tmp_path, 1)
    path.rename(tmp_path / "elsewhere")
    assert view.num_bytes == 0 and (view.transport, view.version) == (reader, 1)
    with pytest.raises(NotYet):
        len(view)
    (tmp_path / "elsewhere").rename(path)
    assert same(dict(view), weights_of(1)) and view.num_bytes > 0
