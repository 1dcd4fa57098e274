"""How far attention reads: through unwritten places where that is faster, without seeing them."""

from __future__ import annotations

import pytest
import torch

from april.models import kv
from april.models.kv import KvBucket


def _attended(streamed_bytes: int, monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> tuple[torch.Tensor, int]:
    monkeypatch.setattr(kv, "_STREAMED_BYTES", streamed_bytes)
    generator = torch.Generator().manual_seed(0)
    bucket = KvBucket(1, 2, 4, 16, torch.float64, torch.device("cpu"))
    bucket.resize(3)
    source = torch.rand((1, 2, 2, 16, 4), generator=generator, dtype=torch.float64)
    for length in lengths:
        bucket.insert(source[..., :length, :], length)
    bucket.data[:, :, :, :, 10:] = 7.0  # left behind by a former occupant
    bucket.set_lengths(lengths)
    bucket.begin_step()
    bucket.write(0, torch.rand((len(lengths), 4, 4), generator=generator, dtype=torch.float64))
    query = torch.rand((len(lengths), 6, 4), generator=generator, dtype=torch.float64)
    return bucket.attend(0, query, 0.5), bucket._width


def test_reading_on_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    short, width = _attended(2**20, monkeypatch, [9, 3, 7])
    wide, full = _attended(0, monkeypatch, [9, 3, 7])
    assert (width, full) == (10, 16)
    torch.testing.assert_close(short, wide, rtol=0, atol=1e-14)


def test_short_rows_are_not_read_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [_attended(0, monkeypatch, [length, 1])[1] for length in (6, 7, 15)] == [7, 16, 16]
