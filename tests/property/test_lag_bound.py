"""The lag bound is strict, nothing starves, and empty plans stay empty: random runs of every form of the april schedule."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_helpers import finish_step, group_ids, lag_of, long_tailed, make_driver, reply_of

from april.core.group import Batch
from april.core.ids import GroupId
from april.core.random import stream_key
from april.core.sample import Sample
from april.engines.scripted import Reply
from april.rollout.driver import Driver
from april.rollout.schedules.april import AprilConfig, AprilSchedule

OVER_AGE = ("finish_first", "drop_group", "mask_tokens")


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    return {
        "over_provision": draw(st.sampled_from([1.0, 1.5, 2.0, 3.0])),
        "max_lag_steps": draw(st.integers(0, 4)),
        "refill": draw(st.sampled_from(["step", "continuous"])),
        "granularity": draw(st.sampled_from(["group", "sample"])),
        "seed": draw(st.integers(0, 10_000)),
        "mean_tokens": draw(st.sampled_from([5, 15, 40])),
        "groups_per_step": draw(st.integers(1, 4)),
        "group_size": draw(st.integers(1, 3)),
        "slow_rewards": draw(st.booleans()),
        "breaks": draw(st.booleans()),
        "filtered": draw(st.booleans()),
        "max_running": draw(st.sampled_from([3, 1000])),
    }


def make(case: dict[str, object], over_age: str, steps: int = 8) -> Driver:
    fields = {name: case[name] for name in ("over_provision", "max_lag_steps", "refill", "granularity")}
    seed = case["seed"]
    lengths = long_tailed(seed, case["mean_tokens"], 64, sigma=1.2)  # type: ignore[arg-type]

    def coin(sample: Sample, name: str, one_in: int) -> bool:
        return stream_key(seed, name, sample.id) % one_in == 0  # type: ignore[arg-type]

    def replies(sample: Sample) -> Reply:
        length = len(lengths(sample).token_ids)
        return reply_of(length, length // 2 if case["breaks"] and coin(sample, "break", 4) else None)

    filters = [lambda group: "unlucky" if stream_key(seed, group.id) % 4 == 0 else None] if case["filtered"] else []  # type: ignore[arg-type]
    return make_driver(
        AprilSchedule(AprilConfig(over_age=over_age, **fields)),  # type: ignore[arg-type]
        replies,
        groups_per_step=case["groups_per_step"],  # type: ignore[arg-type]
        group_size=case["group_size"],  # type: ignore[arg-type]
        steps=steps,
        num_prompts=150,
        max_running=case["max_running"],  # type: ignore[arg-type]
        delay_s=lambda sample: 30.0 if case["slow_rewards"] and coin(sample, "slow", 3) else 0.0,
        group_filters=filters,
    )


def drive(driver: Driver) -> tuple[list[Batch], dict[GroupId, int], dict[GroupId, int]]:
    """All batches, and the step in which each group was first and last seen open."""
    batches, first, last = [], {}, {}
    for step in range(driver.steps):
        batches.append(driver.next_batch())
        for group in (*driver.pool.groups, *group_ids(batches[-1])):
            first.setdefault(group, step)
            last[group] = step
        finish_step(driver)
    return batches, first, last


@settings(max_examples=40)
@given(case=cases(), over_age=st.sampled_from(OVER_AGE))
def test_no_trained_token_is_older_than_the_bound(case: dict[str, object], over_age: str) -> None:
    """Invariants 7, 23, 24, 25 (no over-age group is started again) and 3; the audit of the helpers adds 1, 2 and 6."""
    driver = make(case, over_age)
    bound = case["max_lag_steps"]
    batches, _, _ = drive(driver)
    for batch in batches:
        assert len(batch.groups) == case["groups_per_step"]
        lag = max(lag_of(batch, group) for group in batch.groups)
        if over_age == "mask_tokens":
            assert batch.max_token_lag == bound
        else:
            assert batch.max_token_lag is None
            assert lag <= bound  # type: ignore[operator]
    if over_age != "drop_group":
        assert driver.pool.ledger.to_dict()["counts"]["evicted"] == 0
    trained = [group for batch in batches for group in group_ids(batch)]
    assert len(trained) == len(set(trained))
    assert driver.pool.groups == {}


@settings(max_examples=20)
@given(case=cases(), over_age=st.sampled_from(["finish_first", "drop_group"]))
def test_nothing_starves(case: dict[str, object], over_age: str) -> None:
    """Invariant 26: from issue to the end of a group there are never more than 2 (L + 1) steps, whatever the lengths."""
    _, first, last = drive(make(case, over_age, steps=12))
    longest = max(last[group] - first[group] for group in first)
    assert longest <= 2 * (int(case["max_lag_steps"]) + 1)  # type: ignore[call-overload]


def test_without_the_bound_tokens_do_get_older() -> None:
    """Negative control: the same run that masks old tokens instead of waiting has lags beyond the bound."""
    case = {
        "over_provision": 2.0,
        "max_lag_steps": 1,
        "refill": "step",
        "granularity": "group",
        "seed": 3,
        "mean_tokens": 15,
        "groups_per_step": 3,
        "group_size": 2,
        "slow_rewards": False,
        "breaks": False,
        "filtered": False,
        "max_running": 1000,
    }
    lags = {mode: max(lag_of(b, g) for b in drive(make(case, mode, 12))[0] for g in b.groups) for mode in OVER_AGE}
    assert lags["mask_tokens"] > 1
    assert lags["finish_first"] == lags["drop_group"] == 1


@pytest.mark.parametrize("refill", ["step", "continuous"])
def test_a_dropped_prompt_is_not_issued_again_in_the_same_step(refill: str) -> None:
    """Invariant 25: no starvation loop of the long ones; their prompts come back with the next epoch."""
    config = AprilConfig(over_provision=2.0, max_lag_steps=1, over_age="drop_group", refill=refill)  # type: ignore[arg-type]
    driver = make_driver(
        AprilSchedule(config), lambda s: reply_of(60 if s.id.serial % 4 == 3 else 5), groups_per_step=3, steps=16, num_prompts=150
    )
    evicted_at: dict[str, int] = {}
    issued_at: dict[str, list[int]] = defaultdict(list)
    listener = {"step": 0}

    def listen(name: str, arguments: dict[str, object]) -> None:
        if name == "drop":
            evicted_at[arguments["group"].prompt] = listener["step"]  # type: ignore[attr-defined]
        elif name == "issue":
            issued_at[arguments["group"].prompt].append(listener["step"])  # type: ignore[attr-defined]

    driver.pool.listener = listen
    for step in range(16):
        listener["step"] = step
        driver.next_batch()
        finish_step(driver)
    assert driver.pool.ledger.reasons["evicted: over the lag bound"] == 2 * len(evicted_at) > 0
    assert all(step not in issued_at[prompt] for prompt, step in evicted_at.items())


@pytest.mark.parametrize("granularity", ["group", "sample"])
def test_the_longest_waiting_are_started_first(granularity: str) -> None:
    """Invariant 26, in the mode without a bound on waiting: parked groups go before fresh ones in each step."""
    config = AprilConfig(over_provision=2.0, max_lag_steps=1, over_age="mask_tokens", granularity=granularity)  # type: ignore[arg-type]
    driver = make_driver(AprilSchedule(config), long_tailed(7, 15, 64), groups_per_step=3, steps=10)
    started: list[tuple[GroupId, ...]] = []

    def listen(name: str, arguments: dict[str, object]) -> None:
        if name == "start":
            started.append(tuple(sample.group for sample in arguments["samples"]))  # type: ignore[attr-defined]

    driver.pool.listener = listen
    for _ in range(10):
        parked = driver.pool.waiting_groups()
        started.clear()
        driver.next_batch()
        if parked and started:
            assert started[0][:1] == parked[:1]
            assert list(started[0]) == sorted(started[0])
        finish_step(driver)
    assert driver.pool.ledger.parked_total > 10
