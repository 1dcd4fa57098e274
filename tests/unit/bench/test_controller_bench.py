"""The controller benchmark: it fills the engines, counts what it says, and its cost does not grow with the samples in flight."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from april.bench.controller_bench import ControllerOptions, EventEngine, measure, run_controller_bench
from april.core.clock import VirtualClock
from april.core.errors import DataError
from april.core.ids import GroupId
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine
from april.testing.engine_contract import EngineContract
from tests.rollout_helpers import make_prompts

SMALL = ControllerOptions(in_flight=320, engines=8, steps=3, rounds=1)


class TestEventEngine(EngineContract):
    """The stand-in keeps the contract, so that what is measured is a real course of events."""

    children_differ = False

    def make(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[Engine, list[Sample]]:
        self.clock = VirtualClock()
        spec = SamplingSpec(max_new_tokens=2048)
        prompts = enumerate(make_prompts(3))
        groups = [(GroupId(serial, 0, prompt.id), prompt) for serial, prompt in prompts]
        samples = [Sample(group.member(member), prompt, spec) for group, prompt in groups for member in range(2)]
        return EventEngine(self.clock, max_running or 16, 64, [0.0]), samples

    def advance(self, engine: Engine) -> None:
        ready_s = engine.ready_at()
        if ready_s is not None:
            self.clock.wait_until(ready_s)

    def needs(self, holds: bool, reason: str) -> None:
        pytest.skip(reason) if not holds else None

    # it has places for whatever it is given, and no checks: the pool before it has both
    test_no_more_run_than_promised = None  # type: ignore[assignment]
    test_a_bad_sample_rejects_the_whole_call = None  # type: ignore[assignment]
    test_drain_lets_running_samples_finish = None  # type: ignore[assignment]
    test_recompute_continues_under_the_new_weights = None  # type: ignore[assignment]
    test_keep_kv_is_another_sampler = None  # type: ignore[assignment]
    test_the_budget_counts_all_segments = None  # type: ignore[assignment]
    test_abort_of_a_waiting_sample_changes_nothing = None  # type: ignore[assignment]


@pytest.mark.parametrize("schedule", ["bounded_async", "april"])
def test_it_fills_the_engines(schedule: str) -> None:
    row = measure(SMALL, schedule)
    assert row["most_in_flight"] == 320
    assert row["events"] > 320 and row["controller_cpu_s"] > 0 and row["engines_cpu_s"] > 0


@pytest.mark.parametrize("schedule", ["bounded_async", "april"])
def test_the_steps_of_an_event_do_not_grow_with_the_samples_in_flight(schedule: str) -> None:
    """Counted in Python calls, not in seconds, so that the load of the machine does not matter."""
    small, large = (_calls_of_an_event(replace(SMALL, in_flight=size), schedule) for size in (160, 1600))
    assert large < 1.15 * small


def _calls_of_an_event(options: ControllerOptions, schedule: str) -> float:
    num_calls = 0

    def count(_frame: object, what: str, _argument: object) -> None:
        nonlocal num_calls
        num_calls += what in ("call", "c_call")

    sys.setprofile(count)
    try:
        row = measure(options, schedule)
    finally:
        sys.setprofile(None)
    return num_calls / row["events"]


def test_results_name_the_target_and_the_growth() -> None:
    results = run_controller_bench(replace(SMALL, schedules=("april",)), lambda _line: None)
    case = results["cases"][0]
    assert results["target_fraction"] == 0.05 and case["growth"] > 0
    assert case["core_fraction_at_1000_per_s"] == pytest.approx(case["microseconds_per_event"] / 1000, rel=1e-6)
    with pytest.raises(DataError, match="no such case"):
        run_controller_bench(replace(SMALL, schedules=("sink",)), lambda _line: None)
