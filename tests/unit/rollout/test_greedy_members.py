"""Greedy members: issued with their group, never spare, never seen by filters, kept by journal and checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from rollout_helpers import audit, long_tailed, make_driver, make_prompts, reply_of, run_steps

from april import registry
from april.checkpoint.codec import decode_frames, encode
from april.core.errors import RolloutError
from april.core.group import Failure, Group, Outcome, Reward
from april.core.sample import Sample
from april.core.sampling import AdaptiveTemperature, SamplingSpec
from april.rollout.driver import Driver
from april.rollout.measure import describe_batch
from april.rollout.pool import Pool
from april.rollout.snapshot import REPLAYED, load_pool_state, pool_state, replay
from april.rollout.temperature import TemperatureRule
from april.rollout.watches.early_cut import EarlyCut, EarlyCutConfig
from april.run.telemetry import lengths_of


def driver_of(fields: dict[str, Any], **more: Any) -> Driver:
    schedule = registry.builder("schedule", fields["type"])(registry.parse("schedule", fields, "schedule"))
    return make_driver(schedule, **{"greedy_members": 1, "group_size": 3, "steps": 4, **more})


def half_right(sample: Sample) -> Outcome:
    """Greedy answers earn 5, sampled ones their member's number."""
    return Reward(5.0, True) if sample.spec.greedy else Reward(float(sample.id.member), False)


def test_the_last_member_is_greedy_and_everything_else_is_about_the_others() -> None:
    seen: list[Group] = []
    driver = driver_of({"type": "sync"}, outcome=half_right, group_filters=[lambda group: seen.append(group)])
    (first, *_), counts = run_steps(driver), driver.pool.ledger.counts
    assert [[sample.spec.temperature for sample in group.samples] for group in first.groups] == [[1.0, 1.0, 1.0, 0.0]] * 2
    assert {len(group.samples) for group in seen} == {3}
    row = describe_batch(first)
    assert (row["num_samples"], row["reward_mean"], row["accuracy"]) == (6, 1.0, 0.0)
    assert len(lengths_of(0, first.groups[0])["tokens"]) == 3
    assert driver.pool.ledger.issued == sum(counts.values()) == 4 * 2 * 4


def test_an_adaptive_temperature_leaves_the_greedy_member_greedy() -> None:
    spec = SamplingSpec(64, entropy=True, adaptive=AdaptiveTemperature(0.5, 0.0, 1.0, 1.0))
    batch = driver_of({"type": "sync"}, spec=spec).next_batch()
    assert [sample.spec.greedy for sample in batch.groups[0].samples] == [False, False, False, True]


def test_temperatures_follow_the_sampled_members() -> None:
    sizes: list[int] = []

    class Rule(TemperatureRule):
        def measured(self, groups: Iterable[Group]) -> None:
            sizes.extend(len(group.samples) for group in groups)

    run_steps(driver_of({"type": "sync"}, temperatures=Rule()), 1)
    assert sizes == [3, 3]


def test_a_group_without_its_baseline_is_dropped_as_failed() -> None:
    def outcome(sample: Sample) -> Outcome:
        return Failure("no answer") if sample.spec.greedy and sample.id.serial % 2 == 0 else Reward(1.0, True)

    driver = driver_of({"type": "sync"}, outcome=outcome)
    batches = run_steps(driver)
    assert {group.id.serial % 2 for batch in batches for group in batch.groups} == {1}
    assert driver.pool.ledger.reasons["failed: a greedy member without a reward"] > 0 and driver.pool.ledger.balanced
    few = driver_of({"type": "sync"}, min_rewarded=2, outcome=lambda s: Reward(1.0) if s.id.member in (0, 3) else Failure("x"))
    with pytest.raises(RolloutError, match="no group can be trained"):
        few.next_batch()


def test_neither_the_race_of_spare_members_nor_a_watch_ends_a_greedy_member() -> None:
    def replies(sample: Sample) -> Any:
        return reply_of(60 if sample.spec.greedy else 4 + 9 * sample.id.member)

    watch = EarlyCut(EarlyCutConfig(factor=1.1, min_tokens=5, min_correct=1, exempt_fraction=0.0, how="cut"))
    for more in ({"watches": [watch]}, {}):
        driver = driver_of({"type": "replicated", "redundant_samples": 2}, replies=replies, report_every_tokens=2, **more)
        groups = [group for batch in run_steps(driver) for group in batch.groups]
        assert all(isinstance(group.outcomes[5], Reward) and len(group.samples[5]) == 60 for group in groups)
        assert all(isinstance(group.outcomes[4], Failure) for group in groups), "the others are cut"


def test_a_spare_greedy_outcome_decides_nothing() -> None:
    pool = Pool()
    group = pool.issue(0, make_prompts(1)[0], SamplingSpec(8), 4, wanted=2, greedy=1)
    ids = [group.member(member) for member in range(4)]
    pool.start(ids, 0)
    for member in (3, 0):
        pool.finish(ids[member], None, "eos")
    assert pool.decided_samples() == ()
    pool.finish(ids[1], None, "eos")
    assert pool.decided_samples() == (ids[2],)


def test_journal_and_checkpoint_keep_them() -> None:
    records: list[bytes] = []
    driver = driver_of(
        {"type": "april", "max_lag_steps": 2, "over_provision": 2.0}, replies=long_tailed(6, 12, 60), report_every_tokens=3
    )

    def listen(name: str, arguments: dict[str, Any]) -> None:
        if name in REPLAYED:
            records.append(encode((name, arguments)))

    driver.pool.listener = listen
    run_steps(driver, 3)
    prompts = {prompt.id: prompt for prompt in make_prompts(60)}
    pool = Pool()
    for name, arguments in decode_frames(b"".join(records), "journal", prompts):
        replay(pool, name, arguments)
    audit(pool)
    load_pool_state(loaded := Pool(), pool_state(driver.pool))
    assert driver.pool.groups, "work is in flight"
    for copy in (pool, loaded):
        assert copy.ledger.to_dict() == driver.pool.ledger.to_dict()
        for id, state in driver.pool.groups.items():
            assert copy.groups[id].num_sampled == state.num_sampled == 3
            assert [s.spec for s in copy.groups[id].samples.values()] == [s.spec for s in state.samples.values()]
            assert copy.groups[id].samples[3].spec.greedy
