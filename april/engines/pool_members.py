"""The members of an engine pool, their loads in sum, and which of them takes a sample. No step here looks at all samples."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from april.core.ids import NO_VERSION, GroupId, SampleId, Version
from april.core.sample import Sample, Segment
from april.engines.base import Caps, Engine, Load

AFFINITY_SLACK = 0.25
"""A group stays with its engine while that is at most this share of its places fuller than the emptiest."""
LOOKAHEAD_FRACTION = 0.125
"""Samples that wait inside an engine, over those that it decodes at once: a free place is taken without a round trip."""
_GAUGES = ("running", "waiting", "kv_tokens")
_COUNTERS = (
    "generated_tokens", "prefill_tokens", "shared_tokens", "forked_tokens", "resumed_tokens", "preemptions", "busy_s",
    "drafted_tokens", "accepted_tokens",
)  # fmt: skip
_numbers = attrgetter(*_GAUGES, *_COUNTERS)


@dataclass(slots=True, eq=False)
class Member:
    """One engine of a pool.

    Attributes:
        index: place in the order of joining; never used twice.
        open: its samples, in order of submission.
        aborting: those of them that were asked to stop.
        leaving: it gets no more samples, and goes when it is empty.
        numbers, slot_s, version: from its last `load`.
        limit: samples that it is given at most.
        stamp: changes whenever `ready_s` does.
        watched: what is registered to be read.
    """

    name: str
    engine: Engine
    index: int
    open: dict[SampleId, None] = field(default_factory=dict)
    aborting: set[SampleId] = field(default_factory=set)
    leaving: bool = False
    numbers: tuple[float, ...] = (0,) * (len(_GAUGES) + len(_COUNTERS))
    slot_s: float = 0.0
    version: Version = NO_VERSION
    speculation: str = "off"
    max_running: int = 1
    limit: int = 1
    usable: bool = False
    ready_s: float | None = None
    stamp: int = 0
    watched: Any = None

    @property
    def fraction(self) -> float:
        """Samples that it holds, over its places."""
        return len(self.open) / self.max_running

    def promise(self) -> None:
        """Read its capacity; waits for an engine that is still being loaded."""
        self.max_running = self.engine.caps.max_running
        self.limit = self.max_running + max(1, int(LOOKAHEAD_FRACTION * self.max_running))

    def describe(self) -> dict[str, Any]:
        """For status files."""
        return {
            "name": self.name,
            "running": int(self.numbers[0]),
            "waiting": int(self.numbers[1]),
            "held": len(self.open),
            "version": self.version,
            "process": getattr(self.engine, "pid", None),
            "restarts": getattr(self.engine, "num_restarts", 0),
            "state": "leaving" if self.leaving else "serving" if self.usable else "not used",
        }


@dataclass(slots=True)
class Entry:
    """A sample in a pool.

    Attributes:
        sample: as it was given to the engine that has it.
        since_s: when it came.
        member: who has it; None while it waits in the pool.
        segments: what was reported of it since.
        moves: when it parks, it goes on at another engine.
        withdrawn: the call that brought it was refused; what is reported of it is not wanted.
    """

    sample: Sample
    since_s: float
    member: Member | None = None
    segments: list[Segment] = field(default_factory=list)
    moves: bool = False
    withdrawn: bool = False

    def continued(self) -> Sample:
        """The sample with everything that was reported."""
        sample = self.sample
        for segment in self.segments:
            sample = sample.extended(segment)
        return sample


class Totals:
    """Loads of all members in sum, changed by differences; counters of members that left stay."""

    def __init__(self) -> None:
        self._sums = [0.0] * (len(_GAUGES) + len(_COUNTERS))
        self._slot_s = 0.0
        self.versions: Counter[Version] = Counter()
        self.max_running = 0

    def add(self, member: Member) -> None:
        """A member comes, with nothing counted yet."""
        self.versions[member.version] += 1

    def update(self, member: Member, load: Load) -> None:
        """A member's load has changed."""
        numbers = _numbers(load)
        if numbers != member.numbers:
            for place, (after, before) in enumerate(zip(numbers, member.numbers, strict=True)):
                if after != before:
                    self._sums[place] += after - before
            member.numbers = numbers
        self._slot_s += (load.slot_s - member.slot_s) * member.max_running / max(1, self.max_running)
        member.slot_s, member.speculation = load.slot_s, load.speculation
        if load.version != member.version:
            self._drop_version(member)
            member.version = load.version
            self.versions[load.version] += 1

    def remove(self, member: Member) -> None:
        """A member is gone; what it holds counts no more."""
        for place in range(len(_GAUGES)):
            self._sums[place] -= member.numbers[place]
        self._drop_version(member)

    def _drop_version(self, member: Member) -> None:
        self.versions[member.version] -= 1
        if self.versions[member.version] <= 0:
            del self.versions[member.version]

    def served(self, wanted: Version) -> Version:
        """`wanted` when every engine that is up serves it, else the oldest version; `NO_VERSION` when none is up."""
        served = [version for version in self.versions if version != NO_VERSION]
        return NO_VERSION if not served else wanted if served == [wanted] else min(v for v in served if v != wanted)

    def load(self, queued: int, version: Version, speculation: str) -> Load:
        """The sum; `slot_s` is weighted by the places of each member, so that it is a share of all places."""
        sums = dict(zip((*_GAUGES, *_COUNTERS), self._sums, strict=True))
        whole: dict[str, Any] = {name: int(value) for name, value in sums.items()}
        whole |= {"waiting": whole["waiting"] + queued, "busy_s": sums["busy_s"], "slot_s": self._slot_s}
        return Load(version=version, speculation=speculation, **whole)


