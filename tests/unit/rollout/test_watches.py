"""Watches under schedules: budgets that are frozen with samples, and samples that end early."""

from __future__ import annotations

from typing import Any

import pytest
from rollout_helpers import audit, long_tailed, make_driver, make_prompts, make_segment, reply_of, run_steps

from april import registry
from april.checkpoint.codec import decode_frames, encode
from april.config.resolve import resolve
from april.core.errors import LedgerError, RecipeError
from april.core.group import Reward
from april.core.sample import Sample
from april.rollout.driver import Driver
from april.rollout.group_state import GroupState
from april.rollout.pool import Pool
from april.rollout.snapshot import load_pool_state, pool_state, replay
from april.rollout.watch import Verdict, Watch
from april.rollout.watches.early_cut import EarlyCut, EarlyCutConfig
from april.run.build import driver_options

SCHEDULES: list[dict[str, Any]] = [
    {"type": "sync"},
    {"type": "april", "max_lag_steps": 2},
    {"type": "bounded_async", "max_lag_steps": 1},
    {"type": "truncated", "window_tokens": 9, "max_lag_steps": 2},
    {"type": "token_budget", "tokens_per_step": 90, "max_running": 8},
    {"type": "tail_batching"},
    {"type": "longest_first", "max_running": 5},
    {"type": "replicated", "redundant_samples": 1},
]


def watch(type_: str, **fields: Any) -> Watch:
    return registry.builder("watch", type_)(registry.parse("watch", {"type": type_, **fields}, "watch"))  # type: ignore[no-any-return]


def driver_with(fields: dict[str, Any], watches: list[Watch], **more: Any) -> Driver:
    config = registry.parse("schedule", fields, "schedule")
    made = registry.builder("schedule", fields["type"])(config)
    return make_driver(made, **{"watches": watches, "report_every_tokens": 4, "steps": 4, **more})


@pytest.mark.parametrize("fields", SCHEDULES, ids=lambda fields: fields["type"])
def test_budgets_by_subgroup_hold_to_the_token_under_every_schedule(fields: dict[str, Any]) -> None:
    budgets = watch("length_budgets", budgets=[6, 12])
    driver = driver_with(fields, [budgets], replies=lambda _s: reply_of(40), group_size=4)
    samples = [sample for batch in run_steps(driver) for g in batch.groups for sample, _ in g.rewarded]
    size = 5 if fields.get("redundant_samples") else 4
    assert samples
    for sample in samples:
        budget = 6 if sample.id.member * 2 // size == 0 else 12
        assert (len(sample), sample.stop, sample.spec.max_new_tokens) == (budget, "length", budget)


@pytest.mark.parametrize("how", ["stop", "cut"])
@pytest.mark.parametrize("fields", SCHEDULES, ids=lambda fields: fields["type"])
def test_what_runs_far_beyond_the_correct_ones_is_ended_under_every_schedule(fields: dict[str, Any], how: str) -> None:
    """Two members answer correctly with 5 tokens; the third would run to 60 and is ended soon after 2 x 5."""
    early = watch("early_cut", min_tokens=4, exempt_fraction=0, how=how)
    lengths = {0: 5, 1: 5, 2: 60, 3: 60}
    driver = driver_with(
        fields,
        [early],
        replies=lambda s: reply_of(lengths[s.id.member]),
        group_size=3,
        outcome=lambda s: Reward(1.0, correct=len(s) == 5),
    )
    groups = [group for batch in run_steps(driver) for group in batch.groups]
    thirds = [group.samples[2] for group in groups]
    assert max(len(sample) for sample in thirds) < 30
    ended = driver.pool.ledger.reasons
    if how == "stop" and fields["type"] != "replicated":
        assert {sample.stop for sample in thirds} == {"length"} and all(len(g.rewarded) == 3 for g in groups)
    elif how == "cut":
        assert ended["failed: beyond 2 times the expected length"] >= len(groups)
    audit(driver.pool)


def test_exempt_samples_run_on() -> None:
    """Negative control: with everything exempt nothing is ended."""
    early = watch("early_cut", min_tokens=4, exempt_fraction=1)
    driver = driver_with({"type": "sync"}, [early], replies=lambda s: reply_of(60 if s.id.member == 2 else 5), group_size=3)
    groups = [group for batch in run_steps(driver) for group in batch.groups]
    assert {len(group.samples[2]) for group in groups} == {60}


