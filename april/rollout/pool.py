"""The pool owns every sample from issue to its end, and every transition between.

    issue -> start -> (progress)* -> park -> start ... -> finish -> judge -> [group complete] -> keep | filter -> emit -> trained

All state changes go through the methods below, each of which is written to the journal; replaying the journal rebuilds the
pool. The ledger is checked by the driver after each batch of events.
"""

from __future__ import annotations

import bisect
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from april.core.errors import LedgerError
from april.core.group import Failure, Group, Outcome
from april.core.ids import GroupId, SampleId, Version
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment, Stop
from april.core.sampling import SamplingSpec
from april.rollout.ledger import Ledger
from april.rollout.view import Status

WAITING = (Status.FRESH, Status.PARKED)
Listener = Callable[[str, dict[str, Any]], None]


class GroupState:
    """One open group: its members by status, and how old its tokens are."""

    __slots__ = (
        "id",
        "losses",
        "oldest_version",
        "outcomes",
        "prompt",
        "ready",
        "running",
        "samples",
        "scoring",
        "spec",
        "waiting",
    )

    def __init__(self, group: GroupId, prompt: Prompt, spec: SamplingSpec, size: int) -> None:
        self.id, self.prompt, self.spec = group, prompt, spec
        self.samples = {member: Sample(group.member(member), prompt, spec) for member in range(size)}
        self.outcomes: dict[int, Outcome] = {}
        self.waiting = set(range(size))
        self.running: set[int] = set()
        self.scoring: set[int] = set()
        self.losses = dict.fromkeys(range(size), 0)
        self.oldest_version: Version | None = None
        self.ready = False

    @property
    def complete(self) -> bool:
        """Whether every member has an outcome; derived, never stored."""
        return len(self.outcomes) == len(self.samples)

    @property
    def active(self) -> bool:
        return bool(self.running or self.scoring)

    def to_group(self) -> Group:
        """The finished group."""
        members = sorted(self.samples)
        return Group(self.id, tuple(self.samples[m] for m in members), tuple(self.outcomes[m] for m in members))


