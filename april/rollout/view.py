"""What a schedule sees and what it may ask for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from april.core.ids import GroupId, SampleId, Version
from april.engines.base import UpdateMode


class Status(StrEnum):
    """Where a sample is. The last four are ends.

    FRESH -> RUNNING -> SCORING -> READY -> TRAINING -> TRAINED
             |     ^                 |
             v     |                 `-> FILTERED
             PARKED
    anything that is not an end -> EVICTED or FAILED
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
    """

    issue: int = 0
    start: tuple[SampleId, ...] = ()
    park: tuple[SampleId, ...] = ()
    emit: tuple[GroupId, ...] = ()
    max_token_lag: int | None = None
    evict: tuple[tuple[GroupId, str], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.issue or self.start or self.park or self.emit or self.evict)


class View(Protocol):
    """Counters and ordered queues, kept up to date by the pool; reading any of them costs no walk over all samples.

    A group is *waiting* when it has samples to start, *active* when samples of it run or are being scored, *ready* when
    every member has its outcome and the filters kept it. All queues are ordered by age, except `ready_groups`, which is
    ordered by completion, so that surplus groups of earlier steps come first.

    Attributes:
        version: weights in use.
        updating: a batch is out and the engine does not serve its update yet.
        groups_per_step, group_size: the shape of a batch.
        issuable: groups that may still be issued (prompts that are free now, and batches still wanted).
        num_groups: issued groups that are not emitted or dropped (waiting, active and ready).
        num_active_groups, num_ready_groups: groups of those kinds.
        num_training_groups: groups of the batch that is out, until the engine serves its update.
        num_running: samples in the engine.
        step_tokens: response tokens generated since the last batch was cut.
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

    def groups_by_version(self) -> Mapping[Version, tuple[GroupId, ...]]:
        """Groups with tokens, by the oldest version that sampled any of them; versions ascending."""
        ...


Memo = Mapping[str, Any]


class Schedule(Protocol):
    """A level-triggered rule: called once after each batch of events until it returns an empty plan.

    `plan` depends on the view and the memo only. On an unchanged view it must return an empty plan, else the driver
    would never stop asking. The memo is JSON and is saved with the pool.
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
