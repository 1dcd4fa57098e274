"""The driver's promises: races, failures, stalls, ends of epochs, surplus."""

from __future__ import annotations

import numpy as np
import pytest
from rollout_helpers import (
    SPEC,
    Audited,
    Tape,
    audit,
    finish_step,
    group_ids,
    groups_by_version,
    lengths_by,
    long_tailed,
    make_driver,
    make_prompts,
    make_segment,
    reply_of,
    run_steps,
)

from april.core.clock import VirtualClock
from april.core.errors import EngineError, LedgerError, RolloutError, StallError
from april.core.event import Broken, Event, Finished, Judged, Parked, Progressed
from april.core.group import Failure, Group, Reward
from april.core.ids import SampleId
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.scripted import Reply, ScriptedEngine, token_logprobs
from april.rollout.driver import Driver
from april.rollout.schedules.april import AprilConfig, AprilSchedule
from april.rollout.schedules.sync import SyncConfig, SyncSchedule
from april.rollout.view import Memo, Plan, View


def sync() -> SyncSchedule:
    return SyncSchedule(SyncConfig())


def april(**fields: object) -> AprilSchedule:
    return AprilSchedule(AprilConfig(**({"max_lag_steps": 2, "over_provision": 2.0} | fields)))


def first_order(driver: Driver, count: int) -> list[str]:
    """The prompts that the driver will be given first."""
    return [prompt.id for _, prompt in type(driver.prompts)(make_prompts(40)).next(count, lambda _prompt: False)]  # type: ignore[call-arg]


# -- delivery ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [sync(), april()], ids=["sync", "april"])
def test_a_batch_is_whole_groups_of_distinct_prompts_and_no_sample_is_trained_twice(schedule: SyncSchedule) -> None:
    """Invariants 3 and 6."""
    driver = make_driver(schedule, long_tailed(1, 12, 64), groups_per_step=3, group_size=4, steps=12)
    batches = run_steps(driver)
    for batch in batches:
        assert len(batch.groups) == 3
        assert all(len(group.samples) == 4 for group in batch.groups)
        assert len({group.prompt.id for group in batch.groups}) == 3
    ids = [sample.id for batch in batches for group in batch.groups for sample in group.samples]
    assert len(ids) == len(set(ids)) == 12 * 12
    assert [batch.step for batch in batches] == [batch.version for batch in batches] == list(range(12))
    assert driver.rewards.seen.most_common(1)[0][1] == 1  # type: ignore[attr-defined]  # invariant 17: judged once


def test_surplus_groups_of_the_same_wake_up_come_first_in_the_next_step() -> None:
    """Invariant 4: six groups end in one tick, two are cut; the next two batches need no further token."""
    driver = make_driver(april(over_provision=3.0), lambda _sample: reply_of(5), steps=5)
    first = driver.next_batch()
    assert group_ids(first) == sorted(group_ids(first))
    surplus = list(driver.pool.ready)
    assert len(surplus) == 4
    finish_step(driver)
    generated = driver.engine.load().generated_tokens
    second = driver.next_batch()
    assert group_ids(second) == surplus[:2]
    finish_step(driver)
    assert group_ids(driver.next_batch()) == surplus[2:]
    assert driver.engine.load().generated_tokens == generated


def test_a_parked_group_is_resumed_with_its_tokens_and_log_probs() -> None:
    """Invariants 8 to 12: what was sampled before the cut is kept as it was; new tokens carry the new version."""
    order = first_order(make_driver(april()), 4)
    driver = make_driver(april(), lengths_by({(order[0], 1): 40}, 7), steps=4)
    assert order[0] not in {group.prompt.id for group in driver.next_batch().groups}
    parked = {group: state.samples[1] for group, state in driver.pool.groups.items() if group.prompt == order[0]}
    (group, before), *_ = parked.items()
    assert len(before) == 7
    finish_step(driver)
    delivered = {g.id: (batch, g) for batch in run_steps(driver, 3) for g in batch.groups}
    batch, whole = delivered[group]
    after = whole.samples[1]
    assert batch.version - before.oldest_version <= 2  # type: ignore[operator]
    assert after.token_ids.tolist() == list(range(40))
    assert after.spans[0][:3] == (0, 7, 0)
    assert after.num_segments > 1
    assert np.all(np.diff(after.versions) >= 0)
    np.testing.assert_array_equal(after.behaviour_logprobs, token_logprobs(after.id, 0, np.arange(40)))
    np.testing.assert_array_equal(after.behaviour_logprobs[:7], before.behaviour_logprobs)