class Pool:
    """Every open sample, and counts of all that have ended.

    Args:
        listener: told of each transition as (name, arguments) once it has been made; the journal.
    """

    def __init__(self, listener: Listener | None = None) -> None:
        self.ledger = Ledger()
        self.groups: dict[GroupId, GroupState] = {}
        self.status: dict[SampleId, Status] = {}
        self.next_serial = 0
        self.num_active_groups = 0
        self.training: dict[GroupId, Group] = {}
        self.ready: dict[GroupId, None] = {}
        self._waiting: list[GroupId] = []
        self.running: dict[SampleId, None] = {}
        self._by_version: dict[Version, dict[GroupId, None]] = defaultdict(dict)
        self._open_prompts: dict[str, int] = defaultdict(int)
        self.listener: Listener = listener or (lambda _name, _arguments: None)

    # -- queries ------------------------------------------------------------------------------------------------------

    def __getitem__(self, sample: SampleId) -> Sample:
        return self.groups[sample.group].samples[sample.member]

    @property
    def num_running(self) -> int:
        """Samples in the engine."""
        return len(self.running)

    def is_open(self, prompt: str) -> bool:
        """Whether a group of this prompt is open, so that it must not be issued again yet."""
        return self._open_prompts.get(prompt, 0) > 0

    def losses(self, sample: SampleId) -> int:
        """How often an open sample lost its engine."""
        return self._state(sample).losses[sample.member]

    def waiting_groups(self, limit: int | None = None) -> tuple[GroupId, ...]:
        """Groups with samples to start, the oldest first."""
        return tuple(self._waiting[:limit])

    def waiting_samples(self, group: GroupId) -> tuple[SampleId, ...]:
        """Samples of a group that can be started, by member."""
        return tuple(group.member(member) for member in sorted(self.groups[group].waiting))

    def running_samples(self) -> tuple[SampleId, ...]:
        """Samples in the engine, in order of submission."""
        return tuple(self.running)

    def groups_by_version(self) -> Mapping[Version, tuple[GroupId, ...]]:
        """Open groups with tokens, by the oldest version among them, ascending; groups of a version by age."""
        return {version: tuple(sorted(groups)) for version, groups in sorted(self._by_version.items()) if groups}

    # -- transitions --------------------------------------------------------------------------------------------------

    def issue(self, epoch: int, prompt: Prompt, spec: SamplingSpec, size: int) -> GroupId:
        """Create a group of `size` empty samples of a prompt that has no open group."""
        group = GroupId(self.next_serial, epoch, prompt.id)
        self.next_serial += 1
        self.ledger.issue(size)
        self.add_group(GroupState(group, prompt, spec, size), [Status.FRESH] * size, None)
        self.listener("issue", {"group": group, "prompt": prompt, "spec": spec, "size": size})
        return group

    def add_group(self, state: GroupState, statuses: Sequence[Status], oldest_version: Version | None) -> None:
        """Take in a group as it is, without counting it in the ledger: new, or restored from a checkpoint."""
        self.groups[state.id] = state
        for member, status in enumerate(statuses):
            sample = state.id.member(member)
            self.status[sample] = status
            if status is Status.RUNNING:
                state.running.add(member)
                self.running[sample] = None
            elif status is Status.SCORING:
                state.scoring.add(member)
        self.num_active_groups += state.active
        self._open_prompts[state.prompt.id] += 1
        self._age(state, oldest_version)
        if state.waiting:
            self._add_waiting(state.id)

    def start(self, samples: Iterable[SampleId], version: Version) -> list[Sample]:
        """Mark samples as submitted to an engine that serves `version`."""
        ids = list(samples)
        for sample in ids:
            state = self._state(sample)
            self._move(sample, Status.RUNNING)
            state.waiting.discard(sample.member)
            self._activity(state, functools.partial(state.running.add, sample.member))
            self.running[sample] = None
            if state.oldest_version is None:
                self._age(state, version)
            if not state.waiting:
                self._remove_waiting(state.id)
        self.listener("start", {"samples": ids, "version": version})
        return [self[sample] for sample in ids]

    def progress(self, sample: SampleId, segment: Segment) -> None:
        """Append tokens of a running sample."""
        state = self._running_state(sample)
        self._append(state, sample, segment)
        self.listener("progress", {"sample": sample, "segment": segment})

    def park(self, sample: SampleId, segment: Segment | None) -> None:
        """A running sample was stopped; it keeps its tokens and waits."""
        state = self._running_state(sample)
        if segment is not None:
            self._append(state, sample, segment)
        self._wait(state, sample)
        self.listener("park", {"sample": sample, "segment": segment})

    def lose(self, sample: SampleId) -> None:
        """The engine of a running sample is gone; it keeps the tokens that were reported and waits; the loss is counted."""
        state = self._running_state(sample)
        state.losses[sample.member] += 1
        self._wait(state, sample)
        self.listener("lose", {"sample": sample})

    def finish(self, sample: SampleId, segment: Segment | None, stop: Stop) -> Sample:
        """A running sample ended by itself and goes to its reward."""
        state = self._running_state(sample)
        if segment is not None:
            self._append(state, sample, segment)
        state.samples[sample.member] = state.samples[sample.member].finished(stop)
        self._move(sample, Status.SCORING)
        self._leave_engine(state, sample, scoring=True)
        self.listener("finish", {"sample": sample, "segment": segment, "stop": stop})
        return state.samples[sample.member]

    def judge(self, sample: SampleId, outcome: Outcome) -> GroupState:
        """A finished sample has its reward, or failed to get one."""
        state = self._state(sample)
        if isinstance(outcome, Failure):
            self._move(sample, Status.FAILED, outcome.reason)
        else:
            self._move(sample, Status.READY)
        self._activity(state, functools.partial(state.scoring.discard, sample.member))
        state.outcomes[sample.member] = outcome
        self.listener("judge", {"sample": sample, "outcome": outcome})
        return state

    def fail(self, sample: SampleId, reason: str) -> GroupState:
        """A waiting or running sample can never finish."""
        state = self._state(sample)
        running = self.status[sample] is Status.RUNNING
        self._move(sample, Status.FAILED, reason)
        if running:
            self._leave_engine(state, sample)
        state.waiting.discard(sample.member)
        if not state.waiting:
            self._remove_waiting(state.id)
        state.outcomes[sample.member] = Failure(reason)
        self.listener("fail", {"sample": sample, "reason": reason})
        return state

    def keep(self, group: GroupId) -> None:
        """A complete group passed the filters: it is ready, behind those that completed before."""
        self._complete(group).ready = True
        self.ready[group] = None
        self.listener("keep", {"group": group})

    def drop(self, group: GroupId, end: Status, reason: str) -> None:
        """End all members of a group that is not running: filtered, evicted or failed."""
        state = self.groups[group]
        if state.active:
            raise LedgerError("a group that is running cannot be dropped", where=str(group), expected="park it first")
        for member in state.samples:
            sample = group.member(member)
            if self.status[sample] is not Status.FAILED:
                self._move(sample, end, reason)
        self._forget(state)
        self.listener("drop", {"group": group, "end": end, "reason": reason})

    def emit(self, groups: Iterable[GroupId], max_token_lag: int | None = None) -> tuple[Group, ...]:
        """Hand ready groups to the trainer, the oldest first; the bound is only written down, to make the same batch again."""
        ids = sorted(groups)
        out = []
        for group in ids:
            if group not in self.ready:
                raise LedgerError("a group that is not ready was emitted", where=str(group), expected="each group once, complete")
            state = self.groups[group]
            finished = state.to_group()
            for sample, _ in finished.rewarded:
                self._move(sample.id, Status.TRAINING)
            self.training[group] = finished
            self._forget(state, keep_status=True)
            out.append(finished)
        self.listener("emit", {"groups": ids, "max_token_lag": max_token_lag})
        return tuple(out)

    def trained(self) -> None:
        """The update that used the emitted groups is done."""
        for finished in self.training.values():
            for sample, _ in finished.rewarded:
                self._move(sample.id, Status.TRAINED)
            for sample in finished.samples:
                del self.status[sample.id]
        self.training.clear()
        self.listener("trained", {})

    # -- inside -------------------------------------------------------------------------------------------------------

    def _state(self, sample: SampleId) -> GroupState:
        state = self.groups.get(sample.group)
        if state is None or sample not in self.status:
            raise LedgerError("an event names a sample that is not open", where=str(sample), expected="a sample of an open group")
        return state

    def _running_state(self, sample: SampleId) -> GroupState:
        state = self._state(sample)
        if self.status[sample] is not Status.RUNNING:
            raise LedgerError(
                "tokens came for a sample that does not run", where=str(sample), got=self.status[sample], expected="running"
            )
        return state

    def _move(self, sample: SampleId, after: Status, reason: str = "") -> None:
        self.ledger.move(self.status[sample], after, reason, str(sample))
        self.status[sample] = after

    def _append(self, state: GroupState, sample: SampleId, segment: Segment) -> None:
        state.samples[sample.member] = state.samples[sample.member].extended(segment)
        if len(segment) and (state.oldest_version is None or segment.version < state.oldest_version):
            self._age(state, segment.version)

    def _age(self, state: GroupState, version: Version | None) -> None:
        if state.oldest_version is not None:
            self._by_version[state.oldest_version].pop(state.id, None)
            if not self._by_version[state.oldest_version]:
                del self._by_version[state.oldest_version]
        state.oldest_version = version
        if version is not None:
            self._by_version[version][state.id] = None

    def _activity(self, state: GroupState, change: Callable[[], None]) -> None:
        before = state.active
        change()
        self.num_active_groups += state.active - before

    def _leave_engine(self, state: GroupState, sample: SampleId, scoring: bool = False) -> None:
        def change() -> None:
            state.running.discard(sample.member)
            if scoring:
                state.scoring.add(sample.member)

        self._activity(state, change)
        del self.running[sample]

    def _wait(self, state: GroupState, sample: SampleId) -> None:
        self._move(sample, Status.PARKED)
        self._leave_engine(state, sample)
        state.waiting.add(sample.member)
        self._add_waiting(state.id)
        if not state.running and not any(len(s) for s in state.samples.values()):
            self._age(state, None)

    def _add_waiting(self, group: GroupId) -> None:
        at = bisect.bisect_left(self._waiting, group)
        if at == len(self._waiting) or self._waiting[at] != group:
            self._waiting.insert(at, group)

    def _remove_waiting(self, group: GroupId) -> None:
        at = bisect.bisect_left(self._waiting, group)
        if at < len(self._waiting) and self._waiting[at] == group:
            del self._waiting[at]

    def _complete(self, group: GroupId) -> GroupState:
        state = self.groups[group]
        if not state.complete:
            raise LedgerError("a group was taken before all members had an outcome", where=str(group))
        return state

    def _forget(self, state: GroupState, keep_status: bool = False) -> None:
        self._age(state, None)
        self._remove_waiting(state.id)
        self.ready.pop(state.id, None)
        self._open_prompts[state.prompt.id] -= 1
        if not self._open_prompts[state.prompt.id]:
            del self._open_prompts[state.prompt.id]
        del self.groups[state.id]
        if not keep_status:
            for member in state.samples:
                del self.status[state.id.member(member)]
