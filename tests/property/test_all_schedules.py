"""Every schedule, in virtual time with a trainer that takes time: conserved, complete, bounded, and equal where they must be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_helpers import lag_of, long_tailed, make_driver, reply_of
from schedule_engines import RollingEngine, VersionedEngine

from april import registry
from april.core.clock import Clock
from april.core.event import Event, Updated
from april.core.group import Batch, Failure, Outcome, Reward
from april.core.ids import GroupId
from april.core.random import stream_key
from april.core.sample import Sample
from april.engines.scripted import Reply, ScriptedEngine
from april.rollout.driver import Driver
from april.rollout.view import Schedule, overlaps

SCHEDULES: dict[str, dict[str, Any]] = {
    "sync": {"type": "sync"},
    "april": {"type": "april", "over_provision": 1.5, "max_lag_steps": 2},
    "one_step": {"type": "one_step"},
    "bounded_0": {"type": "bounded_async", "max_lag_steps": 0},
    "bounded_2": {"type": "bounded_async", "max_lag_steps": 2},
    "bounded_2_keep": {"type": "bounded_async", "max_lag_steps": 2, "update_mode": "keep_kv", "max_running": 5},
    "token_budget": {"type": "token_budget", "tokens_per_step": 120, "max_lag_steps": 2, "max_running": 12},
    "token_budget_mask": {"type": "token_budget", "tokens_per_step": 90, "over_age": "mask_tokens", "max_running": 8},
    "token_budget_finish": {
        "type": "token_budget",
        "tokens_per_step": 60,
        "max_lag_steps": 1,
        "over_age": "finish_first",
        "max_running": 9,
    },
    "adaptive": {"type": "april", "over_provision": "adaptive", "max_lag_steps": 3},
    "adaptive_sample": {
        "type": "april",
        "over_provision": "adaptive",
        "max_lag_steps": 1,
        "refill": "continuous",
        "granularity": "sample",
    },
    "refill_before_scoring": {
        "type": "april",
        "over_provision": 2.0,
        "max_lag_steps": 2,
        "refill": "continuous",
        "refill_before_scoring": True,
    },
    "bounded_1_drop": {"type": "bounded_async", "max_lag_steps": 1, "over_age": "drop_group", "max_running": 4},
    "bounded_1_mask": {"type": "bounded_async", "max_lag_steps": 1, "over_age": "mask_tokens"},
    "replicated": {"type": "replicated", "over_provision": 1.5},
    "replicated_spare": {"type": "replicated", "over_provision": 1.5, "redundant_samples": 2, "max_running": 7},
    "truncated": {"type": "truncated", "window_tokens": 9, "max_lag_steps": 2},
    "truncated_drop": {"type": "truncated", "window_tokens": 5, "max_lag_steps": 1, "over_age": "drop_group"},
    "windowed": {"type": "windowed", "max_lag_steps": 2},
    "windowed_narrow": {"type": "windowed", "max_lag_steps": 3, "window": 0.01, "max_running": 6, "update_mode": "keep_kv"},
    "tail_batching": {"type": "tail_batching", "over_provision": 1.5},
    "tail_batching_wide": {"type": "tail_batching", "over_provision": 3.0},
    "multi_version": {"type": "multi_version", "max_lag_steps": 2},
    "multi_version_drain": {"type": "multi_version", "max_lag_steps": 1, "update_mode": "drain", "max_running": 5},
    "rolling": {"type": "rolling", "max_lag_steps": 2, "max_running": 8},
    "longest_first": {"type": "longest_first", "max_running": 5},
}


ENGINES = {"multi_version": VersionedEngine, "rolling": RollingEngine}
"""What a schedule needs beyond the scripted engine."""
ANY_SIZE = ("token_budget", "token_budget_mask", "token_budget_finish")
MASKED = ("token_budget_mask", "bounded_1_mask")
ON_POLICY = ("sync", "replicated", "replicated_spare", "tail_batching", "tail_batching_wide", "longest_first", "bounded_0")
ONE_VERSION = ("multi_version", "multi_version_drain", "rolling", *ON_POLICY)


class SlowTrainer:
    """Takes `train_s` for each update, while the world goes on."""

    name = "trainer"

    def __init__(self, clock: Clock, train_s: float) -> None:
        self.clock, self.train_s, self.done_s, self.version = clock, train_s, None, 0

    def submit(self, batch: Batch) -> None:
        self.done_s = self.clock.now() + self.train_s

    def ready_at(self) -> float | None:
        return self.done_s

    def poll(self) -> list[Event]:
        if self.done_s is None or self.clock.now() < self.done_s:
            return []
        self.version, self.done_s = self.version + 1, None
        return [Updated(self.clock.now(), self.version)]

    def pending(self) -> list[str]:
        return [] if self.done_s is None else ["update"]


def make_schedule(fields: dict[str, Any]) -> Schedule:
    return registry.builder("schedule", fields["type"])(registry.parse("schedule", fields, "schedule"))  # type: ignore[no-any-return]


def drive(
    fields: dict[str, Any], train_s: float = 0.0, park_before: Callable[[int], bool] = lambda _step: False, **more: Any
) -> tuple[Driver, list[Batch]]:
    """All steps of a run, as the loop runs them."""
    engine = ENGINES.get(fields["type"], ScriptedEngine)
    if fields.get("update_mode") == "drain":
        engine = ScriptedEngine
    driver = make_driver(make_schedule(fields), **{"num_prompts": 60, "engine": engine, **more})
    trainer = SlowTrainer(driver.clock, train_s)
    driver.sources = (*driver.sources, trainer)
    batches = []
    for step in range(driver.steps):
        if park_before(step):
            driver.park_all()
        batches.append(driver.next_batch())
        trainer.submit(batches[-1])
        updated = driver.wait_for_update()
        driver.publish({}, updated.version, driver.schedule.update_mode)
    return driver, batches


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_says_whether_it_generates_in_updates(name: str) -> None:
    driver, _ = drive(SCHEDULES[name], 40.0, replies=long_tailed(3, 12, 64, sigma=1.1), steps=6)
    assert driver.schedule.ran_in_update == overlaps(driver.schedule.inner)


def members(batches: list[Batch]) -> list[list[GroupId]]:
    return [[group.id for group in batch.groups] for batch in batches]


@st.composite
def worlds(draw: st.DrawFn) -> dict[str, Any]:
    """Lengths, a trainer's speed, failures of engines, filters and rewards, and an operator who parks everything at times."""
    return {
        "seed": draw(st.integers(0, 10_000)),
        "train_s": draw(st.sampled_from([0.0, 3.0, 40.0, 400.0])),
        "groups": draw(st.integers(1, 4)),
        "size": draw(st.integers(1, 3)),
        "greedy": draw(st.integers(0, 1)),
        "breaks": draw(st.booleans()),
        "filtered": draw(st.booleans()),
        "slow_rewards": draw(st.booleans()),
        "fails": draw(st.booleans()),
        "parks": draw(st.booleans()),
    }


