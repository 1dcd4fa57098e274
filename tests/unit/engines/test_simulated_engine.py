"""The simulated engine: the contract, and its physics against numbers worked out by hand."""

from __future__ import annotations

import unittest
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from april.core.clock import VirtualClock
from april.core.errors import EngineError
from april.core.event import Broken, Event, Finished, Parked
from april.core.ids import GroupId, SampleId
from april.core.prompt import Prompt
from april.core.random import stream_key
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine, UpdateMode
from april.engines.simulated.config import SimulatedConfig
from april.engines.simulated.costs import EngineCosts
from april.engines.simulated.course import Course
from april.engines.simulated.engine import SimulatedEngine
from april.testing.engine_contract import EngineContract
from april.testing.engine_run import EngineRun

MODES = ("drain", "recompute", "keep_kv", "next_request", "rolling")

FLAT = EngineCosts(step_fixed_s=1.0, step_per_sequence_s=0.0)
"""Every step takes one second, whatever runs."""


def make_samples(num_groups: int, size: int, prompt_tokens: int = 3, budget: int = 1000) -> list[Sample]:
    prompts = [Prompt(f"p{serial}", np.zeros(prompt_tokens, np.int32)) for serial in range(num_groups)]
    spec = SamplingSpec(max_new_tokens=budget)
    return [Sample(GroupId(s, 0, p.id).member(m), p, spec) for s, p in enumerate(prompts) for m in range(size)]


class Bench:
    """An engine, its clock, and everything that it reported."""

    def __init__(
        self, lengths: list[int] | Callable[[Sample], Course], costs: EngineCosts = FLAT, num_replicas: int = 1, **config: object
    ) -> None:
        self.clock = VirtualClock()
        self.courses = lengths if callable(lengths) else lambda s: Course(lengths[s.id.serial])
        self.engine = SimulatedEngine(self.courses, self.clock, costs, SimulatedConfig(**config), num_replicas=num_replicas)  # type: ignore[arg-type]
        self.events: list[Event] = []

    def run(self, until_s: float = float("inf")) -> None:
        while (ready_s := self.engine.ready_at()) is not None and ready_s <= until_s:
            self.clock.wait_until(ready_s)
            self.events += self.engine.poll()
        if until_s < float("inf"):
            self.clock.wait_until(until_s)
            self.events += self.engine.poll()

    def ends(self) -> dict[SampleId, float]:
        return {event.id: event.time_s for event in self.events if isinstance(event, Finished)}

    def end_times(self) -> list[float]:
        return [pytest.approx(time_s) for _, time_s in sorted(self.ends().items())]


