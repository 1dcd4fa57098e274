"""KV memory of the running samples: which bucket and row each slot has, and copies between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain

import numpy as np
import torch

from april.engines.embedded.retain import Kept, KeptKv, Key
from april.engines.embedded.scheduler import class_for
from april.engines.embedded.slots import Ints
from april.models.kv import KvBucket


def _headroom_rows(size: int) -> int:
    """Unused rows that spare a bucket of so many occupied ones the next moves."""
    return -(-size // 4)


def _no_rows(size: int) -> int:
    return 0


class KvMemory:
    """Rows in buckets of fixed capacity; the occupied rows of a bucket stay contiguous.

    Args:
        classes: row capacities, ascending.
        make_bucket: empty bucket of one capacity.
        num_slots: samples that can run.
        budget_tokens: bound of the tokens allocated in all buckets and kept (while a bucket moves, both copies exist).

    Attributes:
        kept: KV of samples that do not run, in room that rows leave.
    """

    def __init__(
        self, classes: Sequence[int], make_bucket: Callable[[int], KvBucket], num_slots: int, budget_tokens: int
    ) -> None:
        self._budget_tokens, self._num_slots = budget_tokens, num_slots
        self.kept = KeptKv()
        self.classes = tuple(classes)
        self._make_bucket = make_bucket
        self._buckets: dict[int, KvBucket] = {}
        self._slots: dict[int, list[int]] = {}
        self.capacity = np.zeros(num_slots, np.int64)
        self.num_tokens = np.zeros(num_slots, np.int64)
        self._row = np.zeros(num_slots, np.int64)

    @property
    def reserved_tokens(self) -> int:
        """Sum of the capacities of all occupied rows."""
        return sum(capacity * len(slots) for capacity, slots in self._slots.items())

    @property
    def allocated_tokens(self) -> int:
        """Tokens that the memory of all buckets could hold."""
        return sum(capacity * bucket.rows for capacity, bucket in self._buckets.items())

    def next_class(self, capacity: int) -> int:
        """The class that a full row of this capacity grows into."""
        return class_for(capacity + 1, self.classes)

    def growth_tokens(self, slots: Ints) -> int:
        """Further tokens that these slots' rows would reserve in their next classes."""
        return sum(self.next_class(size) - size for size in self.capacity[slots].tolist())

    def insert(self, slot: int, num_tokens: int, source: torch.Tensor | None) -> None:
        """Give a slot a row that holds `num_tokens` tokens of KV and has room for one more."""
        self._place(slot, class_for(num_tokens + 1, self.classes), num_tokens, source)

    def expect(self, num_tokens: Sequence[int]) -> None:
        """Allocate rows for samples of so many tokens (the last of which has no KV yet)."""
        counts = Counter(class_for(tokens, self.classes) for tokens in num_tokens)
        for capacity, count in sorted(counts.items()):
            self.reserve(capacity, count)

    def reserve(self, capacity: int, num_rows: int) -> None:
        """Allocate room for further rows at once, so that a bucket moves seldom.

        Growth is generous while memory lasts. Under pressure other buckets give what they have beyond their headroom, then kept
        KV goes, and the headroom last: without it every further row would move a bucket.
        """
        bucket = self._buckets.get(capacity)
        if bucket is None:
            bucket = self._buckets[capacity] = self._make_bucket(capacity)
            self._slots[capacity] = []
        needed = bucket.size + num_rows
        if needed <= bucket.rows:
            return
        missing = (needed - bucket.rows) * capacity
        self._take_slack(missing, _headroom_rows, but=bucket)
        self._evict(missing)
        self._take_slack(missing, _no_rows, but=bucket)
        spare = (self._free_tokens - missing) // capacity
        generous = needed + min(spare, max(_headroom_rows(needed), spare // 2))
        bucket.resize(max(needed, min(generous, 2 * bucket.rows, self._num_slots)))

    def keep(self, key: Key, kept: Kept) -> None:
        """Keep this KV where rows leave room, at the cost of what was kept before."""
        size = len(kept.token_ids)
        self.kept.drop(key)
        self._take_slack(size, _headroom_rows)
        if 0 < size <= self._free_tokens + self.kept.num_tokens:
            self._evict(size)
            self.kept.add(key, kept)

    @property
    def _free_tokens(self) -> int:
        """Tokens that may still be allocated or kept."""
        return self._budget_tokens - self.allocated_tokens - self.kept.num_tokens

    def _evict(self, num_tokens: int) -> None:
        """Make so many tokens free at the cost of what was kept first, as far as there is anything."""
        self.kept.shrink(self.kept.num_tokens - num_tokens + self._free_tokens)

    def give_back(self) -> None:
        """Allocate nothing that no row holds."""
        self.kept.shrink(0)
        self._take_slack(self._budget_tokens - self.reserved_tokens, _no_rows)

    def _take_slack(self, num_tokens: int, headroom: Callable[[int], int], but: KvBucket | None = None) -> None:
        """Make so many tokens free where buckets hold unused rows; those that hold most of them give first.

        A bucket that gives has to move, so it gives all that it has beyond its headroom.

        Args:
            headroom: unused rows left to a bucket, of its occupied ones.
        """
        slack = {
            capacity: (bucket.rows - bucket.size - headroom(bucket.size)) * capacity
            for capacity, bucket in self._buckets.items()
            if bucket is not but
        }
        for capacity in sorted(slack, key=slack.__getitem__, reverse=True):
            if slack[capacity] <= 0 or num_tokens <= self._free_tokens:
                return
            bucket = self._buckets[capacity]
            bucket.resize(bucket.size + headroom(bucket.size))
            if not bucket.rows:  # whoever still knows the bucket holds no memory with it
                del self._buckets[capacity], self._slots[capacity]

    def _place(self, slot: int, capacity: int, num_tokens: int, source: torch.Tensor | None) -> None:
        self.reserve(capacity, 1)
        self._row[slot] = self._buckets[capacity].insert(source, num_tokens)
        self._slots[capacity].append(slot)
        self.capacity[slot], self.num_tokens[slot] = capacity, num_tokens

    def remove(self, slot: int) -> None:
        """Free a slot's row; the last row of the bucket moves into its place."""
        capacity, row = int(self.capacity[slot]), int(self._row[slot])
        bucket, slots = self._buckets[capacity], self._slots[capacity]
        last = slots.pop()
        bucket.remove(row, int(self.num_tokens[last]))
        if last != slot:
            slots[row] = last
            self._row[last] = row

    def promote(self, slots: Sequence[int]) -> None:
        """Move rows into their next classes, those of one class together; the longest first, so that each class has room for
        those that come from the one below."""
        for capacity in sorted({int(self.capacity[slot]) for slot in slots}, reverse=True):
            self._promote_class(capacity, [slot for slot in slots if self.capacity[slot] == capacity])

    def _promote_class(self, capacity: int, slots: list[int]) -> None:
        slots = sorted(slots, key=lambda slot: int(self._row[slot]))
        lengths = [int(self.num_tokens[slot]) for slot in slots]
        bucket, rows = self._buckets[capacity], torch.from_numpy(self._row[slots])
        # The old rows are given back first, so that the move stays within the budget. When all leave, nothing moves into
        # their places meanwhile.
        everyone = len(slots) == bucket.size
        source = bucket.data[:, :, : bucket.size] if everyone else bucket.data.index_select(2, rows.to(bucket.data.device))
        for slot in reversed(slots):
            self.remove(slot)
        larger = self.next_class(capacity)
        self.reserve(larger, len(slots))
        first = self._buckets[larger].insert_rows(source, lengths)
        self._slots[larger] += slots
        self.capacity[slots], self.num_tokens[slots] = larger, lengths
        self._row[slots] = first + np.arange(len(slots))

    def read(self, slot: int, num_tokens: int) -> torch.Tensor:
        """A view of a slot's first tokens, (layers, 2, H_kv, T, d)."""
        return self._buckets[int(self.capacity[slot])].read(int(self._row[slot]), num_tokens)

    def order(self) -> Ints:
        """Slots in the order of the rows of `buckets`."""
        return np.array(list(chain.from_iterable(slots for _, slots in sorted(self._slots.items()))), np.int64)

    def buckets(self) -> list[KvBucket]:
        """Occupied buckets in ascending capacity."""
        return [bucket for _, bucket in sorted(self._buckets.items()) if bucket.size]