def test_cutting_at_any_place_gives_the_same_samples() -> None:
    """Invariant 34: the same ids give the same tokens and log-probs whether they were cut often, once or never."""
    contents = []
    for schedule in (sync(), april(), april(refill="continuous", over_provision=3.0), april(max_lag_steps=4)):
        batches = run_steps(make_driver(schedule, long_tailed(2, 10, 64), steps=8, num_prompts=60))
        contents.append(
            {
                s.id: (s.token_ids.tolist(), s.behaviour_logprobs.tolist(), s.stop)
                for b in batches
                for g in b.groups
                for s in g.samples
            }
        )
    for other in contents[1:]:
        shared = contents[0].keys() & other.keys()
        assert len(shared) > 10
        assert all(contents[0][sample] == other[sample] for sample in shared)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("delay_s", "breaks_at"), [(0.0, None), (3.5, None), (0.0, 3)])
def test_april_without_over_provision_is_the_synchronous_run(seed: int, delay_s: float, breaks_at: int | None) -> None:
    """Invariant 35: event for event, with slow rewards or lost engines too; over-provision is the negative control."""
    tapes, lengths = [], long_tailed(seed, 10, 64)

    def replies(sample: Sample) -> Reply:
        return reply_of(len(lengths(sample).token_ids), breaks_at)

    for schedule in (sync(), april(over_provision=1.0), april(over_provision=1.0, granularity="sample"), april()):
        tape = Tape()
        run_steps(make_driver(schedule, replies, steps=6, watcher=tape, delay_s=lambda _s: delay_s))
        tapes.append(tape.entries)
    assert tapes[0] == tapes[1] == tapes[2]
    assert tapes[0] != tapes[3]


def test_refill_by_steps_starts_m_groups_and_m_more_only_when_short() -> None:
    """M = 4 groups at first; with all kept no more; with the filter dropping three of the first four, four more."""
    for filtered, expected in ((0, 4), (2, 4), (3, 8)):
        left = [filtered]

        def drop_some(_group: Group, left: list[int] = left) -> str | None:
            left[0] -= 1
            return "unlucky" if left[0] >= 0 else None

        driver = make_driver(april(max_lag_steps=4), lambda s: reply_of(4 + s.id.serial), group_filters=[drop_some])
        driver.next_batch()
        assert driver.pool.next_serial == expected, filtered


def test_continuous_refill_replaces_each_group_that_ends() -> None:
    order = first_order(make_driver(april()), 4)
    driver = make_driver(
        april(refill="continuous", max_lag_steps=4),
        lengths_by({(p, m): 30 + 10 * i for i, p in enumerate(order[1:]) for m in (0, 1)}, 4),
    )
    driver.next_batch()
    assert driver.pool.next_serial == 5  # group 0 ended at 4 s and was replaced; the fifth completed the batch
    assert driver.schedule.max_running_groups == 4  # type: ignore[attr-defined]


def test_sample_granularity_fills_places_of_samples() -> None:
    """With one long sample in each group the group rule waits, the sample rule starts further groups beside them."""
    counts = {}
    for granularity in ("group", "sample"):
        driver = make_driver(
            april(refill="continuous", granularity=granularity, max_lag_steps=9), lambda s: reply_of(60 if s.id.member else 4)
        )
        driver.next_batch()
        counts[granularity] = driver.pool.next_serial
    assert counts["sample"] > counts["group"]


# -- races ------------------------------------------------------------------------------------------------------------