class TestSimulatedContract(EngineContract, unittest.TestCase):
    children_differ = False
    config: SimulatedConfig = SimulatedConfig(report_every_s=1.0)
    num_replicas = 1

    def make(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[Engine, list[Sample]]:
        costs = FLAT.model_copy(update={"max_running": max_running or 64, "kv_tokens": kv_tokens or 1 << 20})
        self.clock = VirtualClock()
        lengths = lambda sample: Course(10 + stream_key(1, sample.id.prompt, sample.id.member) % 12)  # noqa: E731
        return SimulatedEngine(lengths, self.clock, costs, self.config, num_replicas=self.num_replicas), make_samples(
            3, 2, budget=20
        )

    def advance(self, engine: Engine) -> None:
        self.clock.wait_until(engine.ready_at() or 0.0)

    def small_kv_tokens(self) -> int | None:
        return 30


class TestSimulatedContractOfTwoReplicas(TestSimulatedContract):
    config = SimulatedConfig(report_every_s=0.5, routing="by_group")
    num_replicas = 2

    def test_no_more_run_than_promised(self) -> None:
        run, samples = self.start(max_running=1)
        run.submit(samples)
        assert run.engine.caps.max_running == 2 and run.engine.load().running == 2


class TestSimulatedContractOfACentralQueue(TestSimulatedContract):
    config = SimulatedConfig(report_every_s=0.5, routing="queue")


# -- physics, by hand -------------------------------------------------------------------------------------------------


def test_one_sample_alone() -> None:
    """Prompt 3, response 4; a step costs 10 + 1 a sequence + 0.5 a context token: 12.5 + 13 + 13.5 + 14, after 6 of prefill."""
    costs = EngineCosts(step_fixed_s=10, step_per_sequence_s=1, context_token_read_s=0.5, prefill_per_token_s=2)
    bench = Bench([4], costs)
    bench.engine.submit(make_samples(1, 1))
    bench.run()
    assert bench.end_times() == [59.0]
    load = bench.engine.load()
    assert (load.generated_tokens, load.prefill_tokens, load.busy_s) == (4, 3, 59.0)


def test_two_samples_share_the_engine() -> None:
    """Lengths 2 and 4, step = 10 + B: two steps of 12 together, two of 11 alone."""
    bench = Bench([2, 4], EngineCosts(step_fixed_s=10, step_per_sequence_s=1))
    bench.engine.submit(make_samples(2, 1))
    bench.run()
    assert bench.end_times() == [24.0, 46.0]
    assert bench.engine.load().slot_s == pytest.approx((2 * 24 + 22) / 256)


def test_the_longer_of_reads_and_arithmetic_counts() -> None:
    """B = 1, prompt 3, reads 1 a token, arithmetic 5: steps of 5 (3 tokens), 5 (4), 5 (5), 6 (6), 7 (7)."""
    costs = EngineCosts(step_fixed_s=0, step_per_sequence_s=0, context_token_read_s=1, compute_per_sequence_s=5)
    assert [costs.step_s(1, k) for k in range(3, 8)] == [5, 5, 5, 6, 7]
    assert [costs.steps_s(1, 3, n) for n in range(6)] == [0, 5, 10, 15, 21, 28]
    assert [costs.steps_within(1, 3, s, 9) for s in (0, 4.9, 5, 20.9, 21, 1000)] == [0, 0, 1, 3, 4, 9]


def test_a_mixture_reads_the_experts_that_some_token_uses() -> None:
    """Half of the experts a token: one sequence reads a half of them, two three quarters."""
    costs = EngineCosts(step_fixed_s=0, step_per_sequence_s=0, weights_read_s=1, experts_read_s=8, experts_share=0.5)
    assert [costs.step_s(batch, 0) for batch in (1, 2)] == [5.0, 7.0]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 50), st.integers(0, 5000), st.integers(0, 400), st.floats(0, 3), st.floats(0, 0.01), st.floats(0, 5))
def test_the_sum_over_steps_is_the_sum_of_the_steps(
    batch: int, context: int, steps: int, fixed: float, read: float, compute: float
) -> None:
    costs = EngineCosts(step_fixed_s=fixed + 0.001, context_token_read_s=read, compute_per_sequence_s=compute / 10)
    one_by_one = [costs.step_s(batch, context + batch * i) for i in range(steps)]
    total = costs.steps_s(batch, context, steps)
    assert total == pytest.approx(sum(one_by_one), rel=1e-9)
    assert costs.steps_within(batch, context, total + 1e-6 * (1 + total), 10**6) >= steps
    assert steps == 0 or costs.steps_within(batch, context, total - one_by_one[-1] / 2, 10**6) == steps - 1


def test_a_newcomer_joins_at_the_end_of_the_step_under_way() -> None:
    """A runs alone in steps of 1 s; B comes at 2.5 and is prefilled (2 s) from 3 to 5, while A waits; both have 2 to go."""
    bench = Bench([5, 2], EngineCosts(step_fixed_s=1, step_per_sequence_s=0, prefill_per_token2_s=2 / 9))
    first, second = make_samples(2, 1)
    bench.engine.submit([first])  # prefilled until 2, steps end at 3, 4, 5, 6, 7
    bench.run(4.5)
    bench.engine.submit([second])  # admitted at 5, prefilled until 7: A's steps 4, 5 end at 8, 9, as do B's
    bench.run()
    assert bench.end_times() == [9.0, 9.0]