class Routes:
    """Which engine takes a sample: the one that may hold its KV, then the one of its group, then the emptiest."""

    def __init__(self) -> None:
        self._members: dict[int, Member] = {}
        self._heap: list[tuple[float, int]] = []  # an entry whose fraction is not the member's any more is void
        self._homes: dict[GroupId, tuple[Member, int]] = {}
        self._last: dict[SampleId, Member] = {}

    def choose(self, sample: Sample) -> Member | None:
        """None when nobody has room."""
        lightest = self._lightest()
        if lightest is None or len(lightest.open) >= lightest.limit:
            return None
        home = self._homes.get(sample.id.group)
        most = lightest.fraction + AFFINITY_SLACK
        for member in (self._last.get(sample.id), None if home is None else home[0]):
            if member is not None and member.usable and len(member.open) < member.limit and member.fraction <= most:
                return member
        return lightest

    def came(self, sample: SampleId, member: Member) -> None:
        """The member has taken the sample; its group has its home where the newest of it are."""
        self._last.pop(sample, None)
        former = self._homes.get(sample.group)
        self._homes[sample.group] = (member, 1 if former is None else former[1] + 1)
        self.changed(member)

    def left(self, sample: SampleId, member: Member, *, keeps_kv: bool) -> None:
        """The sample is no longer there; the member may keep the KV of one that was parked."""
        home, count = self._homes[sample.group]
        if count > 1:
            self._homes[sample.group] = (home, count - 1)
        else:
            del self._homes[sample.group]
        if keeps_kv:
            self._last[sample] = member
            if len(self._last) > 4096 + 4 * len(self._homes):
                del self._last[next(iter(self._last))]
        self.changed(member)

    def forget_kv(self) -> None:
        """New weights: what was kept for parked samples is of no use."""
        self._last.clear()

    def changed(self, member: Member) -> None:
        """The number of samples of a member has changed, or whether it can be used."""
        if not member.usable:
            return
        heapq.heappush(self._heap, (member.fraction, member.index))
        if len(self._heap) > 1024 + 16 * len(self._members):
            self._sort()

    def rebuild(self, members: Iterable[Member]) -> None:
        """Members have come or gone."""
        self._members = {member.index: member for member in members}
        self._last = {sample: member for sample, member in self._last.items() if member.index in self._members}
        self._sort()

    def _sort(self) -> None:
        self._heap = [(member.fraction, member.index) for member in self._members.values() if member.usable]
        heapq.heapify(self._heap)

    def _lightest(self) -> Member | None:
        while self._heap:
            fraction, index = self._heap[0]
            member = self._members.get(index)
            if member is not None and member.usable and fraction == member.fraction:
                return member
            heapq.heappop(self._heap)
        return None


def together(all_caps: Iterable[Caps]) -> Caps:
    """What a pool promises: only what all members promise; places and memory in sum. Two that can drain can roll, too."""
    known = list(all_caps)
    modes = frozenset.intersection(*(caps.update_modes for caps in known))
    rolling = {"rolling"} if len(known) > 1 and "drain" in modes else set()
    return Caps(
        max_running=sum(caps.max_running for caps in known),
        kv_tokens=sum(caps.kv_tokens for caps in known),
        max_sample_tokens=min(caps.max_sample_tokens for caps in known),
        update_modes=frozenset(modes - {"rolling"} | rolling),
        addressed_random=all(caps.addressed_random for caps in known),
        entropy=all(caps.entropy for caps in known),
        score=all(caps.score for caps in known),
        shares_prefix=all(caps.shares_prefix for caps in known),
        sleeps=all(caps.sleeps for caps in known),
    )