def test_a_sample_that_was_never_started_parks_unchanged() -> None:
    """Invariant 15: with one place in the engine seven samples wait inside it; the abort gives them back as they were."""
    driver = make_driver(april(over_provision=2.0), lambda s: reply_of(6), max_running=4, group_size=2)
    driver.next_batch()
    untouched = [s for state in driver.pool.groups.values() for s in state.samples.values()]
    assert untouched
    assert {len(sample) for sample in untouched} == {0}
    assert {sample.oldest_version for sample in untouched} == {None}
    assert groups_by_version(driver.pool) == {}
    finish_step(driver)
    batch = driver.next_batch()
    assert all(s.spans[0].version == 1 for g in batch.groups for s in g.samples)


def test_a_finish_in_the_tick_of_the_abort_wins() -> None:
    """Invariant 14: all samples end in one tick; the batch is cut in it, and nothing is parked."""
    driver = make_driver(april(over_provision=2.0), lambda _s: reply_of(5))
    tape = Tape()
    driver.watcher = tape
    driver.next_batch()
    kinds = [entry[0] for entry in tape.entries]
    assert kinds.count("Finished") == 8
    assert "Parked" not in kinds


def test_an_abort_of_what_has_finished_is_ignored() -> None:
    """Invariant 14, in the engine: the event that is already on its way is the only one."""
    clock = VirtualClock()
    engine = ScriptedEngine(lambda _s: reply_of(1), clock)
    group = make_prompts(1)[0]
    sample = Sample(SampleId(0, 0, "p0", 0), group, SPEC)
    engine.submit([sample])
    clock.wait_until(1.0)
    engine._tick()
    engine.abort()
    engine.abort([sample.id])
    events = engine.poll()
    assert [type(event) for event in events] == [Finished]


