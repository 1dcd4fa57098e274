"""What the controller costs: driver, pool of samples, schedule and engine pool, over engines that compute nothing.

    prompts -> Driver + Pool + schedule -> EnginePool -> 64 engines that only know when a sample ends -> instant rewards

In virtual time, so nothing waits; only CPU seconds count, and those of the engines are taken off. A sample event is one
event about one sample: tokens, an end, a park, an outcome. The cost of an event must not grow with the samples in flight,
so two sizes are measured.
"""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from april import registry
from april.core.clock import VirtualClock
from april.core.errors import DataError
from april.core.event import Event, Finished, Judged, Parked, Progressed
from april.core.group import Reward
from april.core.ids import SampleId, Version
from april.core.prompt import Prompt
from april.core.random import stream_key
from april.core.sample import Sample, Segment, repeated
from april.core.sampling import SamplingSpec
from april.engines.base import Caps, Load, UpdateMode, Weights
from april.engines.pool import EnginePool
from april.rollout.driver import Driver
from april.rollout.pool import Pool

TARGET_FRACTION = 0.05
"""Of one core, at 1,000 sample events a second: 50 microseconds an event."""
_TOKENS_PER_S = 50.0
_ZERO, _MINUS = np.zeros(1, np.int32), np.full(1, -0.5, np.float32)


@dataclass(frozen=True, slots=True)
class ControllerOptions:
    """What is driven.

    Attributes:
        in_flight: samples in the engines at once.
        engines: behind the pool.
        steps: batches; the first warms up and is not counted.
        group_size: samples of a prompt.
        report_every_tokens: of a running sample.
        schedules: by name.
        rounds: repetitions; the median counts.
    """

    in_flight: int = 10_000
    engines: int = 64
    steps: int = 6
    group_size: int = 8
    report_every_tokens: int = 256
    schedules: tuple[str, ...] = ("bounded_async", "april")
    rounds: int = 3


class EventEngine:
    """An engine that knows when each sample will report and end, and does nothing in between; its CPU time is counted.

    Args:
        clock: virtual.
        max_running: its places; it is never given more.
        report_every_tokens: of a running sample.
        spent: CPU seconds of all such engines.
    """

    name = "event"

    def __init__(self, clock: VirtualClock, max_running: int, report_every_tokens: int, spent: list[float]) -> None:
        modes: frozenset[UpdateMode] = frozenset({"drain", "recompute", "keep_kv"})
        self.caps = Caps(max_running, 1 << 40, 1 << 20, modes, True, False, False, False)
        self._clock, self._report, self._spent = clock, report_every_tokens, spent
        self._live: dict[SampleId, tuple[int, int, float]] = {}
        self._heap: list[tuple[float, int, SampleId]] = []
        self._outbox: list[Event] = []
        self._tokens, self._serial = 0, 0
        self._load = Load()

    def submit(self, samples: Sequence[Sample]) -> None:
        with self._counted():
            for sample in samples:
                length = _length(sample.id)
                self._live[sample.id] = (len(sample), length, self._clock.now())
                self._schedule(sample.id)

    def _schedule(self, sample: SampleId) -> None:
        done, length, since_s = self._live[sample]
        self._serial += 1
        due_s = since_s + min(self._report, length - done) / _TOKENS_PER_S
        heapq.heappush(self._heap, (due_s, self._serial, sample))
        self._live[sample] = (done, length, since_s)

    def abort(self, ids: Sequence[SampleId] | None = None) -> None:
        with self._counted():
            for sample in list(self._live) if ids is None else ids:
                if sample in self._live:
                    done, length, since_s = self._live.pop(sample)
                    new = min(length - done - 1, int((self._clock.now() - since_s) * _TOKENS_PER_S))
                    self._outbox.append(Parked(self._clock.now(), sample, self._segment(new)))

    def ready_at(self) -> float | None:
        if self._outbox:
            return self._clock.now()
        while self._heap and self._heap[0][2] not in self._live:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def poll(self) -> list[Event]:
        with self._counted():
            while self._heap and self._heap[0][0] <= self._clock.now():
                due_s, _, sample = heapq.heappop(self._heap)
                if sample in self._live and due_s >= self._live[sample][2]:
                    self._advance(due_s, sample)
            events, self._outbox = self._outbox, []
        return events

    def _advance(self, due_s: float, sample: SampleId) -> None:
        done, length, since_s = self._live[sample]
        new = min(self._report, length - done)
        if abs(since_s + new / _TOKENS_PER_S - due_s) > 1e-6:
            return  # of an earlier life of the same sample
        if done + new == length:
            del self._live[sample]
            self._outbox.append(Finished(due_s, sample, self._segment(new), "eos"))
        else:
            self._live[sample] = (done + new, length, due_s)
            self._schedule(sample)
            segment = self._segment(new)
            if segment is not None:
                self._outbox.append(Progressed(due_s, sample, segment))

    def _segment(self, tokens: int) -> Segment | None:
        self._tokens += tokens
        return Segment(repeated(_ZERO, tokens), repeated(_MINUS, tokens), self._load.version, "event") if tokens else None

    def pending(self) -> list[str]:
        return [str(sample) for sample in self._live]

    def score(self, samples: Sequence[Sample]) -> list[Any]:
        return [np.zeros(len(sample), np.float32) for sample in samples]

    def update_weights(self, weights: Weights, version: Version, mode: UpdateMode = "drain") -> None:
        self._load = replace(self._load, version=version)

    def load(self) -> Load:
        if self._load.running != len(self._live) or self._load.generated_tokens != self._tokens:
            self._load = Load(running=len(self._live), version=self._load.version, generated_tokens=self._tokens)
        return self._load

    def close(self) -> None:
        self._live.clear()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        start_s = time.thread_time()
        yield
        self._spent[0] += time.thread_time() - start_s


