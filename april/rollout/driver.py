"""One loop over sources of events.

      prompts            engine              rewards            trainer
         | issue            | tokens, ends      | outcomes         | update done
         v                  v                   v                  v
    +--------------------------- events, applied by the pool ---------------------------+
    |                      view -> schedule.plan -> plan, until empty                     |
    +----- issue ------ start / park ---------------- emit one batch --------- publish ----+

The driver waits for one thing only: the next event of any source. When no source has anything pending and the schedule
asks for nothing, it says so (`StallError`) with everything it knows. Which process does what: the driver, the pool and the
schedule live in the controlling process; an engine, a reward or a trainer is a source, whether it computes inside its `poll` or
elsewhere. So overlap of rollout and training is the schedule's choice, not a second driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from april.core.clock import Clock
from april.core.errors import EngineError, Interrupted, RolloutError, StallError
from april.core.event import Broken, Event, Finished, Judged, Parked, Progressed, Source, Updated
from april.core.group import Batch, Failure, Group
from april.core.ids import GroupId, SampleId, Version
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine, UpdateMode, Weights
from april.rollout.measure import LengthMeter
from april.rollout.pool import GroupState, Pool
from april.rollout.view import Memo, Plan, Schedule, Status

MAX_PLANS_PER_TURN = 10_000
MAX_FAILED_BATCHES = 4
"""A run ends when this many batches' worth of groups in succession had too few rewards: the reward or the engine is broken."""
MAX_FRUITLESS_BATCHES = 64
"""The same for groups that were dropped for any reason, the filters' included."""
GroupFilter = Callable[[Group], str | None]
"""Why a complete group is dropped, or None to keep it."""


class PromptSource(Protocol):
    """Which prompts come next."""

    def next(self, count: int, is_open: Callable[[str], bool]) -> list[tuple[int, Prompt]]:
        """Up to `count` (epoch, prompt) pairs; fewer when the next one in order is still open."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The cursor, for the journal."""
        ...


class RewardSource(Source, Protocol):
    """Judges finished samples."""

    def submit(self, sample: Sample) -> None: ...

    def close(self) -> None: ...


class Watcher(Protocol):
    """Told of every event and plan, for timelines; must not change anything."""

    def on_event(self, event: Event) -> None: ...

    def on_start(self, samples: Sequence[SampleId], time_s: float) -> None: ...