def test_when_one_is_aborted_the_others_keep_the_step_under_way() -> None:
    """Steps of 3 s with two sequences, 2 s with one; the abort at 4 is in the middle of the second step."""
    bench = Bench([9, 3], EngineCosts(step_fixed_s=1, step_per_sequence_s=1))
    first, second = make_samples(2, 1)
    bench.engine.submit([first, second])
    bench.run(4.0)
    bench.engine.abort([first.id])
    bench.run()
    parked = [event for event in bench.events if isinstance(event, Parked)]
    assert [(event.time_s, len(event.segment or ())) for event in parked] == [(4.0, 1)]
    assert bench.end_times() == [8.0]  # 3 + 3 + 2


def test_memory_preempts_who_came_last_and_prefills_it_again() -> None:
    """KV for 20 tokens, prompts of 3 (not shared), three responses of 6, steps of 1 s, prefill 1 s a token (3 s each).

    Admission leaves 1 % free: 3 + 3 + 3 held of 20. Steps end at 10, 11, 12 with 12, 15, 18 tokens. A fourth step would need 21:
    the last is preempted with 3 tokens (12 left). Two go on: 14, 16, 18: both end at 15 with 6 tokens. The third is
    prefilled again with 6 tokens until 21 and ends at 24.
    """
    costs = EngineCosts(step_fixed_s=1, step_per_sequence_s=0, prefill_per_token_s=1, kv_tokens=20)
    bench = Bench([6, 6, 6], costs, shares_prefix=False)
    bench.engine.submit(make_samples(3, 1, budget=10))
    bench.run()
    assert bench.end_times() == [15.0, 15.0, 24.0]
    load = bench.engine.load()
    assert (load.preemptions, load.prefill_tokens, load.kv_tokens, load.generated_tokens) == (1, 15, 0, 18)


def test_a_group_shares_the_prefill_of_its_prompt() -> None:
    bench = Bench([5], EngineCosts(step_fixed_s=1, step_per_sequence_s=0, prefill_per_token_s=1))
    bench.engine.submit(make_samples(1, 4, prompt_tokens=10))
    bench.run()
    alone = Bench([5], EngineCosts(step_fixed_s=1, step_per_sequence_s=0, prefill_per_token_s=1), shares_prefix=False)
    alone.engine.submit(make_samples(1, 4, prompt_tokens=10))
    alone.run()
    assert bench.end_times() == [15.0] * 4 and alone.end_times() == [45.0] * 4
    assert (bench.engine.load().shared_tokens, alone.engine.load().shared_tokens) == (30, 0)


def test_a_tool_call_frees_the_place_but_not_the_memory() -> None:
    """One place; A waits 10 s for a tool after 2 tokens; B uses the place meanwhile, and A goes on when B is done."""
    courses = {0: Course(4, pauses=((2, 10.0),)), 1: Course(9)}
    bench = Bench(lambda s: courses[s.id.serial], EngineCosts(step_fixed_s=1, step_per_sequence_s=0, max_running=1))
    bench.engine.submit(make_samples(2, 1))
    bench.run()
    assert bench.end_times() == [14.0, 11.0]  # B: 2 to 11; A back at 12
    alone = Bench(lambda s: courses[0], EngineCosts(step_fixed_s=1, prefill_per_token_s=1, step_per_sequence_s=0))
    alone.engine.submit(make_samples(1, 1))
    alone.run()
    assert alone.end_times() == [17.0] and alone.engine.load().prefill_tokens == 3
    assert alone.engine.load().busy_s == pytest.approx(7.0)  # the pause is not work


