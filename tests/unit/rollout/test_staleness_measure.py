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
from april.rollout.queues import Age, GroupsByAge
from april.rollout.staleness import Bound, admissible, needs, over_age, shortfalls


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
        ({}, 5, []),
        ({5: 2}, 5, []),
        ({3: 1}, 5, [(3, 1)]),  # at the bound: must be in this batch
        ({4: 3}, 5, [(4, 1)]),  # due at 6 or before: two fit there, the third must go now
        ({4: 2}, 5, []),
        ({4: 1, 5: 3}, 5, []),  # due by 6: 1 (2 fit); due by 7: 4 (4 fit)
        ({4: 2, 5: 3}, 5, [(5, 1)]),  # due by 7: 5 of 4
        ({3: 1, 5: 5}, 5, [(3, 1), (5, 2)]),
    ],
)
def test_needs_with_two_groups_a_step_and_a_bound_of_two(
    ages: dict[int, int], version: int, expected: list[tuple[int, int]]
) -> None:
    """Invariants 24 and 26: c(d) - (d - v) N for every d."""
    counted = [Age(oldest, count, 0) for oldest, count in ages.items()]
    assert needs(counted, version, 2, 2) == shortfalls(counted, version, 2, 2) == expected


def test_a_batch_of_any_size_needs_what_is_at_the_bound_only() -> None:
    ages = [Age(3, 4, 1), Age(4, 9, 0)]
    assert needs(ages, 5, None, 2) == [(3, 4)]
    assert shortfalls(ages, 5, None, 2) == [(3, 3)]


def test_any_ready_group_of_an_age_meets_its_need() -> None:
    """Twelve groups of version 4, eight fit later: four must go now, whichever have finished; the oldest may go on."""
    assert shortfalls([Age(4, 12, 4)], 5, 8, 2) == []
    assert shortfalls([Age(4, 12, 3)], 5, 8, 2) == [(4, 1)]
    assert shortfalls([Age(3, 2, 0), Age(4, 10, 9)], 5, 8, 2) == [(3, 2)]


class Aged:
    """A view of groups by age."""

    def __init__(self, version: int, groups_per_step: int, **by_version: tuple[GroupId, ...]) -> None:
        self.version, self.groups_per_step = version, groups_per_step
        self.by_version = {int(name[1:]): some for name, some in by_version.items()}
        self.ready: set[GroupId] = set()

    def ages(self) -> tuple[Age, ...]:
        return tuple(Age(v, len(some), len(self.ready & set(some))) for v, some in self.by_version.items())

    def groups_of(self, version: int) -> tuple[GroupId, ...]:
        return self.by_version[version]

    def oldest_version(self, group: GroupId) -> int | None:
        return next((version for version, some in self.by_version.items() if group in some), None)


def test_a_batch_takes_what_is_due_first_and_then_in_the_order_given() -> None:
    view = Aged(5, 3, v3=groups(0, 2), v4=groups(2, 3), v5=groups(5, 3))
    ready = [*groups(6, 2), *groups(3, 2), *groups(1, 1)]
    view.ready = set(ready)
    bound = Bound(2, "finish_first")
    assert bound.missing(view) == [(3, 1)]  # type: ignore[arg-type]
    view.ready |= {groups(0, 1)[0]}
    assert bound.missing(view) == []  # type: ignore[arg-type]
    chosen = bound.choose(view, [*ready, *groups(0, 1)])  # type: ignore[arg-type]
    assert chosen == (*groups(1, 1), *groups(0, 1), *groups(6, 1))
    assert Bound(2, "mask_tokens").choose(view, ready) == tuple(ready[:3])  # type: ignore[arg-type]
    assert Bound(2, "mask_tokens").max_token_lag == 2 and bound.max_token_lag is None


def test_over_age_is_strictly_beyond_the_bound() -> None:
    view = Aged(5, 2, v2=groups(0, 1), v3=groups(1, 2), v5=groups(3, 1))
    assert over_age(view, 2) == groups(0, 1)  # type: ignore[arg-type]
    assert over_age(view, 3) == ()  # type: ignore[arg-type]
    view.version = 6
    assert over_age(view, 0) == groups(0, 4)  # type: ignore[arg-type]


def test_ready_groups_are_counted_with_their_age() -> None:
    ages, (one, other) = GroupsByAge(), groups(0, 2)
    ages.move(one, None, 3, ready=False)
    ages.move(other, None, 4, ready=False)
    ages.count_ready(4, 1)
    assert ages.ages() == (Age(3, 1, 0), Age(4, 1, 1))
    ages.move(other, 4, 3, ready=True)
    assert ages.ages() == (Age(3, 2, 1),) and ages.of(3) == (one, other)


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
