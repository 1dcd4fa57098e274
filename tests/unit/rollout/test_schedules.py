"""What each schedule does beyond the properties that all share."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError
from rollout_helpers import finish_step, long_tailed, make_driver, reply_of, run_steps
from schedule_engines import CostlyEngine, RollingEngine, VersionedEngine

from april import registry
from april.core.errors import RolloutError
from april.core.group import Failure, Reward
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.scripted import ScriptedEngine
from april.rollout.driver import Driver
from april.rollout.schedules.adaptive import CROWDING, LADDER, ladder, next_arm
from april.rollout.view import Schedule


def schedule(type_: str, **fields: Any) -> Schedule:
    config = registry.parse("schedule", {"type": type_, **fields}, "schedule")
    return registry.builder("schedule", type_)(config)  # type: ignore[no-any-return]


def trained(driver: Driver, steps: int | None = None) -> list[list[int]]:
    """Serials of the groups of each batch."""
    return [[group.id.serial for group in batch.groups] for batch in run_steps(driver, steps)]


# -- april ------------------------------------------------------------------------------------------------------------


def test_finish_first_waits_for_as_many_as_are_due_and_not_for_the_oldest() -> None:
    """Four groups of version 0, bound 1, two a step: the batch of step 1 must hold two of the three left, whichever end first."""
    lengths = {0: 60, 1: 3, 2: 3, 3: 8}
    driver = make_driver(
        schedule("april", over_provision=2.0, max_lag_steps=1),
        lambda s: reply_of(lengths.get(s.id.serial, 12)),
        group_size=1,
        steps=3,
    )
    assert trained(driver, 1) == [[1, 2]]
    driver.next_batch()
    assert sorted(group.serial for group in driver.pool.training) == [0, 3]
    assert driver.clock.now() == 60.0  # both that are left of version 0 are due now: this wait is owed


@pytest.mark.parametrize("over", [2.0, 3.0])
def test_a_step_is_not_held_back_by_the_oldest_of_its_age(over: float) -> None:
    """Bound 2, two groups a step: of four or six groups of version 0 some are due at step 1, but never the longest itself."""
    driver = make_driver(
        schedule("april", over_provision=over, max_lag_steps=2),
        lambda s: reply_of(60 if s.id.serial == 0 else 4 + s.id.serial),
        group_size=1,
        steps=4,
    )
    trained(driver, 2)
    assert driver.clock.now() < 30
    assert 0 in {group.serial for group in driver.pool.groups}


def test_refill_before_scoring_does_not_wait_for_judges() -> None:
    same = {"replies": lambda _s: reply_of(5), "delay_s": lambda _s: 100.0, "steps": 6}
    ends = {}
    for before in (False, True):
        fields = {"over_provision": 1.0, "max_lag_steps": 3, "refill": "continuous", "refill_before_scoring": before}
        driver = make_driver(schedule("april", **fields), **same)
        run_steps(driver)
        ends[before] = driver.clock.now()
    assert ends[True] < ends[False]


def test_refill_before_scoring_without_effect_is_refused() -> None:
    from april.rollout.schedules.april import AprilConfig

    with pytest.raises(ValidationError, match="refill = continuous"):
        AprilConfig(max_lag_steps=1, refill_before_scoring=True)
    assert AprilConfig(max_lag_steps=1).refill_before_scoring is False


def test_the_search_of_ratios_goes_to_the_best_and_prefers_the_lower_of_equals() -> None:
    assert next_arm({}, 5, (2, 1), False) == (2, 1)
    assert next_arm({(2, 1): 10.0}, 5, (2, 1), False) == (3, 1)
    assert next_arm({(2, 1): 10.0}, 5, (2, 1), True) == (2, 0)
    assert next_arm({(2, 1): 10.0, (3, 1): 9.0}, 5, (3, 1), False) == (1, 1)
    assert next_arm({(2, 1): 10.0, (3, 1): 9.0, (1, 1): 9.96}, 5, (1, 1), False) == (0, 1)
    assert next_arm({(4, 1): 12.0, (3, 1): 9.0}, 5, (4, 1), False) == (4, 1)
    assert ladder(0) == (1.0,) and ladder(1)[-1] == 2.0 and ladder(100) == LADDER and CROWDING[0] == 1.0


@pytest.mark.parametrize(("kv", "row_s"), [(1 << 40, 1e-4), (500, 1e-4)], ids=["roomy", "scarce"])
def test_adaptive_is_not_below_sync(kv: int, row_s: float) -> None:
    """Wall time for the same number of updates on an engine that slows down with what it does, and preempts."""
    seconds = {}
    for ratio in (1.0, "adaptive"):
        engine = type("Engine", (CostlyEngine,), {"kv_capacity": kv, "row_s": row_s})
        driver = make_driver(
            schedule("april", over_provision=ratio, max_lag_steps=2),
            long_tailed(1, 20, 64),
            engine=engine,
            groups_per_step=4,
            group_size=4,
            num_prompts=500,
            steps=40,
            audited=False,
        )
        run_steps(driver, 38)
        seconds[ratio] = driver.clock.now()
    assert seconds["adaptive"] < seconds[1.0]


# -- windows ----------------------------------------------------------------------------------------------------------


class NoAbort(ScriptedEngine):
    """An engine that cannot stop a sample."""

    def abort(self, ids: Any = None) -> None:
        raise AssertionError("aborted")


def test_truncated_stops_samples_at_the_token_and_never_aborts() -> None:
    driver = make_driver(
        schedule("truncated", window_tokens=7, max_lag_steps=4, over_provision=2.0),
        lambda s: reply_of(30 if s.id.serial == 1 else 5),
        engine=NoAbort,
        group_size=1,
        steps=4,
    )
    first = driver.next_batch()
    assert [group.id.serial for group in first.groups] == [0, 2]
    assert driver.clock.now() == 7.0  # the window, though its samples ended at 5
    parked = {group.serial: len(state.samples[0]) for group, state in driver.pool.groups.items()}
    assert parked == {1: 7, 3: 5}
    assert driver.pool[next(g for g in driver.pool.groups if g.serial == 1).member(0)].spec == driver.spec


def test_a_window_that_ends_with_the_budget_is_an_end() -> None:
    driver = make_driver(
        schedule("truncated", window_tokens=10, max_lag_steps=6),
        lambda s: reply_of(90),
        spec=SamplingSpec(max_new_tokens=20),
        steps=2,
    )
    batches = run_steps(driver)
    assert {(len(s), s.stop) for b in batches for g in b.groups for s in g.samples} == {(20, "length")}
    assert driver.pool.ledger.parked_total == driver.pool.ledger.issued


# -- races ------------------------------------------------------------------------------------------------------------


def test_spare_members_race_and_the_first_to_finish_are_trained() -> None:
    driver = make_driver(
        schedule("replicated", over_provision=1.0, redundant_samples=2),
        lambda s: reply_of(4 + 10 * s.id.member),
        group_size=2,
        steps=3,
    )
    batches = run_steps(driver)
    assert driver.clock.now() == 3 * 14.0  # members 0 and 1; with all four it would be 34 a step
    for batch in batches:
        for group in batch.groups:
            assert [sample.id.member for sample, _ in group.rewarded] == [0, 1]
    assert driver.pool.ledger.reasons == {"failed: lost the race of its group": 12}


def test_redundancy_keeps_the_engine_at_its_places() -> None:
    driver = make_driver(schedule("replicated", over_provision=2.0, max_running=3), long_tailed(2, 8, 64), steps=4)
    most = 0

    def look(name: str, _arguments: dict[str, Any]) -> None:
        nonlocal most
        most = max(most, driver.pool.num_running)

    driver.pool.listener = look
    run_steps(driver)
    assert most == 3


def test_tail_batching_generates_the_losers_again_and_loses_none() -> None:
    """Every fourth group is long: three short steps race past them, then one long step holds long groups only."""
    driver = make_driver(
        schedule("tail_batching", over_provision=1.5),
        lambda s: reply_of(50 if s.id.serial % 3 == 0 else 5),
        groups_per_step=4,
        steps=9,
    )
    batches = run_steps(driver)
    long = [sum(len(g.samples[0]) == 50 for g in batch.groups) for batch in batches]
    assert 4 in long and long.count(0) >= 4
    assert driver.pool.ledger.restarted_total > 0 and driver.pool.ledger.to_dict()["counts"]["evicted"] == 0
    assert all(sample.num_segments == 1 for b in batches for g in b.groups for sample in g.samples)
    assert all(b.version == sample.oldest_version for b in batches for g in b.groups for sample in g.samples)
    sync = make_driver(schedule("sync"), lambda s: reply_of(50 if s.id.serial % 3 == 0 else 5), groups_per_step=4, steps=9)
    run_steps(sync)
    assert driver.clock.now() < sync.clock.now()


def test_without_length_differences_no_step_is_long() -> None:
    driver = make_driver(schedule("tail_batching", over_provision=1.0), steps=5)
    run_steps(driver)
    assert driver.pool.ledger.restarted_total == 0


# -- budgets of tokens ------------------------------------------------------------------------------------------------


def test_what_a_step_generates_beyond_its_budget_is_taken_off_the_next() -> None:
    fields = {"tokens_per_step": 50, "max_lag_steps": 4, "max_running": 8}
    driver = make_driver(schedule("token_budget", **fields), lambda _s: reply_of(6), group_size=1, groups_per_step=8, steps=12)
    cuts = []
    for _ in range(6):
        driver.next_batch()
        cuts.append(driver.tokens_at_cut)
        finish_step(driver)
    spent = [after - before for before, after in zip([0, *cuts], cuts, strict=False)]
    assert spent[0] == 56 and spent[1] == 48, spent  # whole ticks of 8 tokens: 7, then 44 left of the budget are 6
    assert abs(sum(spent) - 6 * 50) <= 8


# -- order ------------------------------------------------------------------------------------------------------------


def test_longest_first_starts_probes_and_then_the_longest() -> None:
    lengths = {0: 3, 1: 9, 2: 5}
    driver = make_driver(
        schedule("longest_first", max_running=3),
        lambda s: reply_of(lengths[s.id.serial % 3]),
        groups_per_step=3,
        group_size=3,
        steps=1,
    )
    started: list[tuple[int, int]] = []

    def listen(name: str, arguments: dict[str, Any]) -> None:
        if name == "start":
            started.extend((sample.serial, sample.member) for sample in arguments["samples"])

    driver.pool.listener = listen
    driver.next_batch()
    assert started[:3] == [(0, 0), (1, 0), (2, 0)]
    # at 3 the probe of group 0 ends: groups 1 and 2 may be longer, 1 is the older; at 5 group 1 is not known yet
    assert started[3:6] == [(1, 1), (1, 2), (2, 1)]


def test_longest_first_is_faster_where_places_are_scarce() -> None:
    seconds = {}
    for type_ in ("sync", "longest_first"):
        driver = make_driver(
            schedule(type_),
            lambda s: reply_of(10 + 50 * (s.id.serial % 4 == 3)),
            groups_per_step=4,
            group_size=4,
            max_running=5,
            steps=6,
        )
        order = trained(driver)
        seconds[type_] = driver.clock.now(), order
    assert seconds["longest_first"][0] < seconds["sync"][0]
    assert seconds["longest_first"][1] == seconds["sync"][1]


def test_windowed_never_trains_a_group_far_ahead_of_the_oldest_unfinished() -> None:
    """The first group is long. With a window of 3 groups, 5 are finished and wait; without, they are trained at once."""
    lengths = {0: 40}
    batches = {}
    for type_, fields in {"windowed": {"window": 0.5, "max_lag_steps": 2}, "bounded_async": {"max_lag_steps": 2}}.items():
        driver = make_driver(schedule(type_, **fields), lambda s: reply_of(lengths.get(s.id.serial, 5)), group_size=1, steps=4)
        batches[type_] = [[group.id.serial for group in batch.groups] for batch in run_from(driver, 3)]
    assert batches["windowed"][:2] == [[1, 2], [0, 3]]
    assert batches["bounded_async"][:2] == [[1, 2], [3, 4]]


# -- versions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_", "hint"), [("multi_version", 'update_mode = "drain"'), ("rolling", "schedule.type = bounded_async")]
)
def test_an_engine_with_one_set_of_weights_is_refused(type_: str, hint: str) -> None:
    with pytest.raises(RolloutError, match="cannot take new weights") as caught:
        make_driver(schedule(type_))
    assert hint in str(caught.value)


def test_running_samples_stay_on_their_version_while_new_ones_start_on_the_newest() -> None:
    driver = make_driver(
        schedule("multi_version", max_lag_steps=2),
        lambda s: reply_of(30 if s.id.serial == 0 else 5),
        engine=VersionedEngine,
        group_size=1,
        steps=4,
    )
    versions = {}
    for _ in range(4):
        batch = driver.next_batch()
        versions |= {g.id.serial: g.samples[0].versions.tolist() for g in batch.groups}
        driver.pool.trained()
        driver.publish({}, driver.emitted_steps, "next_request")
    assert versions[0] == [0] * 30
    assert max(versions[serial][0] for serial in versions) >= 1


def test_a_parked_sample_whose_weights_are_gone_starts_again() -> None:
    driver = make_driver(
        schedule("multi_version", max_lag_steps=2),
        lambda s: reply_of(30 if s.id.serial == 0 else 5),
        engine=VersionedEngine,
        group_size=1,
        steps=4,
    )
    driver.next_batch()
    driver.pool.trained()
    driver.publish({}, 1, "next_request")
    driver.park_all()
    rest = run_from(driver, 3)
    assert driver.pool.ledger.restarted_total > 0
    assert all(sample.num_segments == 1 for batch in rest for g in batch.groups for sample in g.samples)


def run_from(driver: Driver, steps: int) -> list[Any]:
    batches = []
    for _ in range(steps):
        batches.append(driver.next_batch())
        driver.pool.trained()
        driver.publish({}, driver.emitted_steps, driver.schedule.update_mode)
    return batches


def test_a_rolling_update_keeps_all_workers_but_one_in_service() -> None:
    ends = {}
    for type_, engine in {"rolling": RollingEngine, "multi_version": ScriptedEngine}.items():
        fields = {"update_mode": "drain"} if type_ == "multi_version" else {}
        driver = make_driver(
            schedule(type_, max_lag_steps=2, **fields),
            long_tailed(3, 12, 64),
            engine=engine,
            groups_per_step=4,
            max_running=6,
            steps=12,
        )
        run_from(driver, 12)
        ends[type_] = driver.clock.now()
        if type_ == "rolling":
            assert driver.engine.least_serving == RollingEngine.num_workers - 1  # type: ignore[attr-defined]
    assert ends["rolling"] < ends["multi_version"]


def test_a_finish_at_the_moment_of_a_cut_wins() -> None:
    """Both the third and the second member end in one tick: the group has one more than it needs, and nobody is cut."""
    driver = make_driver(
        schedule("replicated", over_provision=1.0, redundant_samples=1),
        lambda s: reply_of(3 if s.id.member == 0 else 6),
        group_size=2,
        steps=1,
    )
    seen: list[Sample] = []
    (batch,) = run_steps(driver)
    for group in batch.groups:
        seen.extend(sample for sample, _ in group.rewarded)
    assert len(seen) == 6 and driver.pool.ledger.reasons == {}


def test_a_loser_with_a_failed_member_is_generated_again_without_it() -> None:
    """The tokens of a failed member age nothing: its group must not be set back again as soon as it has finished."""
    driver = make_driver(
        schedule("tail_batching", over_provision=2.0),
        lambda s: reply_of(50 if s.id.serial % 2 and s.id.member else 5),
        outcome=lambda s: Failure("no answer") if s.id.serial % 2 and not s.id.member else Reward(1.0),
        steps=6,
    )
    batches = run_steps(driver)
    counts = driver.pool.ledger.to_dict()["counts"]
    assert counts["failed"] > 0 and counts["trained"] + counts["failed"] == driver.pool.ledger.issued
    assert driver.pool.ledger.restarted_total <= driver.pool.ledger.issued
    assert all(b.version == sample.oldest_version for b in batches for g in b.groups for sample, _ in g.rewarded)
