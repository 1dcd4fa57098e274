"""A driver in virtual time with scripted replies: every part of the outside world is a few lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from april.core.clock import VirtualClock
from april.core.event import Event, Judged
from april.core.group import Batch, Group, Outcome, Reward
from april.core.ids import GroupId, SampleId
from april.core.prompt import Prompt
from april.core.random import stream_key
from april.core.sample import Sample, Segment
from april.core.sampling import SamplingSpec
from april.engines.base import UpdateMode
from april.engines.scripted import Reply, ScriptedEngine
from april.rollout.driver import Driver
from april.rollout.pool import WAITING, Pool
from april.rollout.view import Memo, Plan, Schedule, Status, View
from april.selection.sampler import PromptSampler

SPEC = SamplingSpec(max_new_tokens=64)


def make_prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{index}", np.array([1, 2, 3], np.int32)) for index in range(count)]


def groups_by_version(pool: Pool) -> dict[int, tuple[GroupId, ...]]:
    """Open groups with tokens, by the oldest version among them, ascending."""
    return {age.version: pool.groups_of(age.version) for age in pool.ages()}


def make_segment(length: int, version: int = 0, first: int = 0) -> Segment:
    """Tokens first, first + 1, ... with log-prob -0.5 each."""
    tokens = np.arange(first, first + length, dtype=np.int32)
    return Segment(tokens, np.full(length, -0.5, np.float32), version, "test")


def reply_of(length: int, breaks_at: int | None = None) -> Reply:
    return Reply(tuple(range(length)), "eos", breaks_at)


def lengths_by(table: dict[tuple[str, int], int], default: int) -> Callable[[Sample], Reply]:
    """Replies with a length for each (prompt, member)."""
    return lambda sample: reply_of(table.get((sample.id.prompt, sample.id.member), default))


def long_tailed(seed: int, mean_tokens: float, max_tokens: int, sigma: float = 1.0) -> Callable[[Sample], Reply]:
    """Log-normal lengths, addressed by the sample: the same for every schedule."""

    def replies(sample: Sample) -> Reply:
        draw = np.random.default_rng(stream_key(seed, sample.id.serial, sample.id.member)).lognormal(np.log(mean_tokens), sigma)
        return reply_of(int(np.clip(draw, 1, max_tokens)))

    return replies


class FakeRewards:
    """Judges each sample after a delay of its own, or never."""

    name = "rewards"

    def __init__(
        self,
        clock: VirtualClock,
        outcome: Callable[[Sample], Outcome] = lambda _sample: Reward(1.0, True),
        delay_s: Callable[[Sample], float] = lambda _sample: 0.0,
    ) -> None:
        self.clock, self.outcome, self.delay_s = clock, outcome, delay_s
        self.queue: list[tuple[float, Sample]] = []
        self.seen: Counter[SampleId] = Counter()

    def submit(self, sample: Sample) -> None:
        self.seen[sample.id] += 1
        self.queue.append((self.clock.now() + self.delay_s(sample), sample))

    def ready_at(self) -> float | None:
        times = [time_s for time_s, _ in self.queue if time_s < float("inf")]
        return min(times) if times else None

    def poll(self) -> list[Event]:
        now = self.clock.now()
        due = [entry for entry in self.queue if entry[0] <= now]
        self.queue = [entry for entry in self.queue if entry[0] > now]
        return [Judged(now, sample.id, self.outcome(sample)) for _, sample in due]

    def pending(self) -> list[str]:
        return [str(sample.id) for _, sample in self.queue]


class Tape:
    """A watcher that writes down what it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[Any, ...]] = []

    def on_event(self, event: Event) -> None:
        segment = getattr(event, "segment", None)
        tokens = () if segment is None else tuple(segment.token_ids.tolist())
        self.entries.append((type(event).__name__, event.time_s, getattr(event, "id", None), tokens))

    def on_start(self, samples: Sequence[SampleId], time_s: float) -> None:
        self.entries.append(("start", time_s, tuple(samples)))


class Audited:
    """A schedule under observation: on every call the pool is audited, and an empty plan must stay empty."""

    def __init__(self, inner: Schedule) -> None:
        self.inner, self.driver, self.plans_in_turn, self.turns = inner, None, 0, 0
        self.max_running_groups = 0
        self.ran_in_update = False

    @property
    def update_mode(self) -> UpdateMode:
        return self.inner.update_mode

    @property
    def max_lag_steps(self) -> int:
        return self.inner.max_lag_steps

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if self.driver is not None:
            audit(self.driver.pool)
        plan, memo = self.inner.plan(view, memo)
        if plan:
            self.plans_in_turn += 1
            assert self.plans_in_turn < 20, f"a schedule planned 20 times in one turn, last {plan}"
        if not plan or plan.emit:
            self.turns, self.plans_in_turn = self.turns + 1, 0
        if not plan:
            again, same = self.inner.plan(view, memo)
            assert not again and same == memo, f"not empty on an unchanged view: {again}"
        self.max_running_groups = max(self.max_running_groups, view.num_active_groups)
        self.ran_in_update |= view.updating and view.num_running > 0
        return plan, memo


