"""Conservation under any plan: a schedule that does whatever is allowed, over an engine that breaks and rewards that fail."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_helpers import PromptSampler, audit, finish_step, long_tailed, make_driver, make_prompts, reply_of

from april.checkpoint.codec import decode_frames, encode
from april.core.group import Failure, Group, Reward
from april.core.random import stream_key
from april.core.sample import Sample
from april.engines.scripted import Reply
from april.rollout.driver import Driver
from april.rollout.pool import Pool
from april.rollout.snapshot import pool_state, replay
from april.rollout.view import Memo, Plan, View


class RandomSchedule:
    """A few random plans in each turn; when nothing is under way, whatever brings the step forward."""

    max_lag_steps = 1_000

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.left = 3

    def plan(self, view: View, memo: Memo) -> tuple[Plan, Memo]:
        if view.updating or self.left == 0:
            self.left = int(self.random.integers(1, 4))
            return (Plan() if view.updating else self.needed(view)), memo
        self.left -= 1
        plan = self.anything(view)
        if not plan:
            self.left = 0
            return self.plan(view, memo)
        return plan, memo

    def anything(self, view: View) -> Plan:
        kind = self.random.integers(6)
        if kind == 0:
            return Plan(issue=min(2, view.issuable))
        if kind == 1 and view.running_samples():
            return Plan(park=self.some(view.running_samples()))
        if kind == 2 and view.num_ready_groups >= view.groups_per_step:
            return Plan(emit=self.some(view.ready_groups(), view.groups_per_step))
        idle = [group for group in view.waiting_groups() if not view.is_active(group)]
        if kind == 3 and idle and self.random.random() < 0.2:
            return Plan(evict=((idle[0], "on a whim"),))
        waiting = [sample for group in view.waiting_groups() for sample in view.waiting_samples(group)]
        return Plan(start=self.some(waiting)) if waiting else Plan()

    def needed(self, view: View) -> Plan:
        if view.num_running or view.num_active_groups:
            return Plan()
        if view.num_ready_groups >= view.groups_per_step:
            return Plan(emit=view.ready_groups(view.groups_per_step))
        waiting = tuple(sample for group in view.waiting_groups() for sample in view.waiting_samples(group))
        return Plan(start=waiting) if waiting else Plan(issue=min(2, view.issuable))

    def some(self, items, count: int | None = None):  # type: ignore[no-untyped-def]
        size = count or int(self.random.integers(1, len(items) + 1))
        return tuple(items[index] for index in self.random.choice(len(items), size, replace=False))


def make(seed: int, steps: int) -> Driver:
    lengths = long_tailed(seed, 10, 64)

    def chance(one_in: int, *address: object) -> bool:
        return stream_key(seed, *address) % one_in == 0

    def replies(sample: Sample) -> Reply:
        length = len(lengths(sample).token_ids)
        return reply_of(length, length // 2 if chance(5, "break", sample.id) else None)

    def keep(group: Group) -> str | None:
        return "unlucky" if chance(4, "filter", group.id) else None

    return make_driver(
        RandomSchedule(seed),
        replies,
        audited=False,
        num_prompts=12,
        groups_per_step=2,
        group_size=3,
        steps=steps,
        outcome=lambda s: Failure("no answer") if chance(6, "judge", s.id) else Reward(float(s.id.member)),
        delay_s=lambda s: float(stream_key(seed, "delay", s.id) % 9),
        group_filters=[keep],
        max_retries=1,
        max_running=1 + seed % 7,
        report_every_tokens=1 + seed % 11,
    )


@settings(max_examples=15)
@given(seed=st.integers(0, 100_000))
def test_nothing_is_lost_or_trained_twice_under_any_plan(seed: int) -> None:
    """Invariants 1 to 6, 8, 17 and 30: audited at each transition; the journal of the whole run rebuilds the pool."""
    driver = make(seed, steps=4)
    records: list[bytes] = []

    def listen(name: str, arguments: dict[str, object]) -> None:
        if name != "cursor":
            records.append(encode((name, arguments)))
        driver.pool.ledger.check()

    driver.pool.listener = listen
    trained: list[object] = []
    for _ in range(4):
        batch = driver.next_batch()
        audit(driver.pool)
        for group in batch.groups:
            assert len(group.samples) == 3
            assert len({sample.spec for sample in group.samples}) == 1
            trained += [sample.id for sample, _ in group.rewarded]
            for sample, _ in group.rewarded:
                assert sample.token_ids.tolist() == list(range(len(sample)))
        finish_step(driver)
        audit(driver.pool)
    ledger = driver.pool.ledger.to_dict()
    assert len(trained) == len(set(trained)) == ledger["counts"]["trained"]
    assert driver.rewards.seen.most_common(1)[0][1] == 1  # type: ignore[attr-defined]
    prompts = {prompt.id: prompt for prompt in make_prompts(12)}
    copy = Pool()
    for name, arguments in decode_frames(b"".join(records), "journal", prompts):
        replay(copy, name, arguments)
    assert encode(pool_state(copy)) == encode(pool_state(driver.pool))
    assert copy.ledger.to_dict() == ledger
    assert isinstance(driver.prompts, PromptSampler)
