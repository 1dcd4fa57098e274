"""Several engines behind one: who gets what, what a version is, and engines that go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from rollout_helpers import make_prompts, reply_of

from april.core.clock import VirtualClock
from april.core.errors import EngineError, ProcessError
from april.core.event import Broken, Event, Finished, Parked, Progressed
from april.core.ids import NO_VERSION, GroupId
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Load
from april.engines.pool import EnginePool
from april.engines.pool_members import _COUNTERS, AFFINITY_SLACK, Member, Totals
from april.engines.scripted import ScriptedEngine
from april.testing.engine_run import EngineRun


class Mortal(ScriptedEngine):
    """An engine that can be hurt: killed for good, away for a while, or deaf to new weights."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.given: list[Sample] = []
        self.gone = self.away = self.deaf = False
        self.restarted: list[str] = []

    def submit(self, samples: Sequence[Sample]) -> None:
        self.given += samples
        super().submit(samples)

    def poll(self) -> list[Event]:
        if self.gone:
            raise ProcessError("the process was lost 4 times within 600 s", where="limits.restarts")
        return super().poll()

    def update_weights(self, weights: Any, version: int, mode: Any = "drain") -> None:
        if not self.deaf:
            super().update_weights(weights, version, mode)

    def load(self) -> Load:
        return replace(super().load(), version=NO_VERSION) if self.away else super().load()

    def restart(self, reason: str) -> None:
        self.restarted.append(reason)
        for sample in list(self._jobs):
            del self._jobs[sample]
            self._outbox.append(Broken(self._clock.now(), sample, reason))
        super().update_weights({}, 1)


def pool_of(num: int, length: int = 8, **options: Any) -> tuple[EnginePool, list[Mortal], EngineRun]:
    clock = VirtualClock()
    options = {"max_running": 8, "report_every_tokens": 2, **options}
    engines = [Mortal(lambda _sample: reply_of(length), clock, **options) for _ in range(num)]
    pool = EnginePool({f"e{index}": engine for index, engine in enumerate(engines)}, clock)

    def advance(engine: Any) -> None:
        ready_s = engine.ready_at()
        if ready_s is not None:
            clock.wait_until(ready_s)

    return pool, engines, EngineRun(pool, advance)


def samples_of(num_groups: int, size: int) -> list[Sample]:
    spec = SamplingSpec(max_new_tokens=30)
    groups = [(GroupId(serial, 0, prompt.id), prompt) for serial, prompt in enumerate(make_prompts(num_groups))]
    return [Sample(group.member(member), prompt, spec) for group, prompt in groups for member in range(size)]


def test_caps_are_what_all_promise_and_places_in_sum() -> None:
    clock = VirtualClock()
    small, large = (
        ScriptedEngine(lambda _s: reply_of(3), clock, max_running=places, max_sample_tokens=tokens)
        for places, tokens in ((4, 100), (6, 50))
    )
    caps = EnginePool({"a": small, "b": large}, clock).caps
    assert (caps.max_running, caps.max_sample_tokens, caps.update_modes) == (10, 50, small.caps.update_modes | {"rolling"})
    with pytest.raises(EngineError, match="needs an engine"):
        EnginePool({}, clock)


def test_groups_stay_together_and_the_load_is_even() -> None:
    _, engines, run = pool_of(4)
    run.submit(samples_of(16, 2))
    assert [len(engine.given) for engine in engines] == [8, 8, 8, 8]
    for engine in engines:
        groups = Counter(sample.id.group for sample in engine.given)
        assert set(groups.values()) == {2}, "both members of a group are at one engine"
    run.drain()
    assert len(run.ends) == 32


def test_a_group_too_large_for_its_share_is_spread() -> None:
    _, engines, run = pool_of(2)
    run.submit(samples_of(1, 8))
    first, second = (len(engine.given) for engine in engines)
    assert first + second == 8 and abs(first - second) <= 8 * AFFINITY_SLACK + 1


def test_what_has_no_place_waits_in_the_pool_and_takes_the_next_free_one() -> None:
    pool, engines, run = pool_of(2, max_running=2)
    run.submit(samples_of(10, 1))
    assert sum(len(engine.given) for engine in engines) == 6, "two places and one more in each"
    assert (pool.load().running, pool.load().waiting) == (4, 6)
    assert pool.waits()[-1].owner == "engines (no place)"
    run.drain()
    assert len(run.ends) == 10