def _length(sample: SampleId) -> int:
    """A long-tailed length, the same whenever it is asked: 100 to 2,000 tokens, most of them short."""
    uniform = (stream_key(0, sample) % 10_007) / 10_007
    return int(100 / (1 - 0.95 * uniform))


class _Rewards:
    """One for every sample, at once."""

    name = "reward"

    def __init__(self, clock: VirtualClock) -> None:
        self._clock, self._done = clock, list[Event]()

    def submit(self, sample: Sample) -> None:
        self._done.append(Judged(self._clock.now(), sample.id, Reward(1.0)))

    def ready_at(self) -> float | None:
        return self._clock.now() if self._done else None

    def poll(self) -> list[Event]:
        done, self._done = self._done, []
        return done

    def pending(self) -> list[str]:
        return []

    def close(self) -> None:
        pass


class _Prompts:
    """New prompts without end."""

    def __init__(self) -> None:
        self._next = 0

    def next(self, count: int, is_open: Callable[[str], bool]) -> list[tuple[int, Prompt]]:
        first, self._next = self._next, self._next + count
        return [(0, Prompt(f"p{index}", np.ones(8, np.int32))) for index in range(first, first + count)]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}


class _Most:
    """The most samples in flight."""

    pool: Pool
    most = 0

    def on_event(self, event: Event) -> None:
        pass

    def on_start(self, samples: Sequence[SampleId], time_s: float) -> None:
        self.most = max(self.most, self.pool.num_running + len(samples))


def _driver(options: ControllerOptions, schedule: str, spent: list[float], watcher: _Most) -> Driver:
    clock = VirtualClock()
    places = -(-options.in_flight // options.engines)
    engines = {f"e{i}": EventEngine(clock, places, options.report_every_tokens, spent) for i in range(options.engines)}
    groups = max(1, options.in_flight // options.group_size)
    tables: dict[str, dict[str, Any]] = {
        "bounded_async": {"type": "bounded_async", "max_lag_steps": 4, "max_running": options.in_flight},
        "april": {"type": "april", "max_lag_steps": 4, "over_provision": 2.0},
    }
    config = registry.parse("schedule", tables[schedule], "schedule")
    driver = Driver(
        clock=clock,
        engine=EnginePool(engines, clock),
        rewards=_Rewards(clock),
        schedule=registry.builder("schedule", schedule)(config),
        prompts=_Prompts(),
        spec=SamplingSpec(max_new_tokens=2048),
        groups_per_step=max(1, groups // 2),
        group_size=options.group_size,
        steps=1_000_000,
        watcher=watcher,
    )
    watcher.pool = driver.pool
    return driver


def measure(options: ControllerOptions, schedule: str) -> dict[str, float]:
    """CPU seconds of the controller for one sample event, over the counted steps of one run."""
    spent, watcher = [0.0], _Most()
    driver = _driver(options, schedule, spent, watcher)
    start_s = engines_s = events = 0.0
    for step in range(options.steps):
        if step == 1:
            start_s, engines_s, events = time.process_time(), spent[0], driver.num_events
        driver.next_batch()
        driver.pool.trained()
        driver.publish({}, step + 1, "keep_kv")
    cpu_s = time.process_time() - start_s - (spent[0] - engines_s)
    num_events = driver.num_events - events
    per_event_s = cpu_s / num_events
    return {
        "events": num_events,
        "controller_cpu_s": cpu_s,
        "engines_cpu_s": spent[0] - engines_s,
        "microseconds_per_event": 1e6 * per_event_s,
        "core_fraction_at_1000_per_s": 1000 * per_event_s,
        "most_in_flight": watcher.most,
    }


def run_controller_bench(options: ControllerOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Each schedule at the full size and at a tenth of it; the ratio of both is about 1 when no event costs O(n)."""
    cases: list[dict[str, Any]] = []
    if unknown := set(options.schedules) - {"bounded_async", "april"}:
        raise DataError("no such case", where="--schedule", got=", ".join(sorted(unknown)), expected="bounded_async, april")
    for schedule in options.schedules:
        sizes = (options, replace(options, in_flight=max(options.group_size, options.in_flight // 10)))
        medians = []
        for size in sizes:
            rounds = [measure(size, schedule) for _ in range(options.rounds)]
            rounds.sort(key=lambda row: row["microseconds_per_event"])
            medians.append(rounds[len(rounds) // 2])
            say(f"{schedule}, {size.in_flight} in flight: {medians[-1]['microseconds_per_event']:.1f} us an event")
        growth = medians[0]["microseconds_per_event"] / medians[1]["microseconds_per_event"]
        within = medians[0]["core_fraction_at_1000_per_s"] < TARGET_FRACTION
        cases.append({"schedule": schedule, **medians[0], "tenth": medians[1], "growth": growth, "within_target": within})
    fraction = statistics.fmean(case["core_fraction_at_1000_per_s"] for case in cases)
    return {"options": asdict(options), "target_fraction": TARGET_FRACTION, "mean_core_fraction": fraction, "cases": cases}
