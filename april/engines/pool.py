"""Several engines behind one.

    EnginePool  -- submit -->  routes: KV, group, load --> engine 0 | engine 1 | ...
                <-- events of all, in order of time --

Samples beyond what the engines hold wait here, so the next free place takes the next sample, wherever it is. A version is
one for all: nothing is given out while engines that are up differ in it, and one that has missed a version gets no sample
until it has caught up. In the update mode "rolling" one engine after the other drains and swaps, and the others, on the old
version or the new one, serve. An engine that dies reports its samples as `Broken`; whoever starts them again finds another
engine.
"""

from __future__ import annotations

import heapq
import selectors
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from april.core.clock import Clock
from april.core.errors import EngineError, ProcessError, choice
from april.core.event import Broken, Event, Finished, Parked, Progressed, Wait
from april.core.ids import NO_VERSION, SampleId, Version
from april.core.sample import Sample
from april.engines.admission import check_admission
from april.engines.base import Caps, Engine, Load, UpdateMode, Weights
from april.engines.pool_members import Entry, Member, Routes, Totals, together


class EnginePool:
    """See `april.engines.base.Engine`.

    Args:
        engines: by name; idle, and all of one version.
        clock: of the run.
        name: of the source.
    """

    def __init__(self, engines: Mapping[str, Engine], clock: Clock, *, name: str = "engines") -> None:
        if not engines:
            raise EngineError("a pool needs an engine", where="engine.replicas", got=0, expected="1 or more")
        self.name, self._clock = name, clock
        self._members: dict[str, Member] = {}
        self._entries: dict[SampleId, Entry] = {}
        self._queue: dict[SampleId, Entry] = {}
        self._outbox: list[Event] = []
        self._due: list[tuple[float, int, int, Member]] = []
        self._selector = selectors.DefaultSelector()
        self._totals, self._routes = Totals(), Routes()
        self._caps: Caps | None = None
        self._now_s, self._num_joined = 0.0, 0
        self._lost: list[str] = []
        self._wanted: Version = next(iter(engines.values())).load().version
        self._rolls = False  # whether the last update was, or is, a rolling one
        self._to_roll: dict[str, Member] = {}  # those that serve the old weights until it is their turn
        self._rolling: Member | None = None  # the one whose turn it is
        self._weights: Weights = {}
        for member_name, engine in engines.items():
            self._add(member_name, engine)
        self._routes.rebuild(self._members.values())

    # -- members --------------------------------------------------------------------------------------------------

    @property
    def engines(self) -> dict[str, Engine]:
        """The members by name."""
        return {name: member.engine for name, member in self._members.items()}

    @property
    def computes_outside(self) -> bool:
        """Whether all members compute in other processes, so that they can be waited for."""
        return all(hasattr(member.engine, "waitables") for member in self._members.values())

    @property
    def num_restarts(self) -> int:
        """How often the process of a member was started again."""
        return sum(getattr(member.engine, "num_restarts", 0) for member in self._members.values())

    @property
    def caps(self) -> Caps:
        """What all members promise; places and KV memory in sum. Waits until all are loaded."""
        if self._caps is None:
            for member in self._members.values():
                member.promise()
            self._totals.max_running = sum(member.max_running for member in self._members.values())
            self._caps = together(member.engine.caps for member in self._members.values())
            for member in self._members.values():
                self._touch(member)
            self._routes.rebuild(self._members.values())
        return self._caps

    def describe(self) -> list[dict[str, Any]]:
        """The members with their load, version, process and state."""
        return [member.describe() for member in self._members.values()]

    def join(self, name: str, engine: Engine, weights: Weights | None = None) -> None:
        """Take in another engine; it is used as soon as it serves the version of the pool.

        Args:
            name: not one of a member.
            engine: idle.
            weights: of the pool's version, for an engine that does not serve that; without them it waits for the next one.

        Raises:
            EngineError: the name is taken, or the engine promises less than the pool has promised.
        """
        if name in self._members:
            raise EngineError("two engines of a pool have one name", where=self.name, got=name)
        promised, both = self.caps, together([self.caps, engine.caps])
        modes = both.update_modes & promised.update_modes
        if replace(both, max_running=promised.max_running, kv_tokens=promised.kv_tokens, update_modes=modes) != promised:
            raise EngineError(
                "an engine promises less than the pool that it wants to join", where=name, got=engine.caps, expected=str(promised)
            )
        if weights is not None and engine.load().version != self._wanted:
            engine.update_weights(weights, self._wanted, "drain")
        self._add(name, engine)
        self._caps = None
        self._dispatch()

    def leave(self, name: str, *, finish: bool = False) -> None:
        """Let an engine go: its samples move to others with their tokens, and it is closed when it is empty.

        Args:
            name: of a member that is not the last.
            finish: let it end its samples first.

        Raises:
            EngineError: there is no such engine, or no other one.
        """
        member = self._members.get(name)
        if member is None:
            raise EngineError("a pool has no such engine", where=self.name, got=name, **choice(name, self._members, ""))
        if not any(not other.leaving for other in self._members.values() if other is not member):
            raise EngineError("the last engine of a pool cannot leave it", where=self.name, got=name)
        member.leaving = True
        self._touch(member)
        if not finish and member.open:
            for sample in member.open:
                self._entries[sample].moves = sample not in member.aborting
            member.engine.abort(list(member.open))
            self._touch(member)
        self._remove_if_empty(member)

    def _add(self, name: str, engine: Engine) -> None:
        member = self._members[name] = Member(name, engine, self._num_joined)
        self._num_joined += 1
        self._totals.add(member)
        self._touch(member)

    def _remove_if_empty(self, member: Member) -> None:
        if member.leaving and not member.open and self._members.pop(member.name, None) is not None:
            self._forget(member)

    def _forget(self, member: Member) -> None:
        """A member is gone: nothing of it is asked any more."""
        self._watch(member, None)
        self._to_roll.pop(member.name, None)
        member.stamp += 1
        member.usable = False
        self._totals.remove(member)
        self._totals.max_running -= member.max_running
        member.engine.close()
        self._caps = None
        self._routes.rebuild(self._members.values())

    # -- the source -----------------------------------------------------------------------------------------------

    def ready_at(self) -> float | None:
        """When the first member is; None when none has anything to do."""
        if self._outbox:
            return self._clock.now()
        while self._due and self._due[0][2] != self._due[0][3].stamp:
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def waitables(self) -> Sequence[Any]:
        """One object that can be read when any member in another process has something to say."""
        return (self._selector,) if self._selector.get_map() else ()

    def poll(self) -> list[Event]:
        """What the members have to report: those that are due, and those that can be read."""
        for member in self._with_news():
            if member.name in self._members:
                self._poll(member)
        self._roll()
        self._dispatch()
        events, self._outbox = self._outbox, []
        return events

    def _with_news(self) -> list[Member]:
        members: dict[int, Member] = {}
        if self._selector.get_map():
            members = {key.data.index: key.data for key, _ in self._selector.select(0)}
        now_s = self._clock.now()
        while self._due and self._due[0][0] <= now_s:
            _, _, stamp, member = heapq.heappop(self._due)
            if stamp == member.stamp:
                members[member.index], member.ready_s = member, None
        return [members[index] for index in sorted(members)]

    def _poll(self, member: Member) -> None:
        try:
            events = member.engine.poll()
        except ProcessError as error:
            self._give_up(member, error)
            return
        self._book(member, events)
        self._touch(member)
        self._remove_if_empty(member)

    def _give_up(self, member: Member, error: ProcessError) -> None:
        """A member that was lost too often: what it had reported counts, its samples are broken, and the others go on.

        Raises:
            ProcessError: there are no others, or it was lost in a way that is to end the run.
        """
        if error.where != "limits.restarts" or all(other.leaving for other in self._members.values() if other is not member):
            raise error
        reason = error.what
        self._lost.append(f"{member.name}: {reason}")
        with suppress(ProcessError):
            self._book(member, member.engine.poll())
        now_s = self._clock.now()
        self._book(member, [Broken(now_s, sample, reason) for sample in list(member.open)])
        del self._members[member.name]
        self._forget(member)

    def _book(self, member: Member, events: Iterable[Event]) -> None:
        for event in events:
            entry = self._entries.get(event.id) if isinstance(event, Progressed | Parked | Finished | Broken) else None
            if entry is None or entry.member is not member:
                raise EngineError("an engine reported a sample that it does not have", where=member.name, got=event)
            if event.time_s < self._now_s:  # engines have clocks of one origin, but their reports cross
                event = replace(event, time_s=self._now_s)
            self._now_s = event.time_s
            if isinstance(event, Progressed):
                entry.segments.append(event.segment)
                if not entry.withdrawn:
                    self._outbox.append(event)
            elif isinstance(event, Parked | Finished | Broken):
                self._ended(member, entry, event)

    def _ended(self, member: Member, entry: Entry, event: Parked | Finished | Broken) -> None:
        del member.open[event.id]
        member.aborting.discard(event.id)
        self._routes.left(event.id, member, keeps_kv=isinstance(event, Parked) and not member.leaving)
        if isinstance(event, Parked) and entry.moves:
            if event.segment is not None:
                entry.segments.append(event.segment)
                self._outbox.append(Progressed(event.time_s, event.id, event.segment))
            entry.sample, entry.segments, entry.member, entry.moves = entry.continued(), [], None, False
            self._queue[event.id] = entry
            return
        del self._entries[event.id]
        if not entry.withdrawn:
            self._outbox.append(event)

    def _touch(self, member: Member) -> None:
        """Note what a call has changed: its load, whether it can be used, when it is ready, what is read of it."""
        self._totals.update(member, member.engine.load())
        usable = not member.leaving and (member.version == self._wanted or self._serves_until_its_turn(member))
        if usable != member.usable:
            member.usable = usable
            self._routes.changed(member)
        ready_s = member.engine.ready_at()
        if ready_s != member.ready_s:
            member.ready_s, member.stamp = ready_s, member.stamp + 1
            if ready_s is not None:
                heapq.heappush(self._due, (ready_s, member.index, member.stamp, member))
            if len(self._due) > 1024 + 16 * len(self._members):
                self._due = [entry for entry in self._due if entry[2] == entry[3].stamp]
                heapq.heapify(self._due)
        if hasattr(member.engine, "waitables"):
            self._watch(member, next(iter(member.engine.waitables()), None))

    def _watch(self, member: Member, waitable: Any) -> None:
        if waitable is member.watched:
            return
        if member.watched is not None:
            with suppress(KeyError, ValueError, OSError):
                self._selector.unregister(member.watched)
        member.watched = waitable
        if waitable is not None:
            self._selector.register(waitable, selectors.EVENT_READ, member)

    def pending(self) -> list[str]:
        """What a caller who waits for this engine waits for."""
        lines = [f"{len(self._queue)} wait for a place"] if self._queue else []
        return lines + [f"{member.name}: {line}" for member in self._members.values() for line in member.engine.pending()]

    def waits(self) -> list[Wait]:
        """Those of the members, and the samples for which there is no place."""
        out = []
        for member in self._members.values():
            if hasattr(member.engine, "waits"):
                out += member.engine.waits()
            elif member.open:
                since_s = min(self._entries[sample].since_s for sample in member.open)
                out.append(Wait(member.name, "generate", tuple(map(str, member.open)), since_s, None))
        if self._queue:
            since_s = min(entry.since_s for entry in self._queue.values())
            out.append(Wait(f"{self.name} (no place)", "generate", tuple(map(str, self._queue)), since_s, None))
        return out

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, samples: Sequence[Sample]) -> None:
        """Accept all samples, or none and raise; those without a place wait here, in order."""
        seen = check_admission(samples, self._entries, self.caps.max_sample_tokens)
        now_s = self._clock.now()
        for sample in samples:
            self._entries[sample.id] = self._queue[sample.id] = Entry(sample, now_s)
        try:
            self._dispatch()
        except EngineError:
            self._withdraw(seen)
            raise

    def _withdraw(self, samples: Iterable[SampleId]) -> None:
        """An engine has refused one of a call's samples: none of the others is in the pool for its caller."""
        for sample in samples:
            entry = self._entries[sample]
            if self._queue.pop(sample, None) is not None or entry.member is None or sample not in entry.member.open:
                del self._entries[sample]
            else:
                entry.withdrawn = True
                entry.member.engine.abort([sample])
                self._touch(entry.member)

    def _dispatch(self) -> None:
        """Give out what waits, as far as there is room; nothing while engines differ in their version, unless an update rolls."""
        if not self._queue or self.caps is None or not (self._rolls or self._totals.served(self._wanted) == self._wanted):
            return
        given: dict[Member, list[Entry]] = {}
        while self._queue:
            sample = next(iter(self._queue))
            member = self._routes.choose(self._queue[sample].sample)
            if member is None:
                break
            entry = self._queue.pop(sample)
            entry.member, member.open[sample] = member, None
            self._routes.came(sample, member)
            given.setdefault(member, []).append(entry)
        for member, entries in given.items():
            try:
                member.engine.submit([entry.sample for entry in entries])
            except EngineError:
                self._refused(given, member)
                raise
            self._touch(member)

    def _refused(self, given: Mapping[Member, Sequence[Entry]], by: Member) -> None:
        """The members from `by` on have not got their samples."""
        late = list(given)[list(given).index(by) :]
        for member in late:
            for entry in given[member]:
                del member.open[entry.sample.id]
                self._routes.left(entry.sample.id, member, keeps_kv=False)
                entry.member, self._queue[entry.sample.id] = None, entry

    def abort(self, ids: Sequence[SampleId] | None = None) -> None:
        """Stop these samples; ids that are not here are ignored."""
        asked: dict[Member, list[SampleId]] = {}
        for sample in list(self._entries) if ids is None else ids:
            entry = self._entries.get(sample)
            if entry is None or entry.withdrawn:
                continue
            entry.moves = False
            if entry.member is not None:
                asked.setdefault(entry.member, []).append(sample)
            else:
                del self._queue[sample], self._entries[sample]
                self._now_s = max(self._now_s, self._clock.now())
                self._outbox.append(Parked(self._now_s, sample, None))
        for member, samples in asked.items():
            member.aborting.update(samples)
            member.engine.abort(samples)
            self._touch(member)

    def score(self, samples: Sequence[Sample]) -> list[npt.NDArray[np.float32]]:
        """Log-probs (T,) of each sample's response, by one engine that serves the version of the pool.

        Raises:
            EngineError: none does.
        """
        members = [member for member in self._members.values() if member.usable and member.version == self._wanted]
        if not members:
            raise EngineError("no engine of a pool can score now", where=self.name, got=self.describe())
        member = min(members, key=lambda member: member.fraction)
        try:
            return member.engine.score(samples)
        finally:
            self._touch(member)

    # -- weights --------------------------------------------------------------------------------------------------

    def update_weights(self, weights: Weights, version: Version, mode: UpdateMode = "drain") -> None:
        """Switch all members to new weights; `load().version` is the new one when every member that is up serves it.

        In the mode "rolling" they drain one after the other, and `weights` must stay as they are until all have them.
        """
        self._wanted, self._weights, self._rolls, self._rolling = version, weights, mode == "rolling", None
        self._to_roll = {name: member for name, member in self._members.items() if self._rolls and member.usable}
        for name, member in self._members.items():
            if name not in self._to_roll:
                self._update(member, "drain" if self._rolls else mode)
        if mode != "keep_kv":
            self._routes.forget_kv()
        self._roll()
        self._dispatch()

    def _update(self, member: Member, mode: UpdateMode) -> None:
        if hasattr(member.engine, "shared"):
            self._weights = member.engine.shared(self._weights, self._wanted)
        member.engine.update_weights(self._weights, self._wanted, mode)
        self._touch(member)

    def _roll(self) -> None:
        """Let the next member drain when the one before it serves the new version, is down, or is gone."""
        while self._to_roll and not self._is_draining():
            self._rolling = self._to_roll.pop(next(iter(self._to_roll)))
            self._update(self._rolling, "drain")
        if not self._to_roll:
            self._weights = {}

    def _serves_until_its_turn(self, member: Member) -> bool:
        return member.name in self._to_roll and member.version != NO_VERSION

    def _is_draining(self) -> bool:
        member = self._rolling
        return member is not None and member.name in self._members and member.version not in (self._wanted, NO_VERSION)

    def restart(self, reason: str) -> None:
        """Restart the members that are late: with stopping samples, or behind in their version.

        Raises:
            EngineError: one of them cannot be restarted.
        """
        for member in list(self._members.values()):
            if not member.aborting and (member.version in (self._wanted, NO_VERSION) or member.name in self._to_roll):
                continue
            restart = getattr(member.engine, "restart", None)
            if restart is None:
                told = f"engine {member.name} {reason}, and cannot be restarted"
                raise EngineError(told, where="limits", got=member.describe())
            try:
                restart(reason)
            except ProcessError as error:
                self._give_up(member, error)
            else:
                self._touch(member)

    def sleep(self) -> None:
        """Have all members give their memory back; they have no samples."""
        for member in self._members.values():
            member.engine.sleep()  # type: ignore[attr-defined]
            self._touch(member)

    def wake(self) -> None:
        """Have all members take their memory again."""
        for member in self._members.values():
            member.engine.wake()  # type: ignore[attr-defined]

    def load(self) -> Load:
        """The sum over all members, and what waits in the pool."""
        first = next(iter(self._members.values()))
        return self._totals.load(len(self._queue), self._totals.served(self._wanted), first.speculation)

    def close(self) -> None:
        """Close all members; nothing more is reported."""
        for member in self._members.values():
            self._watch(member, None)
            member.engine.close()
        self._selector.close()
        self._entries, self._queue, self._outbox, self._due = {}, {}, [], []
