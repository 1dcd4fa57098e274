"""Transitions that are refused; snapshots that do not add up; what a crash leaves."""

from __future__ import annotations

from typing import Any

import pytest
from rollout_helpers import SPEC, audit, finish_step, groups_by_version, long_tailed, make_driver, make_prompts, make_segment

from april.checkpoint.codec import decode_frames, encode
from april.core.errors import CheckpointError, LedgerError
from april.core.group import Failure, Reward
from april.core.ids import GroupId
from april.rollout.ledger import ALLOWED, ENDS, Ledger
from april.rollout.pool import Pool
from april.rollout.schedules.april import AprilConfig, AprilSchedule
from april.rollout.snapshot import REPLAYED, load_pool_state, park_running, pool_state, replay
from april.rollout.view import Status

PROMPTS = make_prompts(10)


def pool_with(*sizes: int, **more: Any) -> tuple[Pool, list[GroupId]]:
    pool = Pool(**more)
    return pool, [pool.issue(0, prompt, SPEC, size) for prompt, size in zip(PROMPTS, sizes, strict=False)]


def complete(pool: Pool, group: GroupId, size: int) -> None:
    ids = [group.member(member) for member in range(size)]
    pool.start(ids, 0)
    for sample in ids:
        pool.finish(sample, make_segment(3), "eos")
        pool.judge(sample, Reward(1.0))


@pytest.mark.parametrize("before", list(Status))
@pytest.mark.parametrize("after", list(Status))
def test_the_ledger_makes_drawn_moves_only(before: Status, after: Status) -> None:
    """Invariant 1: the table is the drawing of `Status`; ends are final."""
    ledger = Ledger()
    ledger.issued = ledger.counts[before] = 1
    if after in ALLOWED[before]:
        ledger.move(before, after, "why")
        assert (ledger.counts[after], ledger.reasons[f"{after}: why"]) == (1, 1)
    else:
        with pytest.raises(LedgerError, match="impossible move"):
            ledger.move(before, after, where="g0")
        assert ledger.counts[before] == 1
    assert not (before in ENDS and ALLOWED[before])
    ledger.check()


def test_an_unbalanced_ledger_is_noticed() -> None:
    """Invariant 2: zero tolerance, in both directions."""
    ledger = Ledger()
    ledger.issue(3)
    ledger.check()
    for change in (-1, 1):
        ledger.counts[Status.FRESH] += change
        with pytest.raises(LedgerError, match="does not balance"):
            ledger.check()
        ledger.counts[Status.FRESH] -= change
    ledger.counts[Status.FRESH], ledger.counts[Status.RUNNING] = 4, -1
    assert not ledger.balanced


def test_a_group_is_kept_and_emitted_whole_and_once() -> None:
    """Invariants 3 and 6."""
    pool, (group,) = pool_with(2)
    pool.start([group.member(0), group.member(1)], 0)
    pool.finish(group.member(0), make_segment(1), "eos")
    pool.judge(group.member(0), Reward(1.0))
    with pytest.raises(LedgerError, match="before all members had an outcome"):
        pool.keep(group)
    with pytest.raises(LedgerError, match="not ready"):
        pool.emit([group])
    pool.finish(group.member(1), make_segment(1), "eos")
    pool.judge(group.member(1), Reward(0.0))
    pool.keep(group)
    pool.emit([group])
    with pytest.raises(LedgerError, match="not ready"):
        pool.emit([group])
    pool.trained()
    pool.trained()
    assert pool.ledger.counts[Status.TRAINED] == 2
    audit(pool)


def test_a_running_or_scoring_group_cannot_be_dropped() -> None:
    pool, (group,) = pool_with(1)
    sample = group.member(0)
    pool.start([sample], 0)
    with pytest.raises(LedgerError, match="cannot be dropped"):
        pool.drop(group, Status.EVICTED, "old")
    pool.finish(sample, make_segment(1), "eos")
    with pytest.raises(LedgerError, match="cannot be dropped"):
        pool.drop(group, Status.EVICTED, "old")
    pool.judge(sample, Reward(1.0))
    pool.drop(group, Status.EVICTED, "old")
    assert pool.ledger.reasons == {"evicted: old": 1}
    assert not pool.is_open(group.prompt)


def test_a_sample_is_started_once() -> None:
    pool, (group,) = pool_with(1)
    pool.start([group.member(0)], 0)
    with pytest.raises(LedgerError, match="running -> running"):
        pool.start([group.member(0)], 0)
    with pytest.raises(LedgerError, match="not open"):
        pool.start([GroupId(9, 0, "p9").member(0)], 0)
    assert pool.num_running == 1


def test_a_member_that_does_not_exist_is_refused() -> None:
    pool, (group,) = pool_with(1)
    for call in (lambda s: pool.start([s], 0), lambda s: pool.finish(s, None, "eos"), lambda s: pool.judge(s, Reward(1.0))):
        with pytest.raises(LedgerError, match="not open"):
            call(group.member(5))
    assert pool.num_running == 0


def test_a_failed_member_leaves_the_others_and_the_ledger_whole() -> None:
    """Invariant 2: failed before the batch, trained after it."""
    pool, (group,) = pool_with(2)
    pool.fail(group.member(1), "cannot run")
    pool.start([group.member(0)], 0)
    pool.finish(group.member(0), make_segment(2), "eos")
    pool.judge(group.member(0), Reward(1.0))
    pool.keep(group)
    (whole,) = pool.emit([group])
    assert whole.outcomes[1] == Failure("cannot run")
    pool.trained()
    assert (pool.ledger.counts[Status.FAILED], pool.ledger.counts[Status.TRAINED], pool.ledger.balanced) == (1, 1, True)
    assert pool.status == {}