def test_a_tool_call_that_is_aborted_is_made_again() -> None:
    bench = Bench(lambda s: Course(4, pauses=((2, 10.0),)))
    sample = make_samples(1, 1)[0]
    run = EngineRun(bench.engine, lambda engine: bench.clock.wait_until(engine.ready_at() or 0.0))
    run.submit([sample])
    bench.clock.wait_until(5.0)
    bench.engine.abort()
    run.drain()
    assert len(run.samples[sample.id]) == 2
    run.submit([run.samples[sample.id]])
    run.drain()
    assert len(run.samples[sample.id]) == 4 and bench.clock.now() == pytest.approx(7.0)


def test_replicas_work_side_by_side_and_the_lightest_takes_the_next() -> None:
    costs = EngineCosts(step_fixed_s=0, step_per_sequence_s=1)
    four = Bench([6], costs, num_replicas=4)
    four.engine.submit(make_samples(1, 4))
    four.run()
    one = Bench([6], costs)
    one.engine.submit(make_samples(1, 4))
    one.run()
    assert four.end_times() == [6.0] * 4 and one.end_times() == [24.0] * 4
    together = Bench([6], costs, num_replicas=4, routing="by_group")
    together.engine.submit(make_samples(1, 4))
    together.run()
    assert together.end_times() == [24.0] * 4


def test_a_central_queue_is_faster_than_fixed_places() -> None:
    """Two replicas with one place: lengths 9, 1, 9, 1, ... by turns pile up on one replica when the number decides."""
    costs = EngineCosts(step_fixed_s=1, step_per_sequence_s=0, max_running=1)
    lengths = [9, 1] * 4
    for routing, end_s in (("static", 36.0), ("queue", 20.0)):
        bench = Bench(lengths, costs, num_replicas=2, routing=routing)
        bench.engine.submit(make_samples(8, 1))
        bench.run()
        assert bench.clock.now() == end_s


def test_weights_take_their_time_and_recomputing_prefills() -> None:
    """At 3.5 a sample has 3 of 5 tokens; sync 10 s, then 6 tokens are prefilled at 1 s: two more steps end at 21.5."""
    costs = EngineCosts(step_fixed_s=1, step_per_sequence_s=0, sync_s=10)
    ends = {}
    for mode, prefill in (("recompute", 1.0), ("keep_kv", 0.0), ("drain", 0.0)):
        bench = Bench([5], costs)
        bench.engine.submit(make_samples(1, 1))
        bench.run(3.5)
        bench.engine.costs = costs
        for replica in bench.engine.replicas:
            replica.costs = costs.model_copy(update={"prefill_per_token_s": prefill})
        bench.engine.update_weights({}, 1, mode)  # type: ignore[arg-type]
        bench.run()
        ends[mode] = (bench.ends()[make_samples(1, 1)[0].id], bench.clock.now(), bench.engine.load().version)
    assert ends == {"recompute": (21.5, 21.5, 1), "keep_kv": (15.5, 15.5, 1), "drain": (5.0, 15.0, 1)}


def test_a_failing_replica_loses_what_it_did_not_report() -> None:
    bench = Bench([2000], num_replicas=2, failures_per_hour=6.0, restart_s=30.0, report_every_tokens=100)
    samples = {sample.id: sample for sample in make_samples(4, 1, budget=3000)}
    bench.courses = lambda s: Course(2000)
    bench.engine._courses = bench.courses
    bench.engine.submit(list(samples.values()))
    broken, finished = 0, 0
    while finished < 4:
        bench.clock.wait_until(bench.engine.ready_at() or 0.0)
        for event in bench.engine.poll():
            if not isinstance(event, Broken) and getattr(event, "segment", None) is not None:
                samples[event.id] = samples[event.id].extended(event.segment)  # type: ignore[union-attr, arg-type]
            finished += isinstance(event, Finished)
            if isinstance(event, Broken):
                broken += 1
                assert len(samples[event.id]) % 100 == 0
                bench.engine.submit([samples[event.id]])
    assert broken > 0 and all(len(sample) == 2000 for sample in samples.values())
    load = bench.engine.load()
    assert load.generated_tokens == 4 * 2000 + bench.engine.lost_tokens and 0 < bench.engine.lost_tokens < 100 * broken