def test_a_parked_sample_goes_back_to_its_kv_until_the_weights_change() -> None:
    pool, engines, run = pool_of(3)
    samples = samples_of(3, 1)
    run.submit(samples)
    homes = {sample.id: index for index, engine in enumerate(engines) for sample in engine.given}
    assert sorted(homes.values()) == [0, 1, 2]
    run.until_tokens(6)
    run.engine.abort()
    run.until(lambda: not run.open)
    run.submit([run.samples[sample.id] for sample in reversed(samples)])
    again = {sample.id: index for index, engine in enumerate(engines) for sample in engine.given}
    assert again == homes
    pool.abort()
    run.until(lambda: not run.open)
    pool.update_weights({}, 1)
    run.submit([run.samples[sample.id] for sample in reversed(samples)])
    moved = {sample.id: index for index, engine in enumerate(engines) for sample in engine.given}
    assert moved != homes, "after an update the order of load decides, so the test can fail"


def test_a_version_is_one_for_all() -> None:
    pool, engines, run = pool_of(2, max_running=1)
    samples = samples_of(6, 1)
    engines[1].deaf = True
    run.submit(samples[:2])
    run.poll()
    pool.update_weights({}, 1, "recompute")
    assert (engines[0].load().version, pool.load().version) == (1, 0), "one has it, so the pool has not"
    run.submit(samples[2:])
    assert len(engines[0].given) == 1, "nothing is given out in between"
    pool.restart("did not serve version 1")
    assert engines[1].restarted and not engines[0].restarted, "only the one that is late is restarted"
    assert pool.load().version == 1
    broken = run.poll()
    assert any(isinstance(event, Broken) for event in broken)
    run.until(lambda: not run.open)
    assert len(run.ends) == 6


def test_a_rolling_update_takes_one_engine_at_a_time_and_the_others_serve() -> None:
    pool, engines, run = pool_of(2, length=8)
    assert "rolling" in pool.caps.update_modes and "rolling" not in pool_of(1)[0].caps.update_modes
    first, second = samples_of(8, 1)[:4], samples_of(8, 1)[4:]
    run.submit(first)
    run.poll()
    pool.update_weights({}, 1, "rolling")
    assert engines[0]._draining and not engines[1]._draining, "one drains"
    run.submit(second)
    given = [[sample.id for sample in engine.given] for engine in engines]
    assert [len(ids) for ids in given] == [2, 6], "the other takes all that comes"
    run.until(lambda: engines[0].load().version == 1)
    assert pool.load().version == 0 and engines[1].load().version == 0 and engines[1]._draining, "now it is the other's turn"
    run.until(lambda: pool.load().version == 1)
    run.drain()
    assert len(run.ends) == 8 and {len(set(run.samples[sample.id].versions.tolist())) for sample in (*first, *second)} == {1}


def test_a_rolling_update_passes_over_engines_that_are_down_and_waits_for_none_that_is_gone() -> None:
    pool, engines, run = pool_of(3)
    run.submit(samples_of(6, 1))
    run.poll()
    engines[1].away = True
    pool._touch(pool._members["e1"])
    pool.update_weights({}, 1, "rolling")
    pool.restart("did not serve version 1")
    assert [engine.restarted for engine in engines] == [["did not serve version 1"], [], []], "only the one whose turn it is"
    engines[2].gone = True
    run.until(lambda: not run.open)
    assert pool.load().version == 1 and "e2" not in pool.engines


def test_an_engine_that_is_lost_before_its_turn_to_roll_gets_nothing_while_it_is_down() -> None:
    pool, engines, run = pool_of(3, max_running=4)
    run.submit(samples_of(3, 1))
    run.poll()
    pool.update_weights({}, 1, "rolling")
    engines[1].away = True
    pool._touch(pool._members["e1"])
    run.submit(samples_of(7, 1)[3:])
    assert [len(engine.given) for engine in engines] == [1, 1, 5]
    engines[1].away = False
    run.drain()
    assert pool.load().version == 1 and len(run.ends) == 7


def test_an_engine_that_missed_a_version_is_not_used_until_it_has_caught_up() -> None:
    pool, engines, run = pool_of(2)
    engines[1].away = engines[1].deaf = True
    run.poll()
    pool.update_weights({}, 1)
    assert pool.load().version == 1, "an engine that is down holds nobody up"
    engines[1].away = False
    pool._touch(pool._members["e1"])
    assert pool.load().version == 0, "up again, and old"
    engines[1].deaf = False
    pool.update_weights({}, 2)
    assert pool.load().version == 2
    run.submit(samples_of(4, 1))
    assert len(engines[1].given) == 2
    run.drain()


def test_an_engine_lost_for_good_breaks_its_samples_and_the_others_go_on() -> None:
    pool, engines, run = pool_of(2)
    samples = samples_of(4, 2)
    run.submit(samples)
    run.until_tokens(16)
    held = [sample.id for sample in engines[1].given]
    engines[1].gone = True
    run.until(lambda: any(isinstance(end, Broken) for end in run.ends))
    broken = [end for end in run.ends if isinstance(end, Broken)]
    assert sorted(end.id for end in broken) == sorted(held) and "lost 4 times" in broken[0].reason
    assert list(pool.engines) == ["e0"] and pool.caps.max_running == 8
    run.submit([run.samples[sample] for sample in held])
    run.until(lambda: not run.open)
    assert all(run.samples[sample.id].stop == "eos" for sample in samples)
    engines[0].gone = True
    run.submit(samples_of(5, 2)[-2:])
    with pytest.raises(ProcessError, match="lost 4 times"):
        run.until(lambda: not run.open)