def play(name: str, world: dict[str, Any]) -> tuple[Driver, list[Batch]]:
    """A run of a schedule in a world."""
    seed, fields = world["seed"], SCHEDULES[name]
    lengths = long_tailed(seed, 12, 64, sigma=1.1)

    def chance(one_in: int, *address: object) -> bool:
        return stream_key(seed, *address) % one_in == 0

    def replies(sample: Sample) -> Reply:
        length = len(lengths(sample).token_ids)
        return reply_of(length, length // 2 if world["breaks"] and chance(4, "break", sample.id) else None)

    def outcome(sample: Sample) -> Outcome:
        failed = world["fails"] and chance(5, "fail", sample.id)
        return Failure("no answer") if failed else Reward(1.0, True)

    filters = [lambda group: "unlucky" if chance(4, group.id) else None] if world["filtered"] else []
    return drive(
        fields,
        world["train_s"],
        replies=replies,
        groups_per_step=world["groups"],
        group_size=world["size"],
        greedy_members=world["greedy"],
        steps=6,
        group_filters=filters,
        outcome=outcome,
        delay_s=lambda sample: 20.0 if world["slow_rewards"] and chance(3, "slow", sample.id) else 0.0,
        park_before=lambda step: world["parks"] and chance(3, "park", step),
    )


def check_run(name: str, world: dict[str, Any], driver: Driver, batches: list[Batch]) -> None:
    """What every schedule promises; the audit of the helpers adds the ledger at every turn and plans that stay empty."""
    ids = [sample.id for batch in batches for group in batch.groups for sample in group.samples]
    assert driver.pool.ledger.balanced and len(ids) == len(set(ids)), "a sample was trained twice"
    assert all(len(batch.groups) == world["groups"] for batch in batches) or name in ANY_SIZE
    assert all(batch.groups for batch in batches)
    for batch in batches:
        for group in batch.groups:
            lag = lag_of(batch, group)
            assert batch.version <= batch.step
            assert lag <= driver.schedule.max_lag_steps or name in MASKED
            assert batch.max_token_lag == (driver.schedule.max_lag_steps if name in MASKED else None)
            if name in ONE_VERSION:
                assert all(sample.num_segments <= 1 for sample in group.samples)
            spare = SCHEDULES[name].get("redundant_samples", 0)
            assert [sample.spec.greedy for sample in group.samples] == [False] * (world["size"] + spare) + [True] * world[
                "greedy"
            ]
            assert len(group.rewarded) - len(group.sampled.rewarded) == world["greedy"], "a baseline is missing"
            for sample, _ in group.rewarded:
                assert sample.token_ids.tolist() == list(range(len(sample))) and sample.stop == "eos"


@settings(max_examples=6)
@given(world=worlds())
@pytest.mark.parametrize("name", SCHEDULES)
def test_conserved_complete_and_within_the_bound(name: str, world: dict[str, Any]) -> None:
    driver, batches = play(name, world)
    check_run(name, world, driver, batches)
    assert len(batches) == 6


@pytest.mark.slow
@settings(max_examples=40)
@given(world=worlds())
@pytest.mark.parametrize("name", SCHEDULES)
def test_conserved_in_a_thousand_worlds(name: str, world: dict[str, Any]) -> None:
    driver, batches = play(name, world)
    check_run(name, world, driver, batches)
    assert len(batches) == 6


@pytest.mark.parametrize("train_s", [0.0, 25.0])
def test_bounded_asynchrony_with_bound_zero_is_the_synchronous_schedule(train_s: float) -> None:
    lengths = long_tailed(5, 15, 64)
    same = {"replies": lengths, "groups_per_step": 3, "group_size": 2, "steps": 6}
    sync, first = drive(SCHEDULES["sync"], train_s, **same)
    bounded, second = drive(SCHEDULES["bounded_0"], train_s, **same)
    assert members(first) == members(second) and sync.clock.now() == bounded.clock.now()
    other, _ = drive(SCHEDULES["bounded_2"], train_s, **same)
    assert other.clock.now() < sync.clock.now(), "a bound of two must make a difference, or the test sees nothing"


def test_overlap_gains_the_time_of_the_update_and_asynchrony_that_of_the_tail() -> None:
    same = {"replies": long_tailed(7, 15, 64, sigma=1.2), "groups_per_step": 4, "group_size": 2, "steps": 12}
    seconds = {name: drive(SCHEDULES[name], 40.0, **same)[0].clock.now() for name in ("sync", "one_step", "bounded_2")}
    assert seconds["bounded_2"] < seconds["one_step"] < seconds["sync"]


def test_a_token_budget_makes_batches_of_what_has_finished() -> None:
    driver, batches = drive(
        SCHEDULES["token_budget"], replies=long_tailed(3, 12, 64, sigma=1.1), groups_per_step=4, group_size=2, steps=6
    )
    sizes = {len(batch.groups) for batch in batches}
    assert len(sizes) > 1 and min(sizes) >= 1 and driver.pool.ledger.parked_total > 0


def test_redundancy_drops_the_losers_and_prefers_the_short() -> None:
    lengths = long_tailed(11, 15, 64, sigma=1.2)
    same = {"replies": lengths, "groups_per_step": 4, "group_size": 1, "steps": 12}
    driver, batches = drive(SCHEDULES["replicated"], **same)
    counts = driver.pool.ledger.to_dict()["counts"]
    trained = [len(sample) for batch in batches for group in batch.groups for sample in group.samples]
    population = [
        len(lengths(sample).token_ids)
        for batch in drive(SCHEDULES["sync"], **same)[1]
        for g in batch.groups
        for sample in g.samples
    ]
    assert counts["evicted"] > 0 and counts["parked"] == 0
    assert sum(trained) / len(trained) < sum(population) / len(population)
