"""The pool owns every sample from issue to its end, and every transition between.

    issue -> start -> (progress)* -> park -> start ... -> finish -> judge -> [group complete] -> keep | filter -> emit -> trained

All state changes go through the methods below, each of which is written to the journal; replaying the journal rebuilds the
pool. The ledger is checked by the driver after each batch of events.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from april.core.errors import LedgerError
from april.core.group import Failure, Group, Outcome
from april.core.ids import GroupId, SampleId, Version
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment, Stop
from april.core.sampling import SamplingSpec
from april.rollout.forecast import LengthSums
from april.rollout.group_state import GroupState
from april.rollout.ledger import Ledger
from april.rollout.queues import Age, GroupsByAge, RankedGroups, SortedGroups
from april.rollout.view import Status

WAITING = (Status.FRESH, Status.PARKED)
SPENT = (Status.PARKED, Status.READY)
Listener = Callable[[str, dict[str, Any]], None]


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
        self.num_active_groups = self.num_generating_groups = 0
        self.num_kept_groups = self.num_dropped_groups = 0
        self.lengths = LengthSums()
        self.training: dict[GroupId, Group] = {}
        self.ready: dict[GroupId, None] = {}
        self.running: dict[SampleId, None] = {}
        self._waiting, self._restarted = SortedGroups(), SortedGroups()
        self._unready, self._ready_by_age = SortedGroups(), SortedGroups()
        self._interrupted: dict[GroupId, None] = {}
        self._decided: dict[GroupId, None] = {}
        self._longest = RankedGroups()
        self._ages = GroupsByAge()
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
        return self._waiting.first(limit)

    @property
    def num_waiting_groups(self) -> int:
        """Groups with samples to start."""
        return len(self._waiting)

    @property
    def num_restarted_groups(self) -> int:
        """Groups that were restarted and have no token yet."""
        return len(self._restarted)

    def restarted_groups(self, limit: int | None = None) -> tuple[GroupId, ...]:
        """Groups that were restarted and have no token yet, the oldest first."""
        return self._restarted.first(limit)

    def interrupted_groups(self) -> tuple[GroupId, ...]:
        """Groups in flight with samples to start: others of their members are active, or their engine was lost."""
        return tuple(sorted(self._interrupted))

    def longest_groups(self, limit: int | None = None) -> tuple[GroupId, ...]:
        """Groups with samples to start: not begun, then without a forecast, then the longest forecast first."""
        return self._longest.first(limit)

    def decided_samples(self) -> tuple[SampleId, ...]:
        """Unfinished spare members of groups that are decided."""
        return tuple(group.member(member) for group in self._decided for member in self.groups[group].spare)

    def spent_samples(self, group: GroupId) -> tuple[SampleId, ...]:
        """Members that a restart would set back."""
        members = (group.member(member) for member in self.groups[group].samples)
        return tuple(sample for sample in members if self.status[sample] in SPENT)

    def oldest_unready(self) -> GroupId | None:
        """The first issued open group that is not ready."""
        return next(iter(self._unready), None)

    def num_ready_before(self, serial: int) -> int:
        """Ready groups that were issued before this serial."""
        return self._ready_by_age.num_before(serial)

    def waiting_samples(self, group: GroupId) -> tuple[SampleId, ...]:
        """Samples of a group that can be started, by member."""
        return tuple(group.member(member) for member in sorted(self.groups[group].waiting))

    def running_samples(self) -> tuple[SampleId, ...]:
        """Samples in the engine, in order of submission."""
        return tuple(self.running)

    def ages(self) -> tuple[Age, ...]:
        """How many open groups there are of each age, and how many of those are ready; the oldest first."""
        return self._ages.ages()

    def groups_of(self, version: Version) -> tuple[GroupId, ...]:
        """Open groups whose oldest token is of this version, by age."""
        return self._ages.of(version)

    # -- transitions --------------------------------------------------------------------------------------------------

    def issue(
        self,
        epoch: int,
        prompt: Prompt,
        spec: SamplingSpec,
        size: int,
        *,
        wanted: int | None = None,
        budgets: tuple[int, ...] | None = None,
        greedy: int = 0,
    ) -> GroupId:
        """Create a group of `size` empty samples of a prompt that has no open group.

        Args:
            wanted: sampled members that must finish; the others of them are spare. None: all.
            budgets: response tokens of each sampled member, where they are below those of the spec.
            greedy: members that are not sampled but greedy, the last ones.
        """
        group = GroupId(self.next_serial, epoch, prompt.id)
        self.next_serial += 1
        self.ledger.issue(size)
        state = GroupState(group, prompt, spec, size, wanted=wanted, budgets=budgets, greedy=greedy)
        self.add_group(state, [Status.FRESH] * size, None)
        more = {"wanted": wanted, "budgets": budgets, "greedy": greedy or None}
        given = {name: value for name, value in more.items() if value is not None}
        self.listener("issue", {"group": group, "prompt": prompt, "spec": spec, "size": size, **given})
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
        self.num_generating_groups += bool(state.running)
        self._open_prompts[state.prompt.id] += 1
        self._unready.put(state.id, True)
        self._age(state, oldest_version)
        self._refresh(state)

    def start(self, samples: Iterable[SampleId], version: Version) -> list[Sample]:
        """Mark samples as submitted to an engine that serves `version`."""
        ids = list(samples)
        touched: dict[GroupId, GroupState] = {}
        for sample in ids:
            state = touched[sample.group] = self._state(sample)
            self._move(sample, Status.RUNNING)
            state.waiting.discard(sample.member)
            state.lost = False
            self._enter_engine(state, sample)
            if state.oldest_version is None:
                self._age(state, version)
        for state in touched.values():
            self._refresh(state)
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
        state.lost = True
        self._wait(state, sample)
        self.listener("lose", {"sample": sample})

    def finish(self, sample: SampleId, segment: Segment | None, stop: Stop) -> Sample:
        """A running sample ended by itself and goes to its reward."""
        state = self._running_state(sample)
        if segment is not None:
            self._append(state, sample, segment)
        self._move(sample, Status.SCORING)
        self._leave_engine(state, sample)
        self._finished(state, sample, stop)
        self.listener("finish", {"sample": sample, "segment": segment, "stop": stop})
        return state.samples[sample.member]

    def stop(self, sample: SampleId) -> Sample:
        """A parked sample ends here, as if at its budget, and goes to its reward."""
        state = self._state(sample)
        if self.status[sample] is not Status.PARKED or not len(self[sample]):
            raise LedgerError(
                "a sample that holds nothing was stopped", where=str(sample), got=self.status[sample], expected="parked"
            )
        self._move(sample, Status.SCORING)
        state.waiting.discard(sample.member)
        self._finished(state, sample, "length")
        self.listener("stop", {"sample": sample})
        return state.samples[sample.member]

    def restart(self, samples: Iterable[SampleId]) -> None:
        """Parked and judged samples give up their tokens and outcomes; they wait, and draw the same random numbers again."""
        ids = list(samples)
        touched: dict[GroupId, GroupState] = {}
        for sample in ids:
            state = touched[sample.group] = self._state(sample)
            self._move(sample, Status.FRESH)
            state.outcomes.pop(sample.member, None)
            state.samples[sample.member] = Sample(sample, state.prompt, state.samples[sample.member].spec)
            state.waiting.add(sample.member)
        for state in touched.values():
            if state.ready:
                self._set_ready(state, False)
            state.restarts += 1
            state.longest = max((len(s) for s in state.samples.values() if s.stop is not None), default=-1)
            if not state.running:
                kept = (s for m, s in state.samples.items() if not isinstance(state.outcomes.get(m), Failure))  # never trained
                versions = [version for sample in kept if (version := sample.oldest_version) is not None]
                self._age(state, min(versions, default=None))
            self._refresh(state)
        self.listener("restart", {"samples": ids})

    def judge(self, sample: SampleId, outcome: Outcome) -> GroupState:
        """A finished sample has its reward, or failed to get one."""
        state = self._state(sample)
        if isinstance(outcome, Failure):
            self._move(sample, Status.FAILED, outcome.reason)
        else:
            self._move(sample, Status.READY)
        self.num_active_groups -= state.active
        state.scoring.discard(sample.member)
        self.num_active_groups += state.active
        state.outcomes[sample.member] = outcome
        self._refresh(state)
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
        state.outcomes[sample.member] = Failure(reason)
        self._refresh(state)
        self.listener("fail", {"sample": sample, "reason": reason})
        return state

    def keep(self, group: GroupId) -> None:
        """A complete group passed the filters: it is ready, behind those that completed before."""
        self._set_ready(self._complete(group), True)
        self.num_kept_groups += 1
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
        self.num_dropped_groups += end is not Status.EVICTED
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
        self.ledger.move(self.status[sample], after, reason, sample)
        self.status[sample] = after

    def _append(self, state: GroupState, sample: SampleId, segment: Segment) -> None:
        state.samples[sample.member] = state.samples[sample.member].extended(segment)
        if len(segment) and (state.oldest_version is None or segment.version < state.oldest_version):
            self._age(state, segment.version)

    def _age(self, state: GroupState, version: Version | None) -> None:
        self._ages.move(state.id, state.oldest_version, version, state.ready)
        state.oldest_version = version

    def _set_ready(self, state: GroupState, ready: bool) -> None:
        state.ready = ready
        if ready:
            self.ready[state.id] = None
        else:
            del self.ready[state.id]
        self._ready_by_age.put(state.id, ready)
        self._unready.put(state.id, not ready)
        self._ages.count_ready(state.oldest_version, 1 if ready else -1)

    def _enter_engine(self, state: GroupState, sample: SampleId) -> None:
        self.num_active_groups += not state.active
        self.num_generating_groups += not state.running
        state.running.add(sample.member)
        self.running[sample] = None

    def _leave_engine(self, state: GroupState, sample: SampleId) -> None:
        state.running.discard(sample.member)
        self.num_generating_groups -= not state.running
        self.num_active_groups -= not state.active
        del self.running[sample]

    def _finished(self, state: GroupState, sample: SampleId, stop: Stop) -> None:
        """A sample that has left the engine, or was parked, goes to its reward."""
        finished = state.samples[sample.member] = state.samples[sample.member].finished(stop)
        self.num_active_groups += not state.active
        state.scoring.add(sample.member)
        state.longest = max(state.longest, len(finished))
        self.lengths.add(len(finished), len(finished.prompt.token_ids))
        self._refresh(state)

    def _wait(self, state: GroupState, sample: SampleId) -> None:
        self._move(sample, Status.PARKED)
        self._leave_engine(state, sample)
        state.waiting.add(sample.member)
        if not state.running and not any(len(s) for s in state.samples.values()):
            self._age(state, None)
        self._refresh(state)

    def _refresh(self, state: GroupState) -> None:
        """Put a group in the queues that its members' places call for."""
        group, waits = state.id, bool(state.waiting)
        self._waiting.put(group, waits)
        self._longest.put(group, state.rank)
        if state.restarts:
            self._restarted.put(group, waits and not state.active and state.oldest_version is None)
        _mark(self._interrupted, group, waits and (state.active or state.lost))
        if state.wanted < len(state.samples):
            _mark(self._decided, group, bool(state.spare))

    def _complete(self, group: GroupId) -> GroupState:
        state = self.groups[group]
        if not state.complete:
            raise LedgerError("a group was taken before all members had an outcome", where=str(group))
        return state

    def _forget(self, state: GroupState, keep_status: bool = False) -> None:
        if state.ready:
            self._set_ready(state, False)
        self._age(state, None)
        state.waiting.clear()
        state.running.clear()
        self._refresh(state)
        self._unready.put(state.id, False)
        self._open_prompts[state.prompt.id] -= 1
        if not self._open_prompts[state.prompt.id]:
            del self._open_prompts[state.prompt.id]
        del self.groups[state.id]
        if not keep_status:
            for member in state.samples:
                del self.status[state.id.member(member)]


def _mark(groups: dict[GroupId, None], group: GroupId, present: bool) -> None:
    if present:
        groups[group] = None
    else:
        groups.pop(group, None)
