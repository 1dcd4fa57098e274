"""Schedules that must be the synchronous one when they have nothing in excess: event for event, in virtual time."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_helpers import Tape, finish_step, long_tailed, make_driver, reply_of

from april import registry
from april.core.random import stream_key
from april.core.sample import Sample
from april.engines.scripted import Reply
from april.rollout.view import Schedule

SAME: dict[str, dict[str, Any]] = {
    "april": {"type": "april", "over_provision": 1.0, "max_lag_steps": 0},
    "april_with_room": {"type": "april", "over_provision": 1.0, "max_lag_steps": 3, "refill": "step"},
    "adaptive": {"type": "april", "over_provision": "adaptive", "max_lag_steps": 0},
    "bounded_async": {"type": "bounded_async", "max_lag_steps": 0},
    "windowed": {"type": "windowed", "max_lag_steps": 0},
    "multi_version": {"type": "multi_version", "max_lag_steps": 0, "update_mode": "drain"},
    "replicated": {"type": "replicated", "over_provision": 1.0},
    "tail_batching": {"type": "tail_batching", "over_provision": 1.0},
    "truncated": {"type": "truncated", "over_provision": 1.0, "max_lag_steps": 0, "window_tokens": 1000},
}
OTHER: dict[str, dict[str, Any]] = {
    "april": {"type": "april", "over_provision": 2.0, "max_lag_steps": 2},
    "windowed": {"type": "windowed", "max_lag_steps": 1},
    "truncated": {"type": "truncated", "over_provision": 1.0, "max_lag_steps": 0, "window_tokens": 5},
}


def schedule(fields: dict[str, Any]) -> Schedule:
    return registry.builder("schedule", fields["type"])(registry.parse("schedule", fields, "schedule"))  # type: ignore[no-any-return]


def tape_of(fields: dict[str, Any], seed: int, groups: int, size: int, slow: bool, breaks: bool) -> list[tuple[Any, ...]]:
    """Everything that happened in a run of five steps, with its time; samples that start together are one entry."""
    lengths = long_tailed(seed, 12, 64, sigma=1.1)

    def replies(sample: Sample) -> Reply:
        length = len(lengths(sample).token_ids)
        return reply_of(length, length // 2 if breaks and stream_key(seed, "break", sample.id) % 4 == 0 else None)

    tape = Tape()
    driver = make_driver(
        schedule(fields),
        replies,
        groups_per_step=groups,
        group_size=size,
        steps=5,
        watcher=tape,
        delay_s=lambda sample: 9.0 if slow and stream_key(seed, "slow", sample.id) % 3 == 0 else 0.0,
    )
    for _ in range(5):
        batch = driver.next_batch()
        tape.entries.append(("batch", driver.clock.now(), tuple(group.id for group in batch.groups)))
        finish_step(driver)
    return tape.entries


@settings(max_examples=8)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 4), size=st.integers(1, 3), slow=st.booleans(), breaks=st.booleans())
@pytest.mark.parametrize("name", SAME)
def test_with_nothing_in_excess_it_is_the_synchronous_schedule(
    name: str, seed: int, groups: int, size: int, slow: bool, breaks: bool
) -> None:
    breaks = breaks and name != "truncated"  # what lost its engine waits for the next window
    assert tape_of(SAME[name], seed, groups, size, slow, breaks) == tape_of({"type": "sync"}, seed, groups, size, slow, breaks)


@pytest.mark.parametrize("name", OTHER)
def test_the_equality_can_fail(name: str) -> None:
    """Negative control: with something in excess, or a window that cuts, the tapes differ."""
    assert tape_of(OTHER[name], 3, 3, 2, False, False) != tape_of({"type": "sync"}, 3, 3, 2, False, False)


def test_longest_first_with_places_for_all_makes_the_same_batches_at_the_same_times() -> None:
    first = [entry for entry in tape_of({"type": "longest_first"}, 5, 3, 2, True, True) if entry[0] == "batch"]
    assert first == [entry for entry in tape_of({"type": "sync"}, 5, 3, 2, True, True) if entry[0] == "batch"]