class Driver:
    """Carries out plans and applies events.

    Args:
        clock: wall or virtual.
        engine, rewards: sources that samples pass through.
        sources: further sources (the trainer).
        schedule: decides; its memo is kept here.
        prompts: what to issue.
        spec: sampling parameters of new samples.
        groups_per_step, group_size: the shape of a batch.
        steps: updates wanted in all; no more groups are issued than they need.
        group_filters: applied in order to each complete group.
        min_rewarded: a group with fewer rewarded members is dropped as failed.
        max_retries: how often a sample may lose its engine before it fails.
        after_turn: called when the events of a turn have been applied and planned for: the journal's flush.
        should_stop: asked while a batch is being made; True ends `next_batch` with `Interrupted`.
    """

    def __init__(
        self,
        *,
        clock: Clock,
        engine: Engine,
        rewards: RewardSource,
        schedule: Schedule,
        prompts: PromptSource,
        spec: SamplingSpec,
        groups_per_step: int,
        group_size: int,
        steps: int,
        pool: Pool | None = None,
        sources: Sequence[Source] = (),
        group_filters: Sequence[GroupFilter] = (),
        min_rewarded: int = 1,
        max_retries: int = 3,
        watcher: Watcher | None = None,
        after_turn: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.clock, self.engine, self.rewards, self.schedule, self.prompts = clock, engine, rewards, schedule, prompts
        self.spec, self.groups_per_step, self.group_size, self.steps = spec, groups_per_step, group_size, steps
        self.pool = pool or Pool()
        self.sources: tuple[Source, ...] = (engine, rewards, *sources)
        self.group_filters, self.min_rewarded, self.max_retries = group_filters, min_rewarded, max_retries
        self.watcher, self.after_turn, self.should_stop = watcher, after_turn, should_stop
        self.memo: Memo = {}
        self.version: Version = engine.load().version
        self.emitted_steps = 0
        self.tokens_at_cut = 0
        self.groups_out = 0
        self.lengths = LengthMeter(spec.max_new_tokens)
        self._blocked_at: int | None = None
        self._batch: Batch | None = None
        self._updated: Updated | None = None
        self._failed_in_a_row = self._dropped_in_a_row = 0

    # -- what the loop calls ------------------------------------------------------------------------------------------

    def next_batch(self) -> Batch:
        """Run until the schedule cuts a batch.

        Raises:
            StallError: when no source can bring anything and the schedule asks for nothing.
            Interrupted: when `should_stop` says so; call again to go on.
        """
        self._plan()
        self.after_turn()
        while self._batch is None:
            if self.should_stop():
                raise Interrupted("the run was asked to stop")
            self._turn()
        batch, self._batch = self._batch, None
        return batch

    def wait_for_update(self) -> Updated:
        """Run until the trainer reports that the emitted batch has been used; rollouts go on if the schedule lets them."""
        self._plan()  # what the schedule starts beside the update, it starts now
        self.after_turn()
        while self._updated is None:
            self._turn()
        updated, self._updated = self._updated, None
        return updated

    def publish(self, weights: Weights, version: Version, mode: UpdateMode) -> None:
        """Give the engine new weights and wait until it serves them; a sample never mixes versions unseen."""
        self.engine.update_weights(weights, version, mode)
        while self.engine.load().version != version:
            self._turn()
        self.version = version

    def park_all(self) -> None:
        """Take every sample out of the engine, with its tokens."""
        if running := self.pool.running_samples():
            self.engine.abort(running)
            self._confirm_parked(running)
        self.after_turn()

    def settle_unjudged(self) -> None:
        """After a restart: judge samples that had finished, and settle groups whose last outcome had come."""
        for state in list(self.pool.groups.values()):
            for member in sorted(state.scoring):
                self.rewards.submit(state.samples[member])
            if not state.ready:
                self._settle(state)
        self.after_turn()

    # -- one turn -----------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        times = [time_s for source in self.sources if (time_s := source.ready_at()) is not None]
        if not times:
            raise self._stall()
        self.clock.wait_until(min(times))
        for source in self.sources:
            for event in source.poll():
                self._apply(event)
        self.pool.ledger.check()
        self._plan()
        self.after_turn()

    def _plan(self) -> None:
        for _ in range(MAX_PLANS_PER_TURN):
            plan, self.memo = self.schedule.plan(DriverView(self), self.memo)
            if not plan:
                return
            self._execute(plan)
            if plan.emit:
                return
        raise RolloutError(
            "a schedule never stops planning",
            where=type(self.schedule).__name__,
            got=plan,
            expected="an empty plan on an unchanged view",
        )

    def _execute(self, plan: Plan) -> None:
        for group, reason in plan.evict:
            self.pool.drop(group, Status.EVICTED, reason)
        if plan.park:
            self.engine.abort(plan.park)
            self._confirm_parked(plan.park)
        if plan.emit:
            self._emit(plan.emit, plan.max_token_lag)
        if plan.issue:
            self._issue(plan.issue)
        if plan.start:
            if self.watcher:
                self.watcher.on_start(plan.start, self.clock.now())
            self.engine.submit(self.pool.start(plan.start, self.version))

    def _confirm_parked(self, samples: Sequence[SampleId]) -> None:
        """Take events until every sample is out of the engine: an abort is a request until its event has come."""
        wanted = set(samples)
        while wanted & self.pool.running.keys():
            if (ready_s := self.engine.ready_at()) is None:
                raise EngineError(
                    "an engine did not confirm an abort",
                    got=f"{self.engine.load().running} running",
                    expected="one event for each sample",
                )
            self.clock.wait_until(ready_s)
            for event in self.engine.poll():
                self._apply(event)

    def _issue(self, count: int) -> None:
        taken = self.prompts.next(count, self.pool.is_open)
        for epoch, prompt in taken:
            self.pool.issue(epoch, prompt, self.spec, self.group_size)
        self.pool.listener("cursor", {"state": self.prompts.state_dict()})
        if len(taken) < count:
            self._blocked_at = len(self.pool.groups)

    def _emit(self, groups: Sequence[GroupId], max_token_lag: int | None) -> None:
        self._batch = self.take(self.pool.emit(groups, max_token_lag), max_token_lag)

    def take(self, groups: tuple[Group, ...], max_token_lag: int | None) -> Batch:
        """Count emitted groups as the next batch."""
        batch = Batch(self.emitted_steps, self.version, groups, max_token_lag)
        self.emitted_steps += 1
        self.tokens_at_cut = self.engine.load().generated_tokens
        self.groups_out = len(groups)
        for group in groups:
            for sample, _ in group.rewarded:
                self.lengths.delivered(len(sample))
        return batch

    # -- events -------------------------------------------------------------------------------------------------------

    def _apply(self, event: Event) -> None:
        if self.watcher:
            self.watcher.on_event(event)
        match event:
            case Progressed():
                self.pool.progress(event.id, event.segment)
            case Parked():
                self.pool.park(event.id, event.segment)
            case Finished():
                sample = self.pool.finish(event.id, event.segment, event.stop)
                self.lengths.finished(len(sample))
                self.rewards.submit(sample)
            case Broken():
                self._retry_or_fail(event)
            case Judged():
                self._settle(self.pool.judge(event.id, event.outcome))
            case Updated():
                self.pool.trained()
                self._updated = event

    def _retry_or_fail(self, event: Broken) -> None:
        if self.pool.losses(event.id) < self.max_retries:
            self.pool.lose(event.id)
        else:
            self._settle(self.pool.fail(event.id, event.reason))

    def _settle(self, state: GroupState) -> None:
        """A group whose last outcome has come is kept, filtered, or given up."""
        if not state.complete:
            return
        rewarded = sum(not isinstance(outcome, Failure) for outcome in state.outcomes.values())
        if rewarded < self.min_rewarded:
            self.pool.drop(state.id, Status.FAILED, f"fewer than {self.min_rewarded} rewarded members")
            self._dropped(failed=True)
            return
        group = state.to_group()
        for group_filter in self.group_filters:
            if reason := group_filter(group):
                self.pool.drop(state.id, Status.FILTERED, reason)
                self._dropped(failed=False)
                return
        self.pool.keep(state.id)
        self._failed_in_a_row = self._dropped_in_a_row = 0

    def _dropped(self, *, failed: bool) -> None:
        """Give up when nothing that is generated can be trained: without this a run would go on for ever."""
        self._failed_in_a_row = self._failed_in_a_row + 1 if failed else 0
        self._dropped_in_a_row += 1
        num, batch = self._dropped_in_a_row, max(4, self.groups_per_step)
        if self._failed_in_a_row < MAX_FAILED_BATCHES * batch and num < MAX_FRUITLESS_BATCHES * batch:
            return
        reasons = "; ".join(f"{reason} ({count} samples)" for reason, count in self.pool.ledger.reasons.most_common(3))
        raise RolloutError(
            "no group can be trained",
            where=f"step {self.emitted_steps}",
            got=f"{num} groups in succession were dropped. {reasons}",
            expected=f"groups with at least {self.min_rewarded} rewarded samples that pass algorithm.filter",
            hint="try the reward on one response by hand, and see that the problems are neither all solved nor all too hard",
        )

    def issuable(self) -> int:
        """Groups that may be issued now: batches still wanted, unless the next prompt in order is still open."""
        if self._blocked_at is not None and len(self.pool.groups) >= self._blocked_at:
            return 0
        self._blocked_at = None
        return max(0, (self.steps - self.emitted_steps) * self.groups_per_step - len(self.pool.groups))

    def _stall(self) -> StallError:
        pending = [f"{source.name}: {what}" for source in self.sources for what in source.pending()]
        pool = self.pool
        state = f"{pool.num_running} running, {len(pool.ready)} of {self.groups_per_step} groups ready, {len(pool.groups)} open"
        return StallError(
            f"step {self.emitted_steps} cannot be completed: nothing is pending",
            got="; ".join([state, *pending, f"ends: {dict(pool.ledger.reasons)}"]),
            expected="an engine, reward or trainer that will report something",
            hint="is the data set smaller than a batch, or does a filter drop every group? `april train RECIPE --dry-run` tells",
        )


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
        return self._driver.group_size

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

    def groups_by_version(self) -> Mapping[Version, tuple[GroupId, ...]]:
        return self._pool.groups_by_version()