def test_what_can_never_run_is_refused() -> None:
    bench = Bench([5], EngineCosts(kv_tokens=20))
    with pytest.raises(EngineError, match="20 of KV"):
        bench.engine.submit(make_samples(1, 1, budget=100))
    assert bench.engine.load().waiting == 0


def test_reports_come_at_multiples_of_the_interval() -> None:
    bench = Bench([3, 5], report_every_s=2.0)
    bench.engine.submit(make_samples(2, 1))
    seen = []
    while (ready_s := bench.engine.ready_at()) is not None:
        bench.clock.wait_until(ready_s)
        seen.append((ready_s, [event.time_s for event in bench.engine.poll()]))
    assert seen == [(2.0, []), (4.0, [3.0]), (6.0, [5.0])]


def test_tokens_take_no_memory_however_often_a_sample_grows() -> None:
    bench = Bench([1000])
    sample = make_samples(1, 1)[0]
    run = EngineRun(bench.engine, lambda engine: bench.clock.wait_until(engine.ready_at() or 0.0))
    run.submit([sample])
    for at in (100.0, 300.0):
        bench.clock.wait_until(at)
        bench.engine.update_weights({}, int(at), "recompute")
        run.poll()
    run.drain()
    result = run.samples[sample.id]
    assert [span[:3] for span in result.spans] == [(0, 100, 0), (100, 300, 100), (300, 1000, 300)]
    columns = (result.token_ids, result.behaviour_logprobs, result.loss_mask)
    assert [column.strides for column in columns] == [(0,)] * 3 and len(result) == 1000


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(["least_loaded", "by_group", "static", "queue"]), st.booleans())
def test_random_lives_conserve_tokens_and_time(seed: int, num_replicas: int, routing: str, shares: bool) -> None:
    """Random submits, aborts and weight updates: each sample gets all of its tokens once, and no replica is busier than time."""
    random = np.random.default_rng(seed)
    costs = EngineCosts(
        step_fixed_s=0.5, step_per_sequence_s=0.1, context_token_read_s=0.01, prefill_per_token_s=0.05, kv_tokens=220,
        max_running=4, sync_s=float(random.integers(0, 2) * 3),
    )  # fmt: skip
    lengths = {g: int(random.integers(1, 60)) for g in range(6)}
    pauses = {g: ((lengths[g] // 2, 5.0),) if g % 3 == 0 else () for g in range(6)}
    bench = Bench(
        lambda s: Course(lengths[s.id.serial], pauses=pauses[s.id.serial]),
        costs, num_replicas=num_replicas, routing=routing, shares_prefix=shares,
        drain=("each", "together")[seed % 2], report_every_s=float(random.integers(0, 2)),
    )  # fmt: skip
    run = EngineRun(bench.engine, lambda engine: bench.clock.wait_until(engine.ready_at() or 0.0))
    waiting = make_samples(6, 2, budget=100)
    version = 0
    for _ in range(40):
        action = random.integers(0, 4)
        if action == 0 and waiting:
            run.submit(waiting)
            waiting = []
        elif action == 1 and run.open:
            chosen = sorted(run.open)[: int(random.integers(1, 6))]
            bench.engine.abort(chosen)
            run.poll()
            waiting += [run.samples[s] for s in chosen if s not in run.open and run.samples[s].stop is None]
        elif action == 2:
            version += 1
            bench.engine.update_weights({}, version, MODES[random.integers(0, 5)])
        elif bench.engine.ready_at() is not None:
            bench.clock.wait_until(bench.clock.now() + float(random.random() * 20))
            run.poll()
        for replica in bench.engine.replicas:
            idle = [job for job in (*replica.paused, *replica.waiting) if job.kv_kept]
            assert replica._num_idle_kv == len(idle)
    run.submit(waiting)
    run.drain()
    bench.run()
    assert all(len(s) == lengths[s.id.serial] and s.stop == "eos" for s in run.samples.values())
    load = bench.engine.load()
    assert load.generated_tokens == sum(len(s) for s in run.samples.values())
    assert load.kv_tokens == 0 and load.version == version
    assert 0 <= load.slot_s <= load.busy_s <= bench.clock.now() + 1e-9


def test_later_requests_get_the_next_version_and_running_ones_keep_theirs() -> None:
    bench = Bench([6, 6], EngineCosts(step_fixed_s=1, step_per_sequence_s=0, max_running=1, sync_s=0.5))
    bench.engine.submit(make_samples(2, 1))
    bench.run(3.0)
    bench.engine.update_weights({}, 1, "next_request")
    bench.run()
    versions = [(e.id.serial, e.segment.version, len(e.segment)) for e in bench.events if getattr(e, "segment", None)]
    assert versions == [(0, 0, 3), (0, 0, 3), (1, 1, 6)]


def test_rolling_updates_one_replica_after_the_other() -> None:
    """Replica 0 drains until 4 and swaps until 14, replica 1 is idle since 9 and swaps until 24."""
    bench = Bench([4, 9, 5], EngineCosts(step_fixed_s=1, step_per_sequence_s=0, sync_s=10), num_replicas=2)
    first, second, third = make_samples(3, 1)
    bench.engine.submit([first, second])
    bench.run(2.0)
    bench.engine.update_weights({}, 1, "rolling")
    bench.engine.submit([third])  # to replica 1, on the old weights
    bench.run(14.0)
    assert bench.engine.load().version == 0 and bench.engine.replicas[0].version == 1
    bench.run()
    assert bench.end_times() == [4.0, 9.0, 7.0] and bench.clock.now() == 24.0 and bench.engine.load().version == 1
    assert {e.segment.version for e in bench.events if getattr(e, "segment", None)} == {0}


def test_each_replica_may_drain_by_itself() -> None:
    """Lengths 4 and 9; a third sample waits for the first quiet replica: from 4 + 1 of sync when each drains, else from 9 + 1."""
    ends = {}
    for drain in ("each", "together"):
        bench = Bench([4, 9, 5], EngineCosts(step_fixed_s=1, step_per_sequence_s=0, sync_s=1), num_replicas=2, drain=drain)
        first, second, third = make_samples(3, 1)
        bench.engine.submit([first, second])
        bench.run(2.0)
        bench.engine.update_weights({}, 1, "drain")
        bench.engine.submit([third])
        bench.run()
        ends[drain] = (bench.ends()[third.id], bench.engine.load().version)
    assert ends == {"each": (10.0, 1), "together": (15.0, 1)}


@pytest.mark.parametrize(("mode", "drain"), [("rolling", "together"), ("drain", "each")])
@pytest.mark.parametrize("routing", ["least_loaded", "by_group", "queue"])
def test_a_replica_that_has_the_new_weights_takes_work_again(routing: str, mode: UpdateMode, drain: str) -> None:
    """Three replicas are quiet at 3, 6 and 12; what comes at 4, 7 and 13 goes to the one that became quiet last."""
    bench = Bench([3, 6, 12, 50, 50, 50], num_replicas=3, routing=routing, drain=drain)
    samples = make_samples(6, 1)
    bench.engine.submit(samples[:3])
    bench.run(1.0)
    bench.engine.update_weights({}, 1, mode)
    for at_s, sample in zip((4.0, 7.0, 13.0), samples[3:], strict=True):
        bench.run(at_s)
        bench.engine.submit([sample])
        assert [len(replica.running) for replica in bench.engine.replicas] == [1, 1, 1]
    assert bench.engine.load().version == 1