class SlowAbort(ScriptedEngine):
    """Confirms an abort two seconds after it was asked for; meanwhile it goes on generating."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.abort_at: tuple[float, list[SampleId]] | None = None

    def abort(self, ids: object = None) -> None:
        self.abort_at = (self._clock.now() + 2.5, list(ids or self._jobs))  # type: ignore[call-overload]

    def poll(self) -> list[Event]:
        events = super().poll()
        if self.abort_at and self._clock.now() >= self.abort_at[0]:
            super().abort(self.abort_at[1])
            self.abort_at = None
            events += super().poll()
        return events

    def ready_at(self) -> float | None:
        times = [t for t in (super().ready_at(), self.abort_at[0] if self.abort_at else None) if t is not None]
        return min(times, default=None)


def test_an_abort_takes_as_long_as_the_engine_needs() -> None:
    """Invariants 18 and 19: tokens and ends that come between the request and its confirmation are kept."""
    lengths = {0: 4, 1: 4, 2: 6, 3: 30}
    driver = make_driver(april(), lambda s: reply_of(lengths.get(s.id.serial, 9)), engine=SlowAbort)
    driver.next_batch()
    assert driver.pool.num_running == 0
    assert driver.engine.load().running == 0
    states = list(driver.pool.groups.values())
    assert [state.ready or bool(state.scoring) for state in states] == [True, False]
    assert {len(sample) for sample in states[1].samples.values()} == {6}
    finish_step(driver)
    assert states[0].id in group_ids(driver.next_batch())


class DeafEngine(ScriptedEngine):
    """Loses its jobs on an abort without an event."""

    def abort(self, ids: object = None) -> None:
        self._jobs.clear()


def test_an_abort_without_confirmation_is_an_error() -> None:
    """Invariant 18."""
    driver = make_driver(april(), lambda s: reply_of(4 + s.id.serial), engine=DeafEngine)
    with pytest.raises(EngineError, match="did not confirm an abort"):
        driver.next_batch()


# -- failure ----------------------------------------------------------------------------------------------------------


def test_a_broken_sample_keeps_its_tokens_and_its_budget() -> None:
    """Invariant 33: what was streamed survives the engine; the sample goes on from there."""
    driver = make_driver(sync(), lambda s: reply_of(20, breaks_at=9 if s.id.member else None), steps=2)
    batches = run_steps(driver)
    for sample in (s for b in batches for g in b.groups for s in g.samples):
        assert sample.token_ids.tolist() == list(range(20))
    assert driver.pool.ledger.parked_total == driver.pool.ledger.resumed_total == 4


class AlwaysBreaks(ScriptedEngine):
    """Loses one sample each time, after one more token."""

    victim = 0

    def poll(self) -> list[Event]:
        events: list[Event] = []
        for event in super().poll():
            events.append(event)
        for sample in [s for s in self._jobs if s.serial == self.victim and s.member == 0]:
            job = self._jobs.pop(sample)
            if segment := self._segment(job):
                events.append(Progressed(self._clock.now(), sample, segment))
            events.append(Broken(self._clock.now(), sample, "out of memory"))
        return events


def test_a_sample_fails_after_its_last_retry_and_its_group_is_still_whole() -> None:
    """Invariant 16: failed is neither truncated nor aborted; the ledger knows the reason."""
    driver = make_driver(sync(), lambda _s: reply_of(20), engine=AlwaysBreaks, max_retries=2, steps=1)
    (batch,) = run_steps(driver)
    group = next(g for g in batch.groups if g.id.serial == 0)
    assert group.outcomes[0] == Failure("out of memory")
    assert len(group.samples[0]) == 3  # the first life and two retries
    assert len(group.rewarded) == 1
    assert driver.pool.ledger.reasons == {"failed: out of memory": 1}
    counts = driver.pool.ledger.to_dict()["counts"]
    assert (counts["failed"], counts["trained"]) == (1, 3)


def test_parking_is_not_a_lost_engine() -> None:
    """Invariant 33: a long sample that was parked in each step has its retries left when its engine dies."""
    tokens = {0: 60}

    def replies(sample: Sample) -> Reply:
        return reply_of(tokens.get(sample.id.serial, 4), breaks_at=50 if sample.id.serial == 0 else None)

    driver = make_driver(april(max_lag_steps=20), replies, max_retries=1, steps=18)
    run_steps(driver)
    assert driver.pool.ledger.parked_total > 2 * (1 + 1)
    assert driver.pool.ledger.counts["failed"] == 0  # type: ignore[index]


def test_a_group_with_too_few_rewards_is_given_up_and_replaced() -> None:
    """Invariant 16: a reward that fails is no zero; the group goes with its reason."""

    def outcome(sample: Sample) -> Reward | Failure:
        return Failure("judge timed out") if sample.id.serial == 0 else Reward(0.5)

    driver = make_driver(sync(), outcome=outcome, min_rewarded=1, steps=1)
    (batch,) = run_steps(driver)
    assert [group.id.serial for group in batch.groups] == [1, 2]
    assert driver.pool.ledger.reasons["failed: judge timed out"] == 2
    audit(driver.pool)


def test_a_filtered_group_is_counted_replaced_and_its_prompt_not_served_again() -> None:
    """Invariant 5, and 2.6.6: a batch is never cut short or empty."""
    seen: list[str] = []

    def reject_even(group: Group) -> str | None:
        seen.append(group.prompt.id)
        return "even" if group.id.serial % 2 == 0 else None

    for schedule in (sync(), april()):
        seen.clear()
        driver = make_driver(schedule, group_filters=[reject_even], steps=4, num_prompts=40)
        batches = run_steps(driver)
        assert all(len(batch.groups) == 2 and g.id.serial % 2 for batch in batches for g in batch.groups)
        assert driver.pool.ledger.reasons["filtered: even"] == driver.pool.ledger.counts["filtered"] > 0  # type: ignore[index]
        assert len(seen) == len(set(seen))


def test_an_over_age_group_that_is_still_being_judged_goes_when_its_outcome_comes() -> None:
    """Invariants 7 and 25: it is neither started again, nor delivered, nor dropped under the judge's hands."""

    def replies(sample: Sample) -> Reply:
        return reply_of(60 if sample.id.serial == 0 and sample.id.member else 4)

    driver = make_driver(
        april(over_age="drop_group", max_lag_steps=1),
        replies,
        delay_s=lambda s: 40.0 if s.id.serial == 0 else 0.0,
        steps=20,
    )
    batches = run_steps(driver)
    assert 0 not in {group.id.serial for batch in batches for group in batch.groups}
    assert driver.pool.ledger.reasons == {"evicted: over the lag bound": 2}
    assert driver.pool.ledger.resumed_total == 1  # at version 1, within the bound; not at 2 and later