def audit(pool: Pool) -> None:
    """Recount everything that the pool keeps incrementally, from the statuses and tokens alone."""
    pool.ledger.check()
    counted = Counter(pool.status.values())
    training_failed = sum(len(group.samples) - len(group.rewarded) for group in pool.training.values())
    ends = (Status.TRAINED, Status.FILTERED, Status.EVICTED)
    for status in Status:
        if status is Status.FAILED:
            assert pool.ledger.counts[status] >= counted[status] >= training_failed
        elif status not in ends:
            assert pool.ledger.counts[status] == counted[status], status
    assert not any(counted[end] for end in ends)
    _audit_groups(pool)


def _audit_groups(pool: Pool) -> None:
    active, by_version, waiting = 0, {}, []
    for group, state in pool.groups.items():
        status = {member: pool.status[group.member(member)] for member in state.samples}
        assert state.running == {m for m, s in status.items() if s is Status.RUNNING}
        assert state.scoring == {m for m, s in status.items() if s is Status.SCORING}
        assert state.waiting == {m for m, s in status.items() if s in WAITING}
        assert set(state.outcomes) == {m for m, s in status.items() if s in (Status.READY, Status.FAILED)}
        assert state.ready == (group in pool.ready) and (state.complete or not state.ready)
        active += bool(state.running or state.scoring)
        if state.waiting:
            waiting.append(group)
        kept = [s for m, s in state.samples.items() if status[m] is not Status.FAILED]  # what fails is never trained
        oldest = min((s.oldest_version for s in kept if s.oldest_version is not None), default=None)
        if oldest is None and len(state.waiting) == len(state.samples):
            assert state.oldest_version is None  # nothing was generated: no age
        if oldest is not None:
            assert state.oldest_version is not None and state.oldest_version <= oldest
        if state.oldest_version is not None:
            by_version.setdefault(state.oldest_version, []).append(group)
    assert pool.num_active_groups == active
    assert pool.waiting_groups() == tuple(sorted(waiting))
    assert groups_by_version(pool) == {v: tuple(sorted(g)) for v, g in sorted(by_version.items())}
    assert list(groups_by_version(pool)) == sorted(by_version)
    assert set(pool.running) == {s for s, status in pool.status.items() if status is Status.RUNNING}
    assert all(pool.is_open(group.prompt) for group in pool.groups)
    assert sum(pool.is_open(f"p{index}") for index in range(50)) <= len(pool.groups)


def make_driver(
    schedule: Schedule,
    replies: Callable[[Sample], Reply] = lambda _sample: reply_of(4),
    *,
    num_prompts: int = 40,
    groups_per_step: int = 2,
    group_size: int = 2,
    steps: int = 10,
    spec: SamplingSpec = SPEC,
    outcome: Callable[[Sample], Outcome] = lambda _sample: Reward(1.0, True),
    delay_s: Callable[[Sample], float] = lambda _sample: 0.0,
    engine: Callable[..., Any] = ScriptedEngine,
    max_running: int = 1_000_000,
    report_every_tokens: int = 16,
    audited: bool = True,
    **more: Any,
) -> Driver:
    """A driver in virtual time; `driver.schedule` is audited unless told otherwise."""
    clock = VirtualClock()
    observed = Audited(schedule) if audited else schedule
    driver = Driver(
        clock=clock,
        engine=engine(replies, clock, max_running=max_running, report_every_tokens=report_every_tokens),
        rewards=FakeRewards(clock, outcome, delay_s),
        schedule=observed,
        prompts=PromptSampler(make_prompts(num_prompts)),
        spec=spec,
        groups_per_step=groups_per_step,
        group_size=group_size,
        steps=steps,
        **more,
    )
    if isinstance(observed, Audited):
        observed.driver = driver
    return driver


def finish_step(driver: Driver) -> None:
    """What the loop does after an update: the batch is trained and its weights are live."""
    driver.pool.trained()
    driver.publish({}, driver.emitted_steps, "drain")


def run_steps(driver: Driver, steps: int | None = None) -> list[Batch]:
    """Take and train so many batches (default: all that the driver was made for)."""
    batches = []
    for _ in range(driver.steps if steps is None else steps):
        batches.append(driver.next_batch())
        finish_step(driver)
    return batches


def lag_of(batch: Batch, group: Group) -> int:
    """The largest lag of any policy token of a group's members that have a reward."""
    return max((batch.version - s.oldest_version for s, _ in group.rewarded if s.oldest_version is not None), default=0)


def group_ids(batch: Batch) -> list[GroupId]:
    return [group.id for group in batch.groups]