def test_age_begins_at_the_first_start_and_ends_with_an_empty_abort() -> None:
    """Invariant 15: a request that never ran changes no version."""
    pool, (group,) = pool_with(2)
    assert groups_by_version(pool) == {}
    pool.start([group.member(0)], 4)
    assert groups_by_version(pool) == {4: (group,)}
    pool.park(group.member(0), None)
    assert groups_by_version(pool) == {}
    pool.start([group.member(0), group.member(1)], 5)
    pool.park(group.member(0), make_segment(2, version=5))
    pool.park(group.member(1), None)
    pool.start([group.member(1)], 6)
    assert groups_by_version(pool) == {5: (group,)}


def test_a_refused_transition_is_not_in_the_journal() -> None:
    """Else every later resume would meet the refusal again."""
    records: list[str] = []
    pool, (group,) = pool_with(1, listener=lambda name, _arguments: records.append(name))
    for call in (
        lambda: pool.finish(group.member(0), None, "eos"),
        lambda: pool.park(group.member(0), None),
        lambda: pool.judge(group.member(0), Reward(1.0)),
        lambda: pool.keep(group),
        lambda: pool.emit([group]),
        lambda: pool.lose(group.member(0)),
    ):
        with pytest.raises(LedgerError):
            call()
    assert records == ["issue"]


def copied(pool: Pool) -> Pool:
    (saved,) = decode_frames(encode(pool_state(pool)), "pool", {prompt.id: prompt for prompt in make_prompts(60)})
    copy = Pool()
    load_pool_state(copy, saved)
    return copy


def test_a_snapshot_holds_every_kind_of_sample() -> None:
    """Invariant 30: fresh, running, parked with tokens, scoring, ready, failed, and the counters of what has ended."""
    pool, ids = pool_with(2, 2, 2, 1)
    complete(pool, ids[0], 2)
    pool.keep(ids[0])
    pool.start([ids[1].member(0), ids[1].member(1), ids[2].member(0)], 3)
    pool.park(ids[1].member(0), make_segment(4, 3))
    pool.lose(ids[2].member(0))
    pool.start([ids[2].member(0)], 3)
    pool.finish(ids[1].member(1), make_segment(1, 3), "eos")
    pool.fail(ids[2].member(1), "gone")
    copy = copied(pool)
    audit(copy)
    assert encode(pool_state(copy)) == encode(pool_state(pool))
    assert copy.status == pool.status
    assert list(copy.ready) == [ids[0]]
    assert copy.losses(ids[2].member(0)) == 1
    assert copy.next_serial == 4
    assert groups_by_version(copy) == groups_by_version(pool)
    assert park_running(copy) == 1
    audit(copy)


def test_a_snapshot_that_does_not_add_up_is_refused() -> None:
    """Invariant 32."""
    pool, ids = pool_with(2, 1)
    saved = pool_state(pool)
    for damage in ({"groups": saved["groups"][:1]}, {"ledger": {**saved["ledger"], "issued": 9}}):
        with pytest.raises(CheckpointError, match="does not balance"):
            load_pool_state(Pool(), saved | damage)
    load_pool_state(fine := Pool(), saved)
    assert list(fine.groups) == ids


def test_every_transition_of_a_run_is_one_that_replay_knows() -> None:
    names = set()
    driver = make_driver(AprilSchedule(AprilConfig(max_lag_steps=2, over_provision=2.0)), long_tailed(0, 10, 60), steps=8)
    driver.pool.listener = lambda name, _arguments: names.add(name)
    for _ in range(8):
        driver.next_batch()
        finish_step(driver)
    assert {"issue", "start", "park", "finish", "judge", "keep", "emit", "trained"} <= names
    assert names - {"cursor"} <= REPLAYED


def test_a_crash_at_any_record_loses_no_sample_and_no_reported_token() -> None:
    """Invariants 30 and 33: each prefix of the journal gives a balanced pool; what ran waits with what was reported."""
    records: list[bytes] = []
    driver = make_driver(
        AprilSchedule(AprilConfig(max_lag_steps=2, over_provision=2.0)), long_tailed(6, 12, 60), steps=3, report_every_tokens=3
    )

    def listen(name: str, arguments: dict[str, Any]) -> None:
        if name in REPLAYED:
            records.append(encode((name, arguments)))

    driver.pool.listener = listen
    for _ in range(3):
        driver.next_batch()
        finish_step(driver)
    prompts = {prompt.id: prompt for prompt in make_prompts(60)}
    decoded = decode_frames(b"".join(records), "journal", prompts)
    for end in range(0, len(decoded), 7):
        pool, reported, emitted = Pool(), 0, 0
        for name, arguments in decoded[:end]:
            result = replay(pool, name, arguments)
            reported += len(arguments.get("segment") or ())
            emitted += sum(len(s) for group in result for s in group.samples) if name == "emit" else 0
        running = pool.num_running
        assert park_running(pool) == running
        held = sum(len(s) for state in pool.groups.values() for s in state.samples.values())
        assert held + emitted == reported
        audit(pool)
    assert len(decoded) > 60
