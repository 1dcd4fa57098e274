"""Age and length bias in literal numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rollout_helpers import SPEC, make_prompts, make_segment

from april.core.group import Batch, Failure, Group, Outcome, Reward
from april.core.ids import GroupId
from april.core.sample import Sample, Span
from april.rollout.measure import LengthMeter, describe_batch
from april.rollout.staleness import admissible, due_now, over_age


def groups(first: int, count: int) -> tuple[GroupId, ...]:
    return tuple(GroupId(serial, 0, f"p{serial}") for serial in range(first, first + count))


def test_admission_is_l_plus_one_batches() -> None:
    """Invariant 24."""
    assert admissible(0, 4, 2) == 12
    assert admissible(11, 4, 2) == 1
    assert admissible(12, 4, 2) == admissible(20, 4, 2) == 0
    assert admissible(0, 4, 0) == 4


@pytest.mark.parametrize(
    ("ages", "version", "expected"),
    [
        ({}, 5, 0),
        ({5: 2}, 5, 0),
        ({3: 1}, 5, 1),  # at the bound: must be in this batch
        ({4: 3}, 5, 1),  # due at 6 or before: two fit there, the third must go now
        ({4: 2}, 5, 0),
        ({4: 1, 5: 3}, 5, 0),  # due by 6: 1 (2 fit); due by 7: 4 (4 fit)
        ({4: 2, 5: 3}, 5, 1),  # due by 7: 5 of 4
        ({3: 1, 5: 5}, 5, 2),
    ],
)
def test_due_now_with_two_groups_a_step_and_a_bound_of_two(ages: dict[int, int], version: int, expected: int) -> None:
    """Invariants 24 and 26: max over d of c(d) - (d - v) N, of the earliest due, oldest version first."""
    by_version, first = {}, 0
    for oldest, count in ages.items():
        by_version[oldest] = groups(first, count)
        first += count
    flat = tuple(group for some in by_version.values() for group in some)
    assert due_now(by_version, version, 2, 2) == flat[:expected]


def test_over_age_is_strictly_beyond_the_bound() -> None:
    by_version = {2: groups(0, 1), 3: groups(1, 2), 5: groups(3, 1)}
    assert over_age(by_version, 5, 2) == groups(0, 1)
    assert over_age(by_version, 5, 3) == ()
    assert over_age(by_version, 6, 0) == groups(0, 4)


def test_without_censoring_the_mean_is_the_mean() -> None:
    """Invariant 39."""
    meter = LengthMeter(20)
    for length in (3, 5, 5, 11):
        meter.finished(length)
    assert meter.issued_mean_tokens([]) == pytest.approx(6.0)
    with_tail = LengthMeter(20)
    for length in (1, 20):
        with_tail.finished(length)
    assert with_tail.issued_mean_tokens([]) == pytest.approx(10.5)


def test_kaplan_meier_by_hand() -> None:
    """Ends at 2 and 4, one still running at 3: S = 1, 1, 2/3, 2/3, 0, so the mean is 1 + 1 + 2/3 + 2/3."""
    meter = LengthMeter(8)
    meter.finished(2)
    meter.finished(4)
    assert meter.issued_mean_tokens([3]) == pytest.approx(10 / 3)
    # Of the same length as an end, what runs is still at risk there: S = 1, 1, 2/3, 2/3, 0.
    assert meter.issued_mean_tokens([2]) == pytest.approx(1 + 1 + 2 / 3 + 2 / 3)


def test_under_censoring_it_is_closer_to_the_truth_than_the_mean_of_the_finished() -> None:
    """Invariant 39: 1000 lengths cut at random times; truth 11.36, naive below 8.4, Kaplan-Meier within 0.5."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.geometric(0.09, 1000), 1, 200)
    cuts = random.integers(5, 40, 1000)
    meter = LengthMeter(200)
    for length in lengths[lengths <= cuts]:
        meter.finished(int(length))
    estimate = meter.issued_mean_tokens(cuts[lengths > cuts])
    truth, naive = lengths.mean(), lengths[lengths <= cuts].mean()
    assert truth == pytest.approx(11.36)
    assert abs(estimate - truth) < 0.5 < 3 < abs(naive - truth)


def test_a_meter_is_empty_at_first_and_survives_a_checkpoint() -> None:
    meter = LengthMeter(10)
    assert math.isnan(meter.issued_mean_tokens([4, 4]))
    assert math.isnan(meter.delivered_mean_tokens)
    for length in (2, 2, 9):
        meter.finished(length)
    meter.delivered(2)
    meter.delivered(3)
    copy = LengthMeter(10)
    copy.finished(5)
    copy.load_state_dict(meter.state_dict())
    assert copy.state_dict() == meter.state_dict()
    assert copy.delivered_mean_tokens == 2.5
    assert copy.issued_mean_tokens([1]) == meter.issued_mean_tokens([1])


def make_batch(max_token_lag: int | None) -> Batch:
    prompt = make_prompts(1)[0]
    group = GroupId(0, 0, "p0")
    old = Sample(group.member(0), prompt, SPEC).extended(make_segment(3, 2)).extended(make_segment(1, 5)).finished("eos")
    new = Sample(group.member(1), prompt, SPEC).extended(make_segment(2, 5)).finished("length")
    lost = Sample(group.member(2), prompt, SPEC).extended(make_segment(7, 1))
    outcomes: tuple[Outcome, ...] = (Reward(1.0, True), Reward(0.0), Failure("gone"))
    return Batch(5, 5, (Group(group, (old, new, lost), outcomes),), max_token_lag)


def test_a_batch_in_numbers() -> None:
    """Invariant 23: lag is version at the update minus version of the token; a failed member does not count."""
    numbers = describe_batch(make_batch(None))
    assert numbers["num_samples"] == 2
    assert (numbers["batch_tokens"], numbers["length_mean"], numbers["length_max"]) == (6, 3, 4)
    assert (numbers["reward_mean"], numbers["accuracy"], numbers["truncated_fraction"]) == (0.5, 0.5, 0.5)
    assert (numbers["lag_max"], numbers["lag_mean"], numbers["stale_token_fraction"]) == (3, 1.5, 0.5)
    assert numbers["segments_mean"] == 1.5


def test_masked_tokens_have_no_lag() -> None:
    numbers = describe_batch(make_batch(2))
    assert (numbers["lag_max"], numbers["stale_token_fraction"]) == (0, 0)
    assert numbers["batch_tokens"] == 6


def test_environment_tokens_have_no_lag() -> None:
    prompt, group = make_prompts(1)[0], GroupId(0, 0, "p0")
    spans = (Span(0, 1, 4), Span(1, 3, -1, "environment"))
    sample = Sample(group.member(0), prompt, SPEC, np.arange(3), np.zeros(3), np.array([1, 0, 0], bool), spans, stop="eos")
    numbers = describe_batch(Batch(5, 5, (Group(group, (sample,), (Reward(1.0),)),)))
    assert (numbers["lag_mean"], numbers["lag_max"], numbers["stale_token_fraction"]) == (1, 1, 1)
    empty = describe_batch(Batch(0, 0, ()))
    assert empty["num_samples"] == 0
    assert math.isnan(empty["reward_mean"])
