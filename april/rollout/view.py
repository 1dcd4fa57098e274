"""What a schedule sees and what it may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from april.core.ids import GroupId, SampleId, Version
from april.engines.base import Caps, Load, UpdateMode
from april.rollout.forecast import LengthSums
from april.rollout.queues import Age


class Status(StrEnum):
    """Where a sample is. The last four are ends.

    FRESH -> RUNNING -> SCORING -> READY -> TRAINING -> TRAINED
             |     ^    ^            |
             v     |    | (stop)     `-> FILTERED
             PARKED ----'
    anything that is not an end -> EVICTED or FAILED; PARKED or READY -> FRESH (restart: the tokens are given up)
    """

    FRESH = "fresh"
    RUNNING = "running"
    PARKED = "parked"
    SCORING = "scoring"
    READY = "ready"
    TRAINING = "training"
    TRAINED = "trained"
    FILTERED = "filtered"
    EVICTED = "evicted"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do next; an empty plan means "wait for events".

    Attributes:
        issue: new groups to create from the prompt sampler.
        start: waiting samples to submit to the engine (fresh or parked alike).
        park: running samples to stop.
        emit: ready groups to train on, as one batch.
        max_token_lag: with `emit`: older tokens give no gradient.
        evict: groups to drop, each with its reason.
        extra_samples: with `issue`: members beyond `group_size`; a group is decided by its first `group_size` finishers.
        window_tokens: with `start`: each of these samples is parked when it has so many new tokens.
        restart: parked or judged samples that give up their tokens and are generated again from nothing.
        stop: running or parked samples that end here, as if at their budget: they are judged and trained on.
        cut: unfinished samples that end without a reward, each with its reason.
    """

    issue: int = 0
    start: tuple[SampleId, ...] = ()
    park: tuple[SampleId, ...] = ()
    emit: tuple[GroupId, ...] = ()
    max_token_lag: int | None = None
    evict: tuple[tuple[GroupId, str], ...] = ()
    extra_samples: int = 0
    window_tokens: int | None = None
    restart: tuple[SampleId, ...] = ()
    stop: tuple[SampleId, ...] = ()
    cut: tuple[tuple[SampleId, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.issue or self.start or self.park or self.emit or self.evict or self.restart or self.stop or self.cut)


class View(Protocol):
    """Counters and ordered queues, kept up to date by the pool; reading any of them costs no walk over all samples.

    A group is *waiting* when it has samples to start, *active* when samples of it run or are being scored, *ready* when
    every member has its outcome and the filters kept it. All queues are ordered by age, except `ready_groups`, which is
    ordered by completion, so that surplus groups of earlier steps come first. A call costs about as much as its answer is
    long.

    Attributes:
        version: weights in use.
        updating: a batch is out and the engine does not serve its update yet.
        groups_per_step: groups of a batch.
        group_size: samples of a group as it is issued, greedy members included.
        issuable: groups that may still be issued (prompts that are free now, and batches still wanted).
        num_groups: issued groups that are not emitted or dropped (waiting, active and ready).
        num_active_groups, num_ready_groups: groups of those kinds.
        num_training_groups: groups of the batch that is out, until the engine serves its update.
        num_waiting_groups, num_restarted_groups: groups with samples to start; those of them that were restarted and have no
            token yet.
        num_generating_groups: groups with samples in the engine; the other active ones are only being scored.
        num_kept_groups, num_dropped_groups: complete groups so far that the filters kept, and that they or failures took.
        num_running: samples in the engine.
        step_tokens: response tokens generated since the last batch was cut.
        lengths: sums over all samples that have finished.
        load, caps: what the engine is doing, and what it promises.
    """

    @property
    def version(self) -> Version: ...
    @property
    def updating(self) -> bool: ...
    @property
    def groups_per_step(self) -> int: ...
    @property
    def group_size(self) -> int: ...
    @property
    def issuable(self) -> int: ...
    @property
    def num_groups(self) -> int: ...
    @property
    def num_active_groups(self) -> int: ...
    @property
    def num_ready_groups(self) -> int: ...
    @property
    def num_training_groups(self) -> int: ...
    @property
    def num_running(self) -> int: ...
    @property
    def step_tokens(self) -> int: ...
    @property
    def num_waiting_groups(self) -> int: ...
    @property
    def num_restarted_groups(self) -> int: ...
    @property
    def num_generating_groups(self) -> int: ...
    @property
    def num_kept_groups(self) -> int: ...
    @property
    def num_dropped_groups(self) -> int: ...
    @property
    def lengths(self) -> LengthSums: ...
    @property
    def load(self) -> Load: ...
    @property
    def caps(self) -> Caps: ...

    def waiting_groups(self, limit: int | None = None) -> tuple[GroupId, ...]:
        """The oldest groups with samples to start."""
        ...

    def waiting_samples(self, group: GroupId) -> tuple[SampleId, ...]:
        """The samples of a group that can be started."""
        ...

    def running_samples(self) -> tuple[SampleId, ...]:
        """All samples in the engine."""
        ...

    def ready_groups(self, limit: int | None = None) -> tuple[GroupId, ...]:
        """The first completed groups."""
        ...

    def is_active(self, group: GroupId) -> bool:
        """Whether samples of the group run or are being scored."""
        ...

    def is_ready(self, group: GroupId) -> bool:
        """Whether the group could be emitted now."""
        ...

    def ages(self) -> tuple[Age, ...]:
        """Groups with tokens, counted by the oldest version that sampled any of them; versions ascending."""
        ...

    def groups_of(self, version: Version) -> tuple[GroupId, ...]:
        """The groups whose oldest token is of this version."""
        ...

    def oldest_version(self, group: GroupId) -> Version | None:
        """The version of a group's oldest token; None when it has no token."""
        ...

    def newest_version(self, sample: SampleId) -> Version | None:
        """The version of an open sample's last token; None when it has no token."""
        ...

    def interrupted_groups(self) -> tuple[GroupId, ...]:
        """Groups in flight that have samples to start: others of their members are active, or their engine was lost."""
        ...

    def restarted_groups(self, limit: int | None = None) -> tuple[GroupId, ...]:
        """The oldest groups that were restarted and have no token yet."""
        ...

    def longest_groups(self, limit: int | None = None) -> tuple[GroupId, ...]:
        """Groups with samples to start: first those whose first member has not been started, then those of which none has
        finished, then by the longest finished member, descending."""
        ...

    def forecast(self, group: GroupId) -> int | None:
        """Response tokens of a group's longest finished member; None before the first has finished."""
        ...

    def running_in(self, group: GroupId) -> tuple[SampleId, ...]:
        """The samples of a group that are in the engine."""
        ...

    def spent_samples(self, group: GroupId) -> tuple[SampleId, ...]:
        """The samples of a group that a restart would set back: parked, or judged."""
        ...

    def decided_samples(self) -> tuple[SampleId, ...]:
        """Unfinished samples of groups in which as many as a group needs have finished."""
        ...

    def oldest_unready(self) -> GroupId | None:
        """The first issued of the open groups that are not ready."""
        ...

    def num_ready_before(self, serial: int) -> int:
        """Ready groups that were issued before this serial."""
        ...


Memo = Mapping[str, Any]


class Schedule(Protocol):
    """A level-triggered rule: called once after each batch of events until it returns an empty plan.

    `plan` depends on the view and the memo only. On an unchanged view it must return an empty plan, else the driver
    would never stop asking. The memo is JSON and is saved with the pool.

    A rule that generates while a batch is trained on has an attribute `overlaps`, which is true; see `overlaps`.
    """

    @property
    def max_lag_steps(self) -> int:
        """The largest lag, in updates, that a trained token can have; 0 promises on-policy data."""
        ...

    @property
    def update_mode(self) -> UpdateMode:
        """How the engine takes new weights while samples may be running."""
        ...

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]: ...


def overlaps(schedule: Schedule) -> bool:
    """Whether a schedule says that it generates while a batch is trained on; others are taken to wait for the update."""
    return bool(getattr(schedule, "overlaps", False))
