"""KV that outlives its row: parked samples, prompts of groups, finished parents. Losing it changes time, never tokens."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from april.core.clock import VirtualClock
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import UpdateMode
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.engines.embedded.retain import Kept, KeptKv
from april.testing.engine_run import EngineRun, cut, same_tokens
from april.testing.toy_model import CharTokenizer, toy_model


@lru_cache
def _module(seed: int = 0) -> Any:
    return toy_model("qwen3", dtype=torch.float64, seed=seed)


def _run(**options: Any) -> EngineRun:
    config = EmbeddedConfig(**({"max_running": 8, "kv_tokens": 4096, "steps_per_poll": 4} | options))
    return EngineRun(EmbeddedEngine(_module(), tokenizer=CharTokenizer(), clock=VirtualClock(), config=config))


def _samples(num_groups: int, size: int, **spec: Any) -> list[Sample]:
    prompts = [Prompt(f"p{serial}", np.arange(2, 8) + serial) for serial in range(num_groups)]
    options = {"max_new_tokens": 40} | spec
    return [
        Sample(GroupId(serial, 0, prompt.id).member(member), prompt, SamplingSpec(**options))
        for serial, prompt in enumerate(prompts)
        for member in range(size)
    ]


def _finish(run: EngineRun, samples: Sequence[Sample]) -> list[Sample]:
    run.submit(samples)
    run.drain()
    return run.results(samples)


def _park(run: EngineRun, samples: Sequence[Sample], num_tokens: int) -> list[Sample]:
    run.submit(samples)
    run.until_tokens(num_tokens)
    run.engine.abort()
    run.drain()
    return run.results(samples)


def _costs(run: EngineRun, work: Any) -> tuple[int, int]:
    before = run.engine.load()
    work()
    after = run.engine.load()
    return after.prefill_tokens - before.prefill_tokens, after.shared_tokens - before.shared_tokens


def _kept(run: EngineRun) -> KeptKv:
    kept: KeptKv = run.engine._running.kept  # type: ignore[attr-defined]
    return kept


@pytest.mark.parametrize("retain", [True, False])
def test_a_resumed_sample_costs_no_prefill_where_its_kv_is_kept(retain: bool) -> None:
    run, samples = _run(retain_parked=retain, share_prefix=False), _samples(2, 2)
    parked = _park(run, samples, 40)
    length = sum(6 + len(sample) - 1 for sample in parked)
    computed, shared = _costs(run, lambda: _finish(run, parked))
    assert (computed, shared) == ((0, length) if retain else (length, 0))
    assert len(_kept(run)) == 0
    same_tokens(run.results(samples), _finish(_run(), samples), 1e-7)


def test_a_sample_that_comes_back_shorter_uses_the_kv_it_has_left() -> None:
    run, samples = _run(share_prefix=False), _samples(1, 1)
    parked = _park(run, samples, 20)
    assert _costs(run, lambda: _finish(run, [cut(parked[0], 9)])) == (0, 6 + 9 - 1)
    same_tokens(run.results(samples), _finish(_run(), samples), 1e-7)


def test_kv_of_other_tokens_is_not_used() -> None:
    run, samples = _run(share_prefix=False), _samples(1, 1, seed=0)
    parked = _park(run, samples, 20)
    other = _finish(_run(), _samples(1, 1, seed=1))[0]
    assert other.token_ids[:20].tolist() != parked[0].token_ids[:20].tolist()
    assert _costs(run, lambda: _finish(run, [cut(other, 20)])) == (25, 0)
    same_tokens(run.results([other]), [other], 1e-7)


@pytest.mark.parametrize(("mode", "cost"), [("recompute", False), ("drain", False), ("keep_kv", True)])
def test_an_update_decides_whether_parked_kv_is_good(mode: UpdateMode, cost: bool) -> None:
    run, samples = _run(share_prefix=False), _samples(1, 2)
    parked = _park(run, samples, 20)
    run.engine.update_weights(dict(_module(1).named_parameters()), 1, mode)
    length = sum(6 + len(sample) - 1 for sample in parked)
    assert _costs(run, lambda: _finish(run, parked)) == ((0, length) if cost else (length, 0))
    found = {span.sampler for sample in run.results(samples) for span in sample.spans if span.version == 1}
    assert found == ({"embedded-float64+mixed-kv"} if cost else {"embedded-float64"})


def test_old_kv_serves_its_own_sample_only() -> None:
    run, samples = _run(), _samples(1, 3)
    _park(run, samples[:1], 20)
    run.engine.update_weights(dict(_module(1).named_parameters()), 1, "keep_kv")
    assert _costs(run, lambda: _finish(run, samples[1:])) == (5, 5)
    clean = EngineRun(EmbeddedEngine(_module(1), clock=VirtualClock()))
    same_tokens(run.results(samples[1:]), _finish(clean, samples[1:]), 1e-7)


def test_a_prompt_costs_one_prefill_whenever_its_members_come() -> None:
    run, samples = _run(max_running=2), _samples(2, 4)
    for member in range(4):
        _finish(run, samples[member::4])
    load = run.engine.load()
    assert (load.prefill_tokens, load.shared_tokens) == (2 * 5, 2 * 3 * 5)
    run.engine.update_weights(dict(_module().named_parameters()), 1, "recompute")
    assert len(_kept(run)) == 0
    same_tokens(run.results(samples), _finish(_run(), samples), 1e-7)


@pytest.mark.parametrize("retain", [True, False])
def test_a_child_copies_the_kv_of_its_finished_parent(retain: bool) -> None:
    run, parents = _run(retain_finished=retain), _samples(1, 1)
    whole = _finish(run, parents)[0]
    child = cut(whole, 39).forked(12, "0")
    assert _costs(run, lambda: _finish(run, [child])) == ((0, 6 + 12 - 1) if retain else (6 + 12 - 1, 0))
    same_tokens(run.results([child]), _finish(_run(), [child]), 1e-7)


def test_a_child_copies_the_kv_of_its_parked_parent() -> None:
    run, samples = _run(), _samples(1, 1)
    parked = _park(run, samples, 20)[0]
    assert _costs(run, lambda: _finish(run, [parked.forked(12, "0")])) == (0, 17)
    assert _costs(run, lambda: _finish(run, [parked])) == (0, 6 + len(parked) - 1)


@pytest.mark.parametrize("kv_tokens", [150, 260, 400])
def test_kept_kv_stays_within_the_memory_and_gives_way(kv_tokens: int) -> None:
    run, samples = _run(kv_tokens=kv_tokens, retain_finished=True), _samples(4, 2, max_new_tokens=90)
    memory, most = run.engine._running._memory, 0  # type: ignore[attr-defined]
    run.submit(samples)
    while run.open:
        run.poll()
        if run.engine.load().generated_tokens % 5 == 0:
            run.engine.abort([sample.id for sample in samples[::3]])
        run.poll()
        again = [run.samples[end.id] for end in run.ends if end.id not in run.open and run.samples[end.id].stop is None]
        run.submit(again)
        run.ends = [end for end in run.ends if end.id not in {sample.id for sample in again}]
        most = max(most, memory.kept.num_tokens)
        assert memory.allocated_tokens + memory.kept.num_tokens <= kv_tokens
    assert most > 0
    same_tokens(run.results(samples), _finish(_run(), samples), 1e-7)


def test_the_oldest_are_dropped_first_and_a_use_makes_young() -> None:
    def kept(size: int) -> Kept:
        return Kept(np.arange(size, dtype=np.int32), torch.zeros(1, 2, 1, size, 1))

    store, group = KeptKv(), GroupId(0, 0, "p")
    store.add(group, kept(3))
    store.add(group.member(0), kept(10))
    store.add(group.member(1), kept(20))
    assert store.num_tokens == 33 and store.of_relative(group.member(2), np.arange(2, dtype=np.int32)) is not None
    store.shrink(24)
    assert group.member(0) not in store and group in store and store.num_tokens == 23
    assert store.of_relative(group.member(2), np.array([5], np.int32)) is None
    store.age()
    assert group not in store and store.of_relative(group.member(2), np.arange(9, dtype=np.int32)) is None
    own = store.take(group.member(1), np.arange(9, dtype=np.int32))
    assert own is not None and own.mixed and store.num_tokens == 0
    assert store.take(group.member(1), np.arange(9, dtype=np.int32)) is None


def test_kept_kv_is_not_charged_to_the_prefill_of_an_admission() -> None:
    run, samples = _run(prefill_tokens=1, share_prefix=False, steps_per_poll=1), _samples(2, 2)
    parked = _park(run, samples, 60)
    run.submit(parked)
    run.poll()
    assert run.engine.load().running == 4, "all come back in the first step"
    lost = _run(prefill_tokens=1, share_prefix=False, steps_per_poll=1)
    lost.submit(parked)
    lost.poll()
    assert lost.engine.load().running == 1


def test_a_prompt_is_charged_once_for_the_members_of_its_group() -> None:
    run = _run(prefill_tokens=10, steps_per_poll=1)
    run.submit(_samples(3, 2))
    run.poll()
    assert run.engine.load().running == 4, "two prompts of five tokens that need KV"
    run.poll()
    assert run.engine.load().running == 6


def test_savings_of_groups_forks_and_resumed_samples_are_counted_apart() -> None:
    run, samples = _run(), _samples(1, 3)

    def counts() -> tuple[int, int, int, int]:
        load = run.engine.load()
        return load.prefill_tokens, load.shared_tokens, load.forked_tokens, load.resumed_tokens

    parked = _park(run, samples, 60)
    assert counts() == (5, 2 * 5, 0, 0)
    resumed = sum(6 + len(sample) - 1 for sample in parked)
    run.submit(parked)
    run.poll()
    assert counts() == (5, 10 + resumed, 0, resumed)
    run.submit([cut(parked[0], 8).forked(7, "0")])
    run.poll()
    assert counts() == (5, 10 + resumed + 12, 12, resumed)


def test_a_fork_beside_its_parked_parent_shares_what_the_parent_takes() -> None:
    run, samples = _run(), _samples(1, 1)
    (parked,) = _park(run, samples, 20)
    before = run.engine.load()
    run.submit([parked, cut(parked, 8).forked(7, "0")])
    run.poll()
    after = run.engine.load()
    assert after.prefill_tokens == before.prefill_tokens
    assert after.forked_tokens - before.forked_tokens == 6 + 7 - 1
    assert after.resumed_tokens - before.resumed_tokens == 6 + len(parked) - 1
