"""The compiled decode step equals torch's operators, reads a row's own tokens only, and says why it is not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from april.core.errors import ModelError
from april.models import kernel as built
from april.models.kv import KvBucket
from april.models.kv_rows import KvRows
from april.models.lean_decode import LeanDecoder
from april.testing.toy_model import ToyKind, toy_model

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the kernel with")
LENGTHS = [[1, 15, 16, 17], [31, 130, 128, 200]]
"""Tokens of the rows of two buckets: around the lanes and the tiles of the kernel."""
CAPACITIES = (20, 256)


@pytest.fixture
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built.kernel.cache_clear()
    yield tmp_path / "april"
    built.kernel.cache_clear()


def decoder_of(kind: ToyKind, head_dim: int, num_heads: int) -> LeanDecoder:
    options = {"attention_bias": True, "mlp_bias": True} if kind == "llama" else {}
    module = toy_model(kind, hidden_size=96, num_heads=num_heads, num_kv_heads=2, head_dim=head_dim, **options)
    found = LeanDecoder.from_module(module, torch.float32)
    assert found is not None
    return found


def filled(decoder: LeanDecoder, unwritten: float) -> list[KvBucket]:
    """Two buckets with random tokens, and something else behind them."""
    shape, generator = decoder.shape, torch.Generator().manual_seed(1)
    buckets = []
    for capacity, lengths in zip(CAPACITIES, LENGTHS, strict=True):
        bucket = KvBucket(
            shape.num_layers, shape.num_kv_heads, shape.head_dim, capacity, torch.float32, torch.device("cpu"), clears=False
        )
        bucket.resize(len(lengths) + 1)
        bucket.data.fill_(unwritten)
        for length in lengths:
            sizes = (shape.num_layers, 2, shape.num_kv_heads, length, shape.head_dim)
            bucket.insert(torch.randn(sizes, generator=generator), length)
        buckets.append(bucket)
    return buckets


def stepped(decoder: LeanDecoder, *, compiled: bool, steps: int = 2) -> tuple[torch.Tensor, list[KvBucket]]:
    """Logits of some steps with the same tokens, and the memory afterwards."""
    shape, lengths = decoder.shape, np.concatenate(LENGTHS).astype(np.int64)
    buckets = filled(decoder, float("nan") if compiled else 0.0)
    if compiled:
        rows: list[KvRows] | list[KvBucket] = [KvRows(kernel_of(decoder), buckets, lengths)]
    else:
        rows = buckets
        for bucket, own in zip(buckets, LENGTHS, strict=True):
            bucket.set_lengths(own)
    found = []
    for step in range(steps):
        for part in rows:
            part.begin_step()
        tokens = torch.arange(len(lengths)) * 3 % shape.vocab_size + step
        positions = torch.from_numpy(lengths + step)
        found.append(decoder.decode(tokens, positions, int(lengths.max()) + step + 1, rows))
    return torch.stack(found), buckets


def opened(decoder: LeanDecoder) -> KvRows:
    """Rows whose next place is open."""
    rows = KvRows(kernel_of(decoder), filled(decoder, 0.0), np.concatenate(LENGTHS).astype(np.int64))
    rows.begin_step()
    rows.set_model(decoder._phases_to(rows.longest), 1e-6, 0.2)
    return rows


def random_heads() -> torch.Tensor:
    return torch.randn(8, 8 * 32, generator=torch.Generator().manual_seed(2))


def kernel_of(decoder: LeanDecoder) -> built.Kernel:
    return built.kernel(decoder.shape.head_dim, decoder.shape.num_heads // decoder.shape.num_kv_heads)


@needs_compiler
@pytest.mark.parametrize(
    ("kind", "head_dim", "num_heads"), [("qwen3", 16, 2), ("qwen2", 32, 4), ("llama", 64, 6), ("qwen3", 128, 8)]
)
def test_a_step_is_that_of_the_operators_and_nothing_behind_a_row_is_read(kind: ToyKind, head_dim: int, num_heads: int) -> None:
    decoder = decoder_of(kind, head_dim, num_heads)
    expected, theirs = stepped(decoder, compiled=False)
    found, ours = stepped(decoder, compiled=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    for our, their, lengths in zip(ours, theirs, LENGTHS, strict=True):
        for row, length in enumerate(lengths):
            torch.testing.assert_close(our.read(row, length + 2), their.read(row, length + 2), rtol=0, atol=5e-5)
            assert our.data[:, :, row, :, length + 2 :].isnan().all(), "a step writes its own place only"


@needs_compiler
def test_a_wrong_length_would_be_seen() -> None:
    decoder = decoder_of("qwen3", 32, 4)
    expected, _ = stepped(decoder, compiled=True)
    buckets = filled(decoder, float("nan"))
    lengths = np.concatenate(LENGTHS).astype(np.int64)
    rows = KvRows(kernel_of(decoder), buckets, np.where(np.arange(len(lengths)) == 5, lengths - 1, lengths))
    rows.begin_step()
    tokens = torch.arange(len(lengths)) * 3 % decoder.shape.vocab_size
    gap = (decoder.decode(tokens, torch.from_numpy(lengths), 201, [rows]) - expected[0]).abs().amax(1)
    assert gap[5] > 1e-3 and float(gap[torch.arange(len(lengths)) != 5].max()) == 0.0, "and a row sees itself only"


@needs_compiler
def test_threads_change_nothing() -> None:
    decoder, before = decoder_of("qwen3", 32, 4), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(opened(decoder).attend(1, random_heads(), None))
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_what_is_not_a_number_stays_in_its_row() -> None:
    decoder = decoder_of("qwen3", 32, 4)
    heads = random_heads()
    heads[3, 5], heads[6, 40] = float("nan"), float("inf")
    found = opened(decoder).attend(0, heads, None).isfinite().all(1)
    assert found.tolist() == [True, True, True, False, True, True, False, True]


@needs_compiler
def test_gates_and_norms_are_those_of_torch() -> None:
    decoder = decoder_of("qwen3", 32, 4)
    rows = opened(decoder)
    gate = torch.cat((torch.linspace(-100, 100, 8 * 30), torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e30, 88.0, -88.0, 40.0] * 2)))
    both = torch.cat((gate.view(8, 32), torch.linspace(-3, 3, 8 * 32).view(8, 32)), dim=1)
    torch.testing.assert_close(rows.gated(both), F.silu(both[:, :32]) * both[:, 32:], rtol=1e-6, atol=1e-30)
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)) * torch.logspace(-6, 6, 8)[:, None]
    torch.testing.assert_close(rows.rms_normed(x), torch.rms_norm(x, (64,), None, 1e-6), rtol=1e-6, atol=0)
    wrong = x / x.abs().mean(1, keepdim=True)
    assert float((rows.rms_normed(x) - wrong).abs().max()) > 0.1


@needs_compiler
def test_a_kernel_is_built_once(fresh_cache: Path) -> None:
    built.kernel(16, 1)
    (library,) = fresh_cache.iterdir()
    before = library.stat()
    built.kernel.cache_clear()
    built.kernel(16, 1)
    after = library.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    built.kernel(16, 2)
    assert len(list(fresh_cache.iterdir())) == 2, "another shape is another library"


def test_without_a_compiler_it_says_so(fresh_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ModelError, match=r"no C\+\+ compiler"):
        built.kernel(16, 1)


def test_a_compiler_that_fails_is_quoted(fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "compiler"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such option: -fopenmp" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(ModelError, match="no such option: -fopenmp"):
        built.kernel(16, 1)
    assert list(fresh_cache.iterdir()) == [], "half a build is not kept"


@needs_compiler
def test_a_damaged_library_is_named(fresh_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built.kernel(16, 1)
    (library,) = fresh_cache.iterdir()
    other = tmp_path / "other" / "april" / library.name
    other.parent.mkdir(parents=True)
    other.write_bytes(b"not a library")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    built.kernel.cache_clear()
    with pytest.raises(ModelError, match="remove the file"):
        built.kernel(16, 1)


def test_a_folder_that_cannot_be_looked_into_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    built.kernel.cache_clear()
    monkeypatch.setenv("CXX", "sh -c true")  # a compiler may have arguments
    monkeypatch.setattr(Path, "is_file", refused)
    with pytest.raises(ModelError, match="cannot be kept") as caught:
        built.kernel(16, 1)
    assert caught.value.hint == "set XDG_CACHE_HOME"
    monkeypatch.undo()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory.")))
    with pytest.raises(ModelError, match="cannot be kept"):
        built.cache_folder()
