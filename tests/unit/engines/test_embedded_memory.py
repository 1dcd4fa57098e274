"""KV memory under pressure: it moves seldom, stays within its budget, and optional KV never disturbs running rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from april.core.ids import GroupId
from april.engines.embedded.memory import KvMemory
from april.engines.embedded.retain import Kept
from april.engines.embedded.scheduler import capacity_classes
from april.models.kv import KvBucket

CLASSES = capacity_classes(1024)
PROMPT_TOKENS = 32


class Moves:
    """Tokens that resizing has copied, of buckets that hold one number a token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tokens, resize = 0, KvBucket.resize

        def counted(bucket: KvBucket, rows: int) -> None:
            self.tokens += bucket.size * bucket.capacity
            resize(bucket, rows)

        monkeypatch.setattr(KvBucket, "resize", counted)


def bucket(capacity: int) -> KvBucket:
    return KvBucket(1, 1, 1, capacity, torch.float32, torch.device("cpu"))


def kept(num_tokens: int) -> Kept:
    return Kept(np.arange(num_tokens, dtype=np.int32), torch.zeros(1, 2, 1, num_tokens, 1))


def decode(memory: KvMemory, lengths: list[int], num_slots: int, budget_tokens: int, *, keep: bool) -> int:
    """Run samples of these lengths to their ends, one token a step, as many at once as fit; returns the tokens decoded."""
    waiting, left, total = list(enumerate(lengths)), dict[int, int](), 0
    while waiting or left:
        while waiting and len(left) < num_slots and memory.reserved_tokens + 64 <= budget_tokens:
            (serial, length), slot = waiting.pop(0), next(slot for slot in range(num_slots) if slot not in left)
            memory.insert(slot, PROMPT_TOKENS, None)
            left[slot] = length
            if keep:
                memory.keep(GroupId(serial, 0, "p"), kept(PROMPT_TOKENS))
        full = np.array([slot for slot in left if memory.num_tokens[slot] == memory.capacity[slot]], np.int64)
        while memory.reserved_tokens + memory.growth_tokens(full) > budget_tokens:
            slot = max(left)  # nobody waits here, so a sample that is taken out is done
            memory.remove(slot)
            del left[slot]
            full = full[full != slot]
        memory.promote(full.tolist())
        for slot in list(left):
            memory.num_tokens[slot] += 1
            left[slot] -= 1
            total += 1
            if not left[slot]:
                memory.remove(slot)
                del left[slot]
        assert memory.reserved_tokens <= memory.allocated_tokens
        assert memory.allocated_tokens + memory.kept.num_tokens <= budget_tokens
    return total


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("budget_tokens", [8_192, 12_000, 24_000])
def test_memory_moves_seldom_under_pressure(budget_tokens: int, keep: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    normal = np.random.default_rng(0).standard_normal(240)
    lengths = np.clip(np.rint(np.exp(3.4 + normal)), 1, 512).astype(int).tolist()
    moves, memory = Moves(monkeypatch), KvMemory(CLASSES, bucket, 64, budget_tokens)
    decoded = decode(memory, lengths, 64, budget_tokens, keep=keep)
    assert decoded == 11_400
    assert 0 < moves.tokens < (100_000 if keep else 40_000)


def test_optional_kv_costs_older_optional_kv_and_moves_no_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = KvMemory(CLASSES, bucket, 16, 64 * 10 + 100)
    memory.expect([40] * 10)
    for slot in range(8):
        memory.insert(slot, 40, None)
    moves, groups = Moves(monkeypatch), [GroupId(serial, 0, "p") for serial in range(4)]
    for group in groups[:3]:
        memory.keep(group, kept(40))
    assert [group in memory.kept for group in groups] == [False, True, True, False]
    memory.keep(groups[3], kept(700))
    assert [group in memory.kept for group in groups] == [False, True, True, False], "what can never fit drops nothing"
    assert moves.tokens == 0 and memory.allocated_tokens == 640
    for slot in range(3):
        memory.remove(slot)
    memory.keep(groups[3], kept(200))
    assert moves.tokens == 5 * 64 and memory.allocated_tokens == 7 * 64, "a bucket that is half empty gives, but for a headroom"
    assert [group in memory.kept for group in groups] == [False, True, True, True]


def test_rows_take_slack_then_kept_kv_then_the_headroom_of_others() -> None:
    memory = KvMemory(CLASSES, bucket, 16, 1024)
    memory.expect([40] * 12)
    for slot in range(4):
        memory.insert(slot, 40, None)
    memory.keep(GroupId(0, 0, "p"), kept(200))
    memory.reserve(128, 3)
    assert memory.allocated_tokens == 5 * 64 + 3 * 128 and memory.kept.num_tokens == 200, "five rows: four and a headroom of one"
    memory.reserve(128, 4)
    assert memory.allocated_tokens == 5 * 64 + 5 * 128 and memory.kept.num_tokens == 0
    memory.reserve(128, 6)
    assert memory.allocated_tokens == 4 * 64 + 6 * 128
