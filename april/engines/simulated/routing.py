"""Which replica takes a sample."""

from __future__ import annotations

import heapq
from typing import Literal

from april.core.ids import GroupId

Routing = Literal["least_loaded", "by_group", "static", "queue"]


class Router:
    """Counts the samples of each replica, and gives the one that is to take the next.

    Args:
        routing: the rule; "queue" is "least_loaded" for whoever asks only when there is a free place.
        num_replicas: R.

    Attributes:
        down: replicas that are passed over while another one is there.
    """

    def __init__(self, routing: Routing, num_replicas: int) -> None:
        self.routing, self.loads = routing, [0] * num_replicas
        self.down: set[int] = set()
        self._heap = [(0, index) for index in range(num_replicas)]
        self._homes: dict[GroupId, list[int]] = {}

    def place(self, group: GroupId) -> int:
        """The replica for one more sample of a group; it is counted."""
        if self.routing == "static":
            index = group.serial % len(self.loads)
        elif self.routing == "by_group" and group in self._homes and self._homes[group][0] not in self.down:
            index = self._homes[group][0]
        else:
            index = self.lightest()
        if self.routing == "by_group":
            home = self._homes.setdefault(group, [index, 0])
            home[0], home[1] = index, home[1] + 1
        self._change(index, 1)
        return index

    def take(self, index: int) -> None:
        """A replica has taken one more sample itself."""
        self._change(index, 1)

    def leave(self, group: GroupId, index: int) -> None:
        """A sample of the group is no longer there."""
        if self.routing == "by_group":
            self._homes[group][1] -= 1
            if not self._homes[group][1]:
                del self._homes[group]
        self._change(index, -1)

    def lightest(self) -> int:
        """The replica with the fewest samples, the first of equals; one that is down only when all are."""
        skipped: list[tuple[int, int]] = []
        found = None
        while self._heap:
            load, index = self._heap[0]
            if load != self.loads[index]:
                heapq.heappop(self._heap)
            elif index in self.down:
                skipped.append(heapq.heappop(self._heap))
            else:
                found = index
                break
        for entry in skipped:
            heapq.heappush(self._heap, entry)
        return found if found is not None else min(range(len(self.loads)), key=self.loads.__getitem__)

    def _change(self, index: int, by: int) -> None:
        self.loads[index] += by
        heapq.heappush(self._heap, (self.loads[index], index))
        if len(self._heap) > 1024 + 8 * len(self.loads):
            self._heap = [(load, index) for index, load in enumerate(self.loads)]
            heapq.heapify(self._heap)