@pytest.mark.parametrize("granularity", ["group", "sample"])
def test_a_step_is_filled_although_the_last_one_is_still_being_judged(granularity: str) -> None:
    """Invariant 17: slow judgements of surplus groups take their own places, not those of the groups that could run."""
    driver = make_driver(
        april(over_provision=3.0, max_lag_steps=4, granularity=granularity),
        lambda s: reply_of(4),
        delay_s=lambda s: 30.0 if s.id.serial in (2, 3) else 0.0,
        steps=8,
    )
    driver.next_batch()
    assert len(driver.pool.ready) == 2
    assert driver.pool.num_active_groups == 2
    finish_step(driver)
    driver.next_batch()
    finish_step(driver)
    driver._plan()
    assert driver.pool.num_active_groups == 6  # two that are judged, four that run
    assert driver.pool.num_running == 8


# -- stalls -----------------------------------------------------------------------------------------------------------


def test_a_data_set_smaller_than_a_batch_stalls_with_a_reason() -> None:
    """Invariant 36, and 2.6.4: no dead-lock and no prompt twice in a batch, but a message."""
    driver = make_driver(sync(), groups_per_step=5, num_prompts=3)
    with pytest.raises(StallError) as caught:
        driver.next_batch()
    text = str(caught.value)
    assert "step 0 cannot be completed" in text
    assert "3 of 5 groups ready, 3 open" in text
    assert "smaller than a batch" in text


def test_a_stall_names_what_never_came() -> None:
    driver = make_driver(april(), delay_s=lambda s: float("inf") if s.id.serial == 1 else 0.0, steps=1)
    with pytest.raises(StallError, match=r"rewards: g1/e0/p\d+/m0; rewards: g1/e0/p\d+/m1"):
        driver.next_batch()


def test_a_filter_that_drops_everything_stalls_when_the_data_are_used_up() -> None:
    """2.6.6: it says which filter; with endless epochs it would go on, so the reasons are in the message."""

    class OneEpoch:
        def __init__(self) -> None:
            self.left = make_prompts(10)

        def next(self, count: int, _is_open: object) -> list[tuple[int, object]]:
            taken, self.left = self.left[:count], self.left[count:]
            return [(0, prompt) for prompt in taken]

        def state_dict(self) -> dict[str, int]:
            return {"left": len(self.left)}

    for schedule in (sync(), april()):
        driver = make_driver(schedule, group_filters=[lambda _g: "constant rewards"])
        driver.prompts = OneEpoch()  # type: ignore[assignment]
        with pytest.raises(StallError, match="'filtered: constant rewards': 20"):
            driver.next_batch()


@pytest.mark.parametrize("num_prompts", [4, 5, 7])
@pytest.mark.parametrize("refill", ["step", "continuous"])
def test_a_data_set_smaller_than_m_goes_on_epoch_after_epoch(num_prompts: int, refill: str) -> None:
    """Invariant 36: M = 8 with 4 to 7 prompts; each prompt once an epoch, none twice in a batch, none left behind."""
    driver = make_driver(
        april(over_provision=2.0, refill=refill), long_tailed(3, 8, 64), groups_per_step=4, steps=14, num_prompts=num_prompts
    )
    batches = run_steps(driver)
    used = [group.id for batch in batches for group in batch.groups]
    assert all(len({g.prompt.id for g in batch.groups}) == 4 for batch in batches)
    assert len({(group.epoch, group.prompt) for group in used}) == len(used) == 56
    counts = np.bincount([int(group.prompt[1:]) for group in used], minlength=num_prompts)
    assert counts.max() - counts.min() <= 4


@pytest.mark.parametrize("schedule", [sync(), april(), april(refill="continuous")], ids=["sync", "step", "continuous"])
def test_no_more_is_issued_than_the_run_needs(schedule: SyncSchedule) -> None:
    """Invariant 36: the last step drains; nothing is left open at the end."""
    driver = make_driver(schedule, long_tailed(4, 10, 64), steps=5)
    run_steps(driver)
    assert driver.pool.groups == {}
    assert driver.pool.ledger.issued == driver.pool.ledger.counts["trained"] == 20  # type: ignore[index]
    assert driver.engine.load().running == 0