def test_the_share_of_exempt_samples_is_what_was_asked_for() -> None:
    early, prompt = EarlyCut(EarlyCutConfig(exempt_fraction=0.25)), make_prompts(1)[0]
    pool = Pool()
    spec = make_driver(registry.builder("schedule", "sync")(None)).spec
    groups = [pool.issue(epoch, prompt, spec, 4) for epoch in range(500)]
    share = sum(early.is_exempt(pool[group.member(m)]) for group in groups for m in range(4)) / 2000
    assert 0.2 < share < 0.3


def test_the_forecast_is_the_longest_correct_sibling_or_the_item_says() -> None:
    prompt = make_prompts(1)[0]
    spec = make_driver(registry.builder("schedule", "sync")(None)).spec
    pool = Pool()
    group = pool.issue(0, prompt, spec, 4)
    state: GroupState = pool.groups[group]
    early = EarlyCut(EarlyCutConfig(min_correct=2, min_tokens=1, exempt_fraction=0))
    pool.start([group.member(m) for m in range(4)], 0)
    for member, (tokens, correct) in enumerate([(7, True), (30, False), (9, True)]):
        pool.finish(group.member(member), make_segment(tokens), "eos")
        pool.judge(group.member(member), Reward(float(correct), correct))
        assert early.expected_tokens(prompt, state) == (9.0 if member == 2 else None)
    pool.progress(group.member(3), make_segment(18))
    assert early.look(pool[group.member(3)], state) is None
    pool.progress(group.member(3), make_segment(1, first=18))
    assert early.look(pool[group.member(3)], state) == Verdict("stop", "beyond 2 times the expected length")
    told = EarlyCut(EarlyCutConfig(item_key="predicted"))
    assert told.expected_tokens(prompt, state) is None
    known = type(prompt)("p", prompt.token_ids, "", {"predicted": 12})
    assert told.expected_tokens(known, state) == 12.0


def test_stopping_what_holds_nothing_is_refused() -> None:
    pool = Pool()
    group = pool.issue(0, make_prompts(1)[0], make_driver(registry.builder("schedule", "sync")(None)).spec, 1)
    with pytest.raises(LedgerError, match="holds nothing"):
        pool.stop(group.member(0))
    assert pool.ledger.balanced


@pytest.mark.parametrize("fields", SCHEDULES, ids=lambda fields: fields["type"])
def test_the_journal_of_a_watched_run_rebuilds_the_pool(fields: dict[str, Any]) -> None:
    watches = [watch("early_cut", min_tokens=4, min_correct=1), watch("length_budgets", budgets=[30, 60])]
    driver = driver_with(
        fields, watches, replies=long_tailed(4, 12, 64), group_size=3, outcome=lambda s: Reward(1.0, s.id.member < 2)
    )
    records: list[bytes] = []
    driver.pool.listener = lambda name, arguments: records.append(encode((name, arguments))) if name != "cursor" else None
    for _ in range(3):
        driver.next_batch()
        driver.pool.trained()
        driver.publish({}, driver.emitted_steps, "drain")
    prompts = {prompt.id: prompt for prompt in make_prompts(40)}
    copy = Pool()
    for name, arguments in decode_frames(b"".join(records), "journal", prompts):
        replay(copy, name, arguments)
    assert encode(pool_state(copy)) == encode(pool_state(driver.pool))
    audit(copy)
    again = Pool()
    load_pool_state(again, decode_frames(encode(pool_state(copy)), "snapshot", prompts)[0])
    assert encode(pool_state(again)) == encode(pool_state(copy))
    assert again.longest_groups() == copy.longest_groups() and again.ages() == copy.ages()


def test_a_recipe_names_its_watches() -> None:
    recipe = resolve("quickstart", overrides=["watch.early_cut.min_tokens=64", "watch.length_budgets.budgets=[8, 16]"]).recipe
    watches = driver_options(recipe)["watches"]
    assert [type(one).__name__ for one in watches] == ["EarlyCut", "LengthBudgets"]
    assert driver_options(resolve("quickstart").recipe)["watches"] == []
    with pytest.raises(RecipeError, match="unknown watch"):
        resolve("quickstart", overrides=["watch.early_stop.min_tokens=64"])


def test_samples_share_the_spec_where_no_watch_speaks() -> None:
    driver = driver_with({"type": "sync"}, [])
    samples: list[Sample] = [s for b in run_steps(driver) for g in b.groups for s in g.samples]
    assert {sample.spec for sample in samples} == {driver.spec}
