"""The outside world in virtual time: a trainer that only takes time, rewards with a latency, and counts of every token."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pydantic import Field

from april.config.schema import Config
from april.core.clock import Clock
from april.core.event import Event, Finished, Judged, Parked, Updated
from april.core.group import Batch, Group, Reward
from april.core.ids import GroupId, SampleId
from april.core.prompt import Prompt
from april.core.random import stream_key, uniforms
from april.core.sample import Sample
from april.engines.simulated.engine import SimulatedEngine
from april.observe.trace import Timeline
from april.rollout.pool import Pool
from april.rollout.view import Status
from april.simulate.cost import Costs
from april.simulate.workload import Lengths


class RewardTimes(Config):
    """How long a judgement takes."""

    mean_s: float = Field(0.0, ge=0, description="mean latency, log-normal")
    cv: float = Field(1.0, ge=0, description="standard deviation over the mean")


class SimulatedTrainer:
    """Takes the time of an update; on colocated devices the engine stands still meanwhile and loses its KV."""

    name = "trainer"

    def __init__(self, clock: Clock, costs: Costs, engine: SimulatedEngine) -> None:
        self._clock, self._costs, self._engine = clock, costs, engine
        self.version, self.busy_s = 0, 0.0
        self._done_s: float | None = None

    def submit(self, batch: Batch) -> None:
        """Start an update."""
        tokens = sum(len(s) + len(s.prompt.token_ids) for group in batch.groups for s, _ in group.rewarded)
        update_s = self._costs.train.update_s(tokens)
        whole_s = update_s
        if self._costs.placement == "colocated":
            whole_s += self._costs.train.switch_s
            self._engine.stand_still(whole_s, lose_kv=True)
        self.busy_s += update_s
        self._done_s = self._clock.now() + whole_s

    def ready_at(self) -> float | None:
        return self._done_s

    def poll(self) -> list[Event]:
        if self._done_s is None or self._clock.now() < self._done_s:
            return []
        self.version, self._done_s = self.version + 1, None
        return [Updated(self._clock.now(), self.version)]

    def pending(self) -> list[str]:
        return [] if self._done_s is None else [f"update {self.version + 1}"]


class SimulatedRewards:
    """Says whether a sample is right, by its address, after a latency of its own."""

    name = "rewards"

    def __init__(self, clock: Clock, lengths: Lengths, times: RewardTimes, seed: int) -> None:
        self._clock, self._lengths, self._times, self._seed = clock, lengths, times, seed
        self._queue: list[tuple[float, int, Sample]] = []
        self._count = 0

    def submit(self, sample: Sample) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self._clock.now() + self._latency_s(sample.id), self._count, sample))

    def _latency_s(self, sample: SampleId) -> float:
        if not self._times.mean_s:
            return 0.0
        sigma = math.sqrt(math.log(1 + self._times.cv**2))
        key = stream_key(self._seed, "reward", sample.epoch, sample.prompt, sample.member)
        radius, angle = uniforms([key, key], [0, 1])
        z = math.sqrt(-2 * math.log1p(-radius)) * math.cos(2 * math.pi * angle)
        return self._times.mean_s * math.exp(sigma * z - sigma * sigma / 2)

    def ready_at(self) -> float | None:
        return self._queue[0][0] if self._queue else None

    def poll(self) -> list[Event]:
        now, events = self._clock.now(), list[Event]()
        while self._queue and self._queue[0][0] <= now:
            time_s, _, sample = heapq.heappop(self._queue)
            right = self._lengths.success(sample)
            events.append(Judged(time_s, sample.id, Reward(float(right), right)))
        return events

    def pending(self) -> list[str]:
        return [str(sample.id) for _, _, sample in self._queue]

    def close(self) -> None:
        self._queue.clear()


class MeteredPool(Pool):
    """A pool that counts the tokens that nobody will train on.

    Attributes:
        wasted_tokens: of samples that were filtered, evicted, failed, or set back to nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.wasted_tokens = 0

    def drop(self, group: GroupId, end: Status, reason: str) -> None:
        tokens = sum(map(len, self.groups[group].samples.values()))
        super().drop(group, end, reason)
        self.wasted_tokens += tokens

    def restart(self, samples: Iterable[SampleId]) -> None:
        ids = list(samples)
        self.wasted_tokens += sum(len(self[sample]) for sample in ids)
        super().restart(ids)

    def emit(self, groups: Iterable[GroupId], max_token_lag: int | None = None) -> tuple[Group, ...]:
        out = super().emit(groups, max_token_lag)
        for group in out:
            self.wasted_tokens += sum(map(len, group.samples)) - sum(len(sample) for sample, _ in group.rewarded)
        return out

    @property
    def open_tokens(self) -> int:
        """Tokens that were reported and may still be trained on."""
        return sum(len(sample) for state in self.groups.values() for sample in state.samples.values())


class FixedOrder:
    """Prompts in the order in which a recorded run issued them, again and again."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self._prompts, self._position = prompts, 0

    def next(self, count: int, is_open: Callable[[str], bool]) -> list[tuple[int, Prompt]]:
        """The next prompts; fewer when the one whose turn it is is still open."""
        out: list[tuple[int, Prompt]] = []
        while len(out) < min(count, len(self._prompts)):
            epoch, index = divmod(self._position, len(self._prompts))
            if is_open(self._prompts[index].id):
                break
            out.append((epoch, self._prompts[index]))
            self._position += 1
        return out

    def state_dict(self) -> dict[str, Any]:
        return {"position": self._position}


def zero_variance(group: Group) -> str | None:
    """DAPO's dynamic sampling: a group whose samples are all right or all wrong teaches nothing (arXiv 2503.14476)."""
    return "all rewards are equal" if len({reward.value for _, reward in group.rewarded}) < 2 else None


class TraceWatcher:
    """Draws the lives of the first samples, and how many run."""

    def __init__(self, timeline: Timeline, max_samples: int) -> None:
        self.timeline, self._max, self._running = timeline, max_samples, 0
        self._drawn: set[SampleId] = set()

    def on_start(self, samples: Sequence[SampleId], time_s: float) -> None:
        for sample in samples:
            if sample in self._drawn or len(self._drawn) < self._max:
                self._drawn.add(sample)
                self.timeline.begin(str(sample), "running", time_s)
        self._count(len(samples), time_s)

    def on_event(self, event: Any) -> None:
        if isinstance(event, Parked | Finished):
            self._count(-1, event.time_s)
        if getattr(event, "id", None) not in self._drawn:
            return
        if isinstance(event, Parked):
            self.timeline.begin(str(event.id), "parked", event.time_s)
        elif isinstance(event, Finished):
            self.timeline.begin(str(event.id), "scoring", event.time_s)
        elif isinstance(event, Judged):
            self.timeline.end(str(event.id), event.time_s)

    def _count(self, change: int, time_s: float) -> None:
        self._running += change
        self.timeline.counter("running", self._running, time_s)
