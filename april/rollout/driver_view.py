"""What a schedule sees of a driver: its pool, its engine and the step it is in."""

from __future__ import annotations

from typing import TYPE_CHECKING

from april.core.ids import GroupId, SampleId, Version
from april.engines.base import Caps, Load
from april.rollout.forecast import LengthSums
from april.rollout.queues import Age

if TYPE_CHECKING:
    from april.rollout.driver import Driver


class DriverView:
    """The `View` of a driver's pool."""

    __slots__ = ("_driver", "_pool")

    def __init__(self, driver: Driver) -> None:
        self._driver, self._pool = driver, driver.pool

    @property
    def version(self) -> Version:
        return self._driver.version

    @property
    def updating(self) -> bool:
        return self._driver.emitted_steps > self._driver.version

    @property
    def groups_per_step(self) -> int:
        return self._driver.groups_per_step

    @property
    def group_size(self) -> int:
        return self._driver.group_size + self._driver.greedy_members

    @property
    def issuable(self) -> int:
        return self._driver.issuable()

    @property
    def num_groups(self) -> int:
        return len(self._pool.groups)

    @property
    def num_active_groups(self) -> int:
        return self._pool.num_active_groups

    @property
    def num_ready_groups(self) -> int:
        return len(self._pool.ready)

    @property
    def num_training_groups(self) -> int:
        return self._driver.groups_out if self.updating else 0

    @property
    def num_running(self) -> int:
        return self._pool.num_running

    @property
    def step_tokens(self) -> int:
        return self._driver.engine.load().generated_tokens - self._driver.tokens_at_cut

    def waiting_groups(self, limit: int | None = None) -> tuple[GroupId, ...]:
        return self._pool.waiting_groups(limit)

    def waiting_samples(self, group: GroupId) -> tuple[SampleId, ...]:
        return self._pool.waiting_samples(group)

    def running_samples(self) -> tuple[SampleId, ...]:
        return self._pool.running_samples()

    def ready_groups(self, limit: int | None = None) -> tuple[GroupId, ...]:
        return tuple(self._pool.ready)[:limit]

    def is_active(self, group: GroupId) -> bool:
        return self._pool.groups[group].active

    def is_ready(self, group: GroupId) -> bool:
        return group in self._pool.ready

    @property
    def num_waiting_groups(self) -> int:
        return self._pool.num_waiting_groups

    @property
    def num_restarted_groups(self) -> int:
        return self._pool.num_restarted_groups

    @property
    def num_generating_groups(self) -> int:
        return self._pool.num_generating_groups

    @property
    def num_kept_groups(self) -> int:
        return self._pool.num_kept_groups

    @property
    def num_dropped_groups(self) -> int:
        return self._pool.num_dropped_groups

    @property
    def lengths(self) -> LengthSums:
        return self._pool.lengths

    @property
    def load(self) -> Load:
        return self._driver.engine.load()

    @property
    def caps(self) -> Caps:
        return self._driver.engine.caps

    def ages(self) -> tuple[Age, ...]:
        return self._pool.ages()

    def groups_of(self, version: Version) -> tuple[GroupId, ...]:
        return self._pool.groups_of(version)

    def oldest_version(self, group: GroupId) -> Version | None:
        return self._pool.groups[group].oldest_version

    def newest_version(self, sample: SampleId) -> Version | None:
        spans = self._pool[sample].spans
        return spans[-1].version if spans else None

    def interrupted_groups(self) -> tuple[GroupId, ...]:
        return self._pool.interrupted_groups()

    def restarted_groups(self, limit: int | None = None) -> tuple[GroupId, ...]:
        return self._pool.restarted_groups(limit)

    def longest_groups(self, limit: int | None = None) -> tuple[GroupId, ...]:
        return self._pool.longest_groups(limit)

    def forecast(self, group: GroupId) -> int | None:
        longest = self._pool.groups[group].longest
        return longest if longest >= 0 else None

    def running_in(self, group: GroupId) -> tuple[SampleId, ...]:
        return tuple(group.member(member) for member in sorted(self._pool.groups[group].running))

    def spent_samples(self, group: GroupId) -> tuple[SampleId, ...]:
        return self._pool.spent_samples(group)

    def decided_samples(self) -> tuple[SampleId, ...]:
        return self._pool.decided_samples()

    def oldest_unready(self) -> GroupId | None:
        return self._pool.oldest_unready()

    def num_ready_before(self, serial: int) -> int:
        return self._pool.num_ready_before(serial)