def test_a_leaving_engine_hands_its_samples_on_without_a_trace() -> None:
    pool, engines, run = pool_of(2)
    samples = samples_of(4, 2)
    run.submit(samples)
    run.until_tokens(24)
    moved = [sample.id for sample in engines[1].given]
    pool.leave("e1")
    run.drain()
    assert list(pool.engines) == ["e0"]
    assert all(isinstance(end, Finished) for end in run.ends) and len(run.ends) == 8, "nobody has parked"
    again = [sample for sample in engines[0].given if sample.id in moved]
    assert len(again) == 4 and all(len(sample) == 3 for sample in again), "with the tokens that they had"
    assert np.array_equal(run.samples[moved[0]].token_ids, np.arange(8))
    with pytest.raises(EngineError, match="last engine"):
        pool.leave("e0")
    with pytest.raises(EngineError, match="no such engine"):
        pool.leave("e7")


def test_an_abort_ends_a_move() -> None:
    pool, engines, run = pool_of(2)
    run.submit(samples_of(2, 1))
    run.until_tokens(4)
    pool.leave("e1")
    pool.abort()
    run.drain()
    assert len(run.ends) == 2 and all(isinstance(end, Parked) for end in run.ends[:1])
    assert len(engines[0].given) <= 2


def test_an_engine_that_joins_takes_its_share_and_promises_no_less() -> None:
    pool, engines, run = pool_of(1, max_running=2)
    run.submit(samples_of(6, 1))
    newcomer = Mortal(lambda _sample: reply_of(8), engines[0]._clock, max_running=2)
    pool.join("e9", newcomer)
    assert len(newcomer.given) == 3
    pool.update_weights({}, 1)
    late = Mortal(lambda _sample: reply_of(8), engines[0]._clock, max_running=2)
    pool.join("late", late)
    run.drain()
    assert not late.given, "it serves another version"
    pool.update_weights({}, 2)
    run.submit([replace(sample, id=sample.id._replace(serial=20 + sample.id.serial)) for sample in samples_of(6, 1)])
    assert len(late.given) == 2
    run.drain()
    weak = Mortal(lambda _sample: reply_of(8), engines[0]._clock, max_sample_tokens=10)
    with pytest.raises(EngineError, match="promises less"):
        pool.join("weak", weak)
    with pytest.raises(EngineError, match="one name"):
        pool.join("e9", weak)


def test_a_call_that_an_engine_refuses_leaves_nothing() -> None:
    class Picky(Mortal):
        def submit(self, samples: Sequence[Sample]) -> None:
            if any(sample.id.serial == 3 for sample in samples):
                raise EngineError("no")
            super().submit(samples)

    clock = VirtualClock()
    pool = EnginePool({f"e{i}": Picky(lambda _s: reply_of(8), clock, max_running=8) for i in range(2)}, clock)
    run = EngineRun(pool, lambda engine: clock.wait_until(engine.ready_at() or clock.now()))
    with pytest.raises(EngineError, match="no"):
        pool.submit(samples_of(4, 1))
    assert run.poll() == [] and pool.load().running + pool.load().waiting == 0
    run.submit(samples_of(3, 1))
    run.drain()
    assert len(run.ends) == 3


def test_counters_never_fall() -> None:
    pool, _, run = pool_of(3)
    run.submit(samples_of(6, 2))
    run.until_tokens(20)
    before = pool.load()
    pool.leave("e2")
    run.drain()
    after = pool.load()
    assert after.generated_tokens >= 96 > before.generated_tokens and after.slot_s > before.slot_s
    assert any(isinstance(event, Finished | Progressed) for event in run.ends)


def test_every_counter_of_the_members_is_in_the_sum() -> None:
    numbers = {name: place + 1 for place, name in enumerate(_COUNTERS)}
    assert set(numbers) == {field.name for field in fields(Load)} - {
        "running",
        "waiting",
        "kv_tokens",
        "version",
        "slot_s",
        "speculation",
    }
    totals, member = Totals(), Member("a", ScriptedEngine(lambda sample: reply_of(1), VirtualClock()), 0)
    totals.add(member)
    totals.update(member, Load(running=3, waiting=2, kv_tokens=7, version=4, **numbers))
    totals.update(member, Load(running=5, waiting=1, kv_tokens=9, version=4, **numbers))
    assert totals.load(6, 4, "on") == Load(running=5, waiting=7, kv_tokens=9, version=4, speculation="on", **numbers)
