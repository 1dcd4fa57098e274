"""Every schedule, in virtual time with a trainer that takes time: conserved, complete, bounded, and equal where they must be."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_helpers import lag_of, long_tailed, make_driver, reply_of

from april import registry
from april.core.clock import Clock
from april.core.event import Event, Updated
from april.core.group import Batch
from april.core.ids import GroupId
from april.core.random import stream_key
from april.core.sample import Sample
from april.engines.scripted import Reply
from april.rollout.driver import Driver
from april.rollout.view import Schedule

SCHEDULES: dict[str, dict[str, Any]] = {
    "sync": {"type": "sync"},
    "april": {"type": "april", "over_provision": 1.5, "max_lag_steps": 2},
    "one_step": {"type": "one_step"},
    "bounded_0": {"type": "bounded_async", "max_lag_steps": 0},
    "bounded_2": {"type": "bounded_async", "max_lag_steps": 2},
    "bounded_2_keep": {"type": "bounded_async", "max_lag_steps": 2, "update_mode": "keep_kv", "max_running": 5},
    "token_budget": {"type": "token_budget", "tokens_per_step": 120, "max_lag_steps": 2, "max_running": 12},
    "redundant": {"type": "redundant", "over_provision": 1.5},
}


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


def drive(fields: dict[str, Any], train_s: float = 0.0, **more: Any) -> tuple[Driver, list[Batch]]:
    """All steps of a run, as the loop runs them."""
    driver = make_driver(make_schedule(fields), num_prompts=60, **more)
    trainer = SlowTrainer(driver.clock, train_s)
    driver.sources = (*driver.sources, trainer)
    batches = []
    for _ in range(driver.steps):
        batches.append(driver.next_batch())
        trainer.submit(batches[-1])
        updated = driver.wait_for_update()
        driver.publish({}, updated.version, driver.schedule.update_mode)
    return driver, batches


def members(batches: list[Batch]) -> list[list[GroupId]]:
    return [[group.id for group in batch.groups] for batch in batches]


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    train_s=st.sampled_from([0.0, 3.0, 40.0, 400.0]),
    groups=st.integers(1, 4),
    size=st.integers(1, 3),
    breaks=st.booleans(),
    filtered=st.booleans(),
    slow_rewards=st.booleans(),
)
@pytest.mark.parametrize("name", SCHEDULES)
def test_conserved_complete_and_within_the_bound(
    name: str, seed: int, train_s: float, groups: int, size: int, breaks: bool, filtered: bool, slow_rewards: bool
) -> None:
    lengths = long_tailed(seed, 12, 64, sigma=1.1)

    def replies(sample: Sample) -> Reply:
        length = len(lengths(sample).token_ids)
        return reply_of(length, length // 2 if breaks and stream_key(seed, "break", sample.id) % 4 == 0 else None)

    filters = [lambda group: "unlucky" if stream_key(seed, group.id) % 4 == 0 else None] if filtered else []
    driver, batches = drive(
        SCHEDULES[name],
        train_s,
        replies=replies,
        groups_per_step=groups,
        group_size=size,
        steps=6,
        group_filters=filters,
        delay_s=lambda sample: 20.0 if slow_rewards and stream_key(seed, "slow", sample.id) % 3 == 0 else 0.0,
    )
    ids = [sample.id for batch in batches for group in batch.groups for sample in group.samples]
    assert driver.pool.ledger.balanced and len(ids) == len(set(ids)), "a sample was trained twice"
    assert all(len(batch.groups) == groups for batch in batches) or name == "token_budget"
    assert all(len(group.samples) == size for batch in batches for group in batch.groups)
    bound = driver.schedule.max_lag_steps
    assert max(lag_of(batch, group) for batch in batches for group in batch.groups) <= bound


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
    driver, batches = drive(SCHEDULES["redundant"], **same)
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