class NeverStops:
    """Asks for one more group, forever."""

    max_lag_steps = 0

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        return Plan(issue=1), memo


def test_a_schedule_that_never_stops_planning_is_caught() -> None:
    driver = make_driver(NeverStops(), audited=False, num_prompts=3)
    with pytest.raises(RolloutError, match="never stops planning") as caught:
        driver.next_batch()
    assert caught.value.where == "NeverStops"


def test_the_audit_would_notice_a_schedule_that_is_not_level_triggered() -> None:
    """Negative control of the test helper."""

    class EverySecondTime:
        max_lag_steps = 0
        calls = 0

        def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
            self.calls += 1
            return Plan(issue=self.calls % 2), memo

    schedule = EverySecondTime()
    schedule.calls = 1
    driver = make_driver(schedule)
    with pytest.raises(AssertionError, match="unchanged view"):
        driver.next_batch()
    assert isinstance(driver.schedule, Audited)


# -- late and wrong events --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["progressed", "parked", "finished", "broken", "judged"])
def test_an_event_for_a_closed_group_names_it(kind: str) -> None:
    """Invariant 19: a late reply that the pool cannot place is never dropped in silence."""
    driver = make_driver(sync(), steps=2)
    (batch,) = run_steps(driver, 1)
    sample = batch.groups[0].samples[0].id
    events: dict[str, Event] = {
        "progressed": Progressed(0.0, sample, make_segment(1)),
        "parked": Parked(0.0, sample, None),
        "finished": Finished(0.0, sample, None, "eos"),
        "broken": Broken(0.0, sample, "late"),
        "judged": Judged(0.0, sample, Reward(1.0)),
    }
    with pytest.raises(LedgerError, match="not open") as caught:
        driver._apply(events[kind])
    assert caught.value.where == str(sample)
    audit(driver.pool)


def test_a_reward_that_comes_twice_is_refused() -> None:
    """Invariant 17."""
    driver = make_driver(sync(), delay_s=lambda s: 0.0 if s.id.member == 0 else 50.0)
    with pytest.raises(LedgerError, match="impossible move"):
        while True:
            driver._plan()
            driver._turn()
            for sample, status in list(driver.pool.status.items()):
                if status == "ready":
                    driver._apply(Judged(0.0, sample, Reward(1.0)))
    assert driver.pool.ledger.balanced


def test_a_reward_may_outlive_the_step() -> None:
    """Invariant 17, and 2.6.9: the judgement of a surplus group comes in the next step, under newer weights, and counts."""
    driver = make_driver(april(), lambda s: reply_of(4), delay_s=lambda s: 100.0 if s.id.serial in (0, 1) else 0.0, steps=3)
    first = driver.next_batch()
    assert [g.id.serial for g in first.groups] == [2, 3]
    assert driver.clock.now() < 50
    finish_step(driver)
    rest = run_steps(driver, 2)
    assert {0, 1} <= {g.id.serial for batch in rest for g in batch.groups}


def test_truncation_by_the_budget_is_no_failure() -> None:
    """Invariants 12 and 16: cut and resumed, a sample ends at its budget in total."""
    driver = make_driver(
        april(max_lag_steps=3), lambda s: reply_of(90 if s.id.member else 6), spec=SamplingSpec(max_new_tokens=20), steps=4
    )
    batches = run_steps(driver)
    long = [s for b in batches for g in b.groups for s in g.samples if s.id.member]
    assert {(len(s), s.stop) for s in long} == {(20, "length")}
    assert driver.pool.ledger.counts["failed"] == 0  # type: ignore[index]


def test_weights_go_live_between_steps_only() -> None:
    """Invariant 20: a batch has no token of later weights, and the driver knows what the engine serves."""
    driver = make_driver(april(), long_tailed(5, 10, 64), steps=6)
    for batch in run_steps(driver):
        assert batch.version == batch.step
        newest = max(s.versions.max() for g in batch.groups for s in g.samples)
        assert newest <= batch.version
    assert driver.version == driver.engine.load().version == 6
