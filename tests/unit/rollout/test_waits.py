"""Waiting is bounded: each wait ends with the reason, the owner and the ids; and each stage has its policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from rollout_helpers import FakeRewards, make_driver, reply_of

from april.config.limits import LimitsConfig
from april.core.clock import VirtualClock
from april.core.errors import EngineError, RolloutError, StallError
from april.core.event import Broken, Event, Judged, Wait
from april.core.group import Failure, Reward
from april.core.ids import GroupId, SampleId
from april.core.sample import Sample
from april.engines.base import UpdateMode, Weights
from april.engines.scripted import Reply, ScriptedEngine
from april.rollout.policies import LossPolicy
from april.rollout.schedules.april import AprilConfig, AprilSchedule
from april.rollout.schedules.sync import SyncConfig, SyncSchedule
from april.rollout.waits import MAX_IDS, Patience, wait_for_next

LIMITS = LimitsConfig(quiet_s=50, park_s=30, publish_s=20)
ONE = GroupId(0, 0, "p0").member(0)


def sync() -> SyncSchedule:
    return SyncSchedule(SyncConfig())


class Deaf(ScriptedEngine):
    """Looks busy for ever: it never says anything, or never lets go of a sample, or never takes new weights."""

    deaf_to = "submit"

    def ready_at(self) -> float | None:
        return self._clock.now() + 1.0

    def submit(self, samples: Sequence[Sample]) -> None:
        if self.deaf_to != "submit":
            super().submit(samples)

    def abort(self, ids: Sequence[SampleId] | None = None) -> None:
        if self.deaf_to != "abort":
            super().abort(ids)

    def poll(self) -> list[Event]:
        if self.deaf_to == "abort" and self._clock.now() > 5:
            return []
        return super().poll()

    def update_weights(self, weights: Weights, version: int, mode: UpdateMode = "drain") -> None:
        if self.deaf_to != "weights":
            super().update_weights(weights, version, mode)


class DeafToAborts(Deaf):
    deaf_to = "abort"


class DeafToWeights(Deaf):
    deaf_to = "weights"


def test_a_source_that_is_always_about_to_report_does_not_hold_the_run_for_ever() -> None:
    driver = make_driver(sync(), engine=Deaf, limits=LIMITS)
    with pytest.raises(StallError, match="nothing has happened for 50 s") as caught:
        driver.next_batch()
    told = str(caught.value.got)
    assert 50 <= driver.clock.now() <= 53
    assert "generate: 4 in engine, for 5" in told and all(f"g{g}/e0/p" in told for g in (0, 1))


def test_without_limits_it_does() -> None:
    """Negative control: the limit is what ends the wait."""
    driver = make_driver(sync(), engine=Deaf)
    driver.should_stop = lambda: driver.clock.now() > 500
    with pytest.raises(Exception, match="asked to stop"):
        driver.next_batch()
    assert driver.clock.now() > 500


def test_a_long_update_in_another_process_is_not_a_standstill() -> None:
    class Training(FakeRewards):
        name = "trainer"

        def ready_at(self) -> float | None:
            return self.clock.now() + 1.0 if self.clock.now() < 200 else None

        def waits(self) -> list[Wait]:
            return [Wait("trainer (process 7)", "train", ("update 0",), 0.0, 300.0)]

    driver = make_driver(sync(), engine=Deaf, limits=LIMITS)
    driver.sources = (*driver.sources, Training(driver.clock))  # type: ignore[arg-type]
    driver.should_stop = lambda: driver.clock.now() > 190
    with pytest.raises(Exception, match="asked to stop"):
        driver.next_batch()
    assert driver.clock.now() > 190


def test_a_report_names_who_has_which_samples_for_how_long() -> None:
    driver = make_driver(
        sync(),
        lambda sample: reply_of(3 if sample.id.serial else 10),
        groups_per_step=3,
        group_size=5,
        delay_s=lambda _s: float("inf"),
    )
    with pytest.raises(StallError, match="nothing is pending") as caught:
        driver.next_batch()
    told = str(caught.value.got)
    assert "0 running, 0 of 3 groups ready, 3 open" in told
    assert "score: 15 in rewards, for 7.0 s" in told and f"and {15 - MAX_IDS} more" in told


def test_a_report_shows_owners_and_deadlines_of_other_processes() -> None:
    class Rewards(FakeRewards):
        def waits(self) -> list[Wait]:
            ids = tuple(str(sample.id) for _, sample in self.queue)
            return [Wait("worker 7", "score", ids, 1.0, 100.0)]

    driver = make_driver(sync(), lambda _sample: reply_of(4), delay_s=lambda _s: float("inf"))
    driver.rewards = Rewards(driver.clock, delay_s=lambda _s: float("inf"))  # type: ignore[arg-type]
    driver.sources = (driver.engine, driver.rewards)
    with pytest.raises(StallError) as caught:
        driver.next_batch()
    assert "score: 4 in worker 7, for 3.0 s, given up in 96.0 s: g0/e0/p" in str(caught.value.got)


def test_samples_that_are_not_let_go_end_the_run_within_the_limit() -> None:
    driver = make_driver(sync(), lambda _sample: reply_of(60), engine=DeafToAborts, limits=LIMITS)
    with pytest.raises(StallError):
        driver.next_batch()
    start_s = driver.clock.now()
    with pytest.raises(EngineError, match="did not let go of 4 samples that were stopped in time") as caught:
        driver.park_all()
    assert 30 <= driver.clock.now() - start_s <= 33 and "generate: 4 in engine" in str(caught.value.got)


def test_weights_that_are_not_served_end_the_run_within_the_limit() -> None:
    driver = make_driver(sync(), engine=DeafToWeights, limits=LIMITS)
    driver.next_batch()
    driver.pool.trained()
    start_s = driver.clock.now()
    with pytest.raises(EngineError, match="did not serve version 1 in time"):
        driver.publish({}, 1, "drain")
    assert 20 <= driver.clock.now() - start_s <= 23


class Restartable(DeafToWeights):
    """Takes the weights once it is started again."""

    restarts: tuple[str, ...] = ()

    def update_weights(self, weights: Weights, version: int, mode: UpdateMode = "drain") -> None:
        self.wanted = version

    def restart(self, reason: str) -> None:
        self.restarts += (reason,)
        ScriptedEngine.update_weights(self, {}, self.wanted)


@pytest.mark.parametrize("policy", ["retry", "fail"])
def test_an_engine_that_can_be_restarted_is_when_the_recipe_says_so(policy: Any) -> None:
    limits = LIMITS.model_copy(update={"on_late_publish": policy})
    driver = make_driver(sync(), engine=Restartable, limits=limits, steps=1)
    driver.next_batch()
    driver.pool.trained()
    engine: Any = driver.engine
    if policy == "fail":
        with pytest.raises(EngineError, match="did not serve version 1"):
            driver.publish({}, 1, "drain")
        assert engine.restarts == ()
    else:
        driver.publish({}, 1, "drain")
        assert driver.version == 1 and engine.restarts == ("was killed: it did not serve version 1",)


def test_patience_counts_from_the_last_change() -> None:
    clock, mark = VirtualClock(), [0]
    patience = Patience(clock, 10.0)
    assert not patience.ended(lambda: mark[0])
    for time_s, changed, ended in (
        (10, False, False),
        (10.5, False, True),
        (15, False, False),
        (21, True, False),
        (30, False, False),
        (32, False, True),
    ):
        clock.wait_until(time_s)
        mark[0] += changed
        assert patience.ended(lambda: mark[0]) is ended, time_s
    clock.wait_until(1000.0)
    assert not Patience(clock, None).ended(lambda: 0)


class Pending:
    """A source that may have something at a time, or can be read."""

    name = "pending"

    def __init__(self, ready_s: float | None, readable: bool) -> None:
        self.ready_s, self.waited = ready_s, object() if readable else None

    def ready_at(self) -> float | None:
        return self.ready_s

    def poll(self) -> list[Event]:
        return []

    def pending(self) -> list[str]:
        return []

    def waitables(self) -> list[object]:
        return [] if self.waited is None else [self.waited]


class Recording(VirtualClock):
    calls: tuple[tuple[float, int], ...] = ()

    def wait_until(self, time_s: float, waitables: Sequence[Any] = ()) -> None:
        self.calls += ((time_s, len(waitables)),)


def test_the_nearest_deadline_and_all_connections_are_waited_for() -> None:
    clock = Recording()
    assert not wait_for_next(clock, [Pending(None, True)]), "a connection without anything pending is not waited for"
    assert wait_for_next(clock, [Pending(7.0, False), Pending(None, False)])
    assert wait_for_next(clock, [Pending(7.0, True), Pending(0.25, True)])
    assert wait_for_next(clock, [Pending(7.0, True), Pending(None, True)])
    assert wait_for_next(clock, [Pending(0.0, False), Pending(7.0, True)])
    assert clock.calls == ((7.0, 0), (0.25, 2), (0.5, 2)), "it looks up twice a second, and does not wait for what is there"


# -- what becomes of what a stage has failed ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "losses", "again"),
    [({}, 2, True), ({}, 3, False), ({"on_engine_loss": "retry"}, 0, True), ({"on_engine_loss": "drop"}, 0, False)],
)
def test_losses_of_the_engine(fields: dict[str, Any], losses: int, again: bool) -> None:
    policy = LossPolicy(LimitsConfig(**fields), max_losses=3)
    assert policy.generate_again(Broken(0.0, ONE, "gone"), losses) is again


def test_a_loss_can_end_the_run() -> None:
    policy = LossPolicy(LimitsConfig(on_engine_loss="fail"), max_losses=3)
    with pytest.raises(RolloutError, match="a sample lost its engine") as caught:
        policy.generate_again(Broken(0.0, ONE, "gone"), 0)
    assert (str(caught.value.where), caught.value.got) == ("g0/e0/p0/m0, limits.on_engine_loss", "gone")


def test_failures_of_the_reward() -> None:
    failed, judged = Judged(0.0, ONE, Failure("no network")), Judged(0.0, ONE, Reward(1.0))
    assert not LossPolicy(None, 3).judge_again(failed)
    retry = LossPolicy(LimitsConfig(on_reward_failure="retry", reward_retries=2), 3)
    assert [retry.judge_again(event) for event in (judged, failed, failed, failed, failed, judged)] == [
        False, True, True, False, True, False,
    ]  # fmt: skip
    with pytest.raises(RolloutError, match="got no reward"):
        LossPolicy(LimitsConfig(on_reward_failure="fail"), 3).judge_again(failed)


@pytest.mark.parametrize(("policy", "failed"), [("retry", 0), ("drop", 1)])
def test_a_reward_that_fails_once_is_asked_again_where_the_recipe_says_so(policy: Any, failed: int) -> None:
    seen: set[SampleId] = set()

    def once(sample: Sample) -> Reward | Failure:
        if sample.id.serial == 0 and sample.id.member == 0 and sample.id not in seen:
            seen.add(sample.id)
            return Failure("no network")
        return Reward(1.0, True)

    limits = LIMITS.model_copy(update={"on_reward_failure": policy})
    driver = make_driver(sync(), outcome=once, limits=limits, group_size=3)
    batch = driver.next_batch()
    assert driver.pool.ledger.counts["failed"] == failed  # type: ignore[index]
    assert sum(isinstance(outcome, Failure) for group in batch.groups for outcome in group.outcomes) == failed


@pytest.mark.parametrize(("policy", "counted"), [("redispatch", {"failed": 0}), ("drop", {"failed": 4})])
def test_samples_that_lose_their_engine_in_a_run(policy: Any, counted: dict[str, int]) -> None:
    def replies(sample: Sample) -> Reply:
        return reply_of(8, breaks_at=5 if sample.id.serial == 0 else None)

    limits = LIMITS.model_copy(update={"on_engine_loss": policy})
    driver = make_driver(AprilSchedule(AprilConfig(over_provision=1.5, max_lag_steps=2)), replies, limits=limits, group_size=4)
    driver.next_batch()
    assert {name: driver.pool.ledger.counts[name] for name in counted} == counted  # type: ignore[index]
    assert driver.pool.ledger.balanced
