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

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from april.config.limits import LimitsConfig
from april.core.clock import Clock
from april.core.errors import EngineError, Interrupted, RolloutError, StallError
from april.core.event import Broken, Event, Finished, Judged, Parked, Progressed, Source, Updated
from april.core.group import Batch, Failure, Group
from april.core.ids import GroupId, SampleId, Version
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import AdaptiveTemperature, SamplingSpec
from april.engines.base import Engine, UpdateMode, Weights
from april.rollout.driver_view import DriverView
from april.rollout.group_state import GroupState
from april.rollout.measure import LengthMeter
from april.rollout.policies import LossPolicy
from april.rollout.pool import WAITING, Pool
from april.rollout.temperature import TemperatureRule
from april.rollout.view import Memo, Plan, Schedule, Status
from april.rollout.waits import Patience, StageTimes, busy_elsewhere, report, wait_for_next
from april.rollout.watch import Watch, look_at, member_budgets
from april.rollout.windows import Windows

MAX_PLANS_PER_TURN = 10_000
MAX_FAILED_BATCHES = 4
"""A run ends when this many batches' worth of groups in succession had too few rewards: the reward or the engine is broken."""
MAX_FRUITLESS_BATCHES = 64
"""The same for groups that were dropped for any reason, the filters' included."""
MODE_HINTS = {
    "next_request": "this needs an engine that serves several versions at once; with one set of weights, multi_version takes "
    'schedule.update_mode = "drain"',
    "rolling": "this needs several engines: engine.replicas = 2 or more; with one, use schedule.type = bounded_async",
}
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
        greedy_members: of each group, beside those of `group_size`; no filter sees them, and a group whose own have no reward is
            dropped as failed.
        steps: updates wanted in all; no more groups are issued than they need.
        group_filters: applied in order to each complete group.
        min_rewarded: a group with fewer rewarded members is dropped as failed.
        max_retries: how often a sample may lose its engine before it fails.
        limits: deadlines, and what becomes of samples that a stage has failed; None waits for ever.
        temperatures: how those of samples that are issued follow the entropies of the last batch.
        watches: set budgets at issue, and end samples early as their tokens and their siblings' outcomes come.
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
        greedy_members: int = 0,
        pool: Pool | None = None,
        sources: Sequence[Source] = (),
        group_filters: Sequence[GroupFilter] = (),
        min_rewarded: int = 1,
        max_retries: int = 3,
        limits: LimitsConfig | None = None,
        watches: Sequence[Watch] = (),
        temperatures: TemperatureRule | None = None,
        watcher: Watcher | None = None,
        after_turn: Callable[[], None] = lambda: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.clock, self.engine, self.rewards, self.schedule, self.prompts = clock, engine, rewards, schedule, prompts
        self.spec, self.groups_per_step, self.group_size, self.steps = spec, groups_per_step, group_size, steps
        self.greedy_members = greedy_members
        self.pool = pool or Pool()
        self.sources: tuple[Source, ...] = (engine, rewards, *sources)
        self.group_filters, self.min_rewarded, self.max_retries = group_filters, min_rewarded, max_retries
        self.limits, self.policy = limits, LossPolicy(limits, max_retries)
        self.retries_publish = limits is not None and limits.on_late_publish == "retry"
        self.quiet = Patience(clock, None if limits is None else limits.quiet_s)
        self.times, self.num_events = StageTimes(clock), 0
        self.watcher, self.after_turn, self.should_stop = watcher, after_turn, should_stop
        self.on_turn: Callable[[], None] = lambda: None  # told that the driver lives, at the start of each turn
        check_update_mode(schedule, engine)
        self.watches, self._seen, self.temperatures = tuple(watches), dict[SampleId, None](), temperatures or TemperatureRule()
        self.windows = Windows(engine.caps)
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
        self.quiet.begin()
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
        self.quiet.begin()
        self._plan()  # what the schedule starts beside the update, it starts now
        self.after_turn()
        while self._updated is None:
            self._turn()
        updated, self._updated = self._updated, None
        return updated

    def publish(self, weights: Weights, version: Version, mode: UpdateMode) -> None:
        """Give the engine new weights and wait until it serves them; a sample never mixes versions unseen."""
        self.engine.update_weights(weights, version, mode)
        late = Patience(self.clock, None if self.limits is None else self.limits.publish_s)
        while self.engine.load().version != version:
            self._turn()
            if late.ended(self._progress) and not busy_elsewhere(self.sources):  # one that is being loaded has its own deadline
                self._give_up_engine(f"did not serve version {version}", retry=self.retries_publish)
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
        self.on_turn()
        if not wait_for_next(self.clock, self.sources):
            raise self._stall("nothing is pending")
        for source in self.sources:
            for event in source.poll():
                self._apply(event)
        if self.quiet.ended(self._progress) and not busy_elsewhere(self.sources):
            raise self._stall(f"nothing has happened for {self.quiet.limit_s:g} s")
        self.pool.ledger.check()
        self._plan()
        self.after_turn()

    def _plan(self) -> None:
        self._watch()
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

    def _watch(self) -> None:
        """Carry out what the watches say of the samples that had news."""
        if not self._seen:
            return
        seen, self._seen = list(self._seen), {}
        if plan := look_at(self.watches, self.pool, seen):
            self._execute(plan)

    def _execute(self, plan: Plan) -> None:
        for group, reason in plan.evict:
            self.pool.drop(group, Status.EVICTED, reason)
        if parked := (*plan.park, *self._running_of(plan)):
            self.engine.abort(parked)
            self._confirm_parked(parked)
        self._end(plan)
        if plan.restart:
            self.pool.restart(plan.restart)
        if plan.emit:
            self._emit(plan.emit, plan.max_token_lag)
        if plan.issue:
            self._issue(plan.issue, plan.extra_samples)
        if plan.start:
            self.times.started(plan.start)
            if self.watcher:
                self.watcher.on_start(plan.start, self.clock.now())
            self.engine.submit(self.windows.opened(self.pool.start(plan.start, self.version), plan.window_tokens))

    def _running_of(self, plan: Plan) -> list[SampleId]:
        """Samples in the engine that a plan ends."""
        ended = (*plan.stop, *(sample for sample, _ in plan.cut))
        return [sample for sample in ended if sample in self.pool.running]

    def _end(self, plan: Plan) -> None:
        """End samples that are out of the engine; one that finished by itself in the meantime is left alone."""
        for sample in plan.stop:
            if self.pool.status.get(sample) is Status.PARKED:
                stopped = self.pool.stop(sample)
                self.lengths.finished(len(stopped))
                self.rewards.submit(stopped)
        for sample, reason in plan.cut:
            if self.pool.status.get(sample) in WAITING:
                self._settle(self.pool.fail(sample, reason))

    def _confirm_parked(self, samples: Sequence[SampleId]) -> None:
        """Take events until every sample is out of the engine: an abort is a request until its event has come."""
        left = {sample for sample in samples if sample in self.pool.running}
        late = Patience(self.clock, None if self.limits is None else self.limits.park_s)
        while left:
            self.on_turn()
            if not wait_for_next(self.clock, (self.engine,)):
                raise EngineError(
                    "an engine did not confirm an abort",
                    got=f"{self.engine.load().running} running",
                    expected="one event for each sample",
                )
            for event in self.engine.poll():
                self._apply(event)
                if isinstance(event, Parked | Finished | Broken):
                    left.discard(event.id)
            if late.ended(left.__len__):
                self._give_up_engine(f"did not let go of {len(left)} samples that were stopped", retry=True)

    def _progress(self) -> tuple[int, int]:
        """What changes whenever something happens: events so far, and tokens."""
        return self.num_events, self.engine.load().generated_tokens

    def _give_up_engine(self, why: str, *, retry: bool) -> None:
        """Restart an engine that can be restarted, once a call; else end the run with what is known."""
        if retry and hasattr(self.engine, "restart"):
            self.engine.restart(f"was killed: it {why}")
            return
        told = report(self.pool, self.sources, self.times, self.clock.now())
        raise EngineError(f"engine {self.engine.name} {why} in time", where="limits", got=told)

    def _issue(self, count: int, extra_samples: int = 0) -> None:
        taken = self.prompts.next(count, self.pool.is_open)
        sampled, wanted = self.group_size + extra_samples, self.group_size if extra_samples else None
        size = sampled + self.greedy_members
        for epoch, prompt in taken:
            budgets = member_budgets(self.watches, prompt, self.spec, sampled)
            self.pool.issue(epoch, prompt, self.spec, size, wanted=wanted, budgets=budgets, greedy=self.greedy_members)
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
        self.adapt(self.temperatures.measured(group.sampled for group in groups) or self.spec.adaptive)
        for group in groups:
            for sample, _ in group.rewarded:
                self.lengths.delivered(len(sample))
        return batch

    def adapt(self, adaptive: AdaptiveTemperature | None) -> None:
        """Samples that are issued from now on have these temperatures."""
        self.spec = replace(self.spec, adaptive=adaptive)

    # -- events -------------------------------------------------------------------------------------------------------

    def _apply(self, event: Event) -> None:
        event = self.windows.closed(event, self.pool)
        self.num_events += 1
        self.times.on_event(event)
        if self.watcher:
            self.watcher.on_event(event)
        match event:
            case Progressed():
                self.pool.progress(event.id, event.segment)
                self._news(event.id)
            case Parked():
                self.pool.park(event.id, event.segment)
            case Finished():
                sample = self.pool.finish(event.id, event.segment, event.stop)
                self.lengths.finished(len(sample))
                self.rewards.submit(sample)
            case Broken():
                self._retry_or_fail(event)
            case Judged() if self.policy.judge_again(event):
                self.rewards.submit(self.pool[event.id])
            case Judged():
                state = self.pool.judge(event.id, event.outcome)
                self._settle(state)
                self._news(*(state.id.member(member) for member in state.unfinished))
            case Updated():
                self.pool.trained()
                self._updated = event

    def _news(self, *samples: SampleId) -> None:
        """Remember what the watches have to look at when the events of this turn have been applied."""
        if self.watches:
            self._seen |= dict.fromkeys(samples)

    def _retry_or_fail(self, event: Broken) -> None:
        if self.policy.generate_again(event, self.pool.losses(event.id)):
            self.pool.lose(event.id)
        else:
            self._settle(self.pool.fail(event.id, event.reason))

    def _settle(self, state: GroupState) -> None:
        """A group whose last outcome has come is kept, filtered, or given up."""
        if not state.complete:
            return
        group = state.to_group().sampled
        if reason := self._failure(state, group):
            self.pool.drop(state.id, Status.FAILED, reason)
            self._dropped(failed=True)
            return
        for group_filter in self.group_filters:
            if reason := group_filter(group):
                self.pool.drop(state.id, Status.FILTERED, reason)
                self._dropped(failed=False)
                return
        self.pool.keep(state.id)
        self._failed_in_a_row = self._dropped_in_a_row = 0

    def _failure(self, state: GroupState, sampled: Group) -> str | None:
        """Why a complete group has too few rewards, if it has."""
        if len(sampled.rewarded) < self.min_rewarded:
            return f"fewer than {self.min_rewarded} rewarded members"
        greedy = (outcome for member, outcome in state.outcomes.items() if member >= state.num_sampled)
        return "a greedy member without a reward" if any(isinstance(outcome, Failure) for outcome in greedy) else None

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

    def _stall(self, why: str) -> StallError:
        pending = [f"{source.name}: {what}" for source in self.sources for what in source.pending()]
        pool = self.pool
        state = f"{pool.num_running} running, {len(pool.ready)} of {self.groups_per_step} groups ready, {len(pool.groups)} open"
        told = "; ".join([state, *pending, f"ends: {dict(pool.ledger.reasons)}"])
        return StallError(
            f"step {self.emitted_steps} cannot be completed: {why}",
            got=told + report(pool, self.sources, self.times, self.clock.now()),
            expected="an engine, reward or trainer that will report something",
            hint="is the data set smaller than a batch, or does a filter drop every group? `april train RECIPE --dry-run` tells",
        )


def check_update_mode(schedule: Schedule, engine: Engine) -> None:
    """Refuse a schedule whose way of taking new weights the engine lacks.

    Raises:
        RolloutError: naming both.
    """
    mode = getattr(schedule, "update_mode", "drain")
    if mode not in engine.caps.update_modes:
        raise RolloutError(
            "the engine cannot take new weights as the schedule needs",
            where=f"schedule.type, engine {engine.name}",
            got=f"{type(schedule).__name__} with update mode {mode!r}",
            expected=f"one of {', '.join(sorted(engine.caps.update_modes))}",
            hint=MODE_HINTS.get(mode),
        )
