"""Ordered sets that a pool keeps up to date, so that no schedule ever walks over all samples.

Changing one costs a binary search and a shift of pointers in one list; reading its first entries costs their number.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from typing import NamedTuple

from april.core.ids import GroupId, Version

Rank = tuple[int, int]


class Age(NamedTuple):
    """Open groups whose oldest token is of one version.

    Attributes:
        version: that version.
        num_groups: how many there are.
        num_ready: how many of them could be emitted now.
    """

    version: Version
    num_groups: int
    num_ready: int


class SortedGroups:
    """A set of groups in order of issue."""

    __slots__ = ("_groups",)

    def __init__(self) -> None:
        self._groups: list[GroupId] = []

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[GroupId]:
        return iter(self._groups)

    def put(self, group: GroupId, present: bool) -> None:
        """Add or remove a group; nothing happens when it is so already."""
        at = bisect.bisect_left(self._groups, group)
        found = at < len(self._groups) and self._groups[at] == group
        if present and not found:
            self._groups.insert(at, group)
        elif found and not present:
            del self._groups[at]

    def first(self, limit: int | None = None) -> tuple[GroupId, ...]:
        """The oldest groups."""
        return tuple(self._groups[:limit])

    def num_before(self, serial: int) -> int:
        """How many were issued before this serial."""
        return bisect.bisect_left(self._groups, (serial,))


class RankedGroups:
    """Groups by a rank that may change, the smallest first; equal ranks by age."""

    __slots__ = ("_order", "_rank")

    def __init__(self) -> None:
        self._rank: dict[GroupId, Rank] = {}
        self._order: list[tuple[Rank, GroupId]] = []

    def put(self, group: GroupId, rank: Rank | None) -> None:
        """Give a group a rank, or take it out with None."""
        before = self._rank.get(group)
        if before == rank:
            return
        if before is not None:
            del self._order[bisect.bisect_left(self._order, (before, group))]
            del self._rank[group]
        if rank is not None:
            bisect.insort(self._order, (rank, group))
            self._rank[group] = rank

    def first(self, limit: int | None = None) -> tuple[GroupId, ...]:
        """The groups of smallest rank."""
        return tuple(group for _, group in self._order[:limit])


class GroupsByAge:
    """Groups by the version of their oldest token, and how many of each version are ready."""

    __slots__ = ("_groups", "_ready")

    def __init__(self) -> None:
        self._groups: dict[Version, dict[GroupId, None]] = {}
        self._ready: dict[Version, int] = {}

    def move(self, group: GroupId, before: Version | None, after: Version | None, ready: bool) -> None:
        """Count a group under another version; None: it has no age."""
        if before is not None:
            del self._groups[before][group]
            if not self._groups[before]:
                del self._groups[before]
        if after is not None:
            self._groups.setdefault(after, {})[group] = None
        if ready:
            self.count_ready(before, -1)
            self.count_ready(after, 1)

    def count_ready(self, version: Version | None, change: int) -> None:
        """Groups of a version became ready, or are no longer."""
        if version is not None:
            self._ready[version] = self._ready.get(version, 0) + change
            if not self._ready[version]:
                del self._ready[version]

    def ages(self) -> tuple[Age, ...]:
        """Counts by version, ascending."""
        return tuple(Age(version, len(self._groups[version]), self._ready.get(version, 0)) for version in sorted(self._groups))

    def of(self, version: Version) -> tuple[GroupId, ...]:
        """The groups of one version, by age."""
        return tuple(sorted(self._groups.get(version, ())))
