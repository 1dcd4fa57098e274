"""An engine that plays fixed replies, one token a tick, on any clock: for tests of everything above it. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from april.core.clock import Clock
from april.core.event import Broken, Event, Finished, Parked, Progressed
from april.core.ids import SampleId, Version
from april.core.random import sample_key, uniforms
from april.core.sample import Sample, Segment, Stop
from april.engines.admission import check_admission
from april.engines.base import Caps, Load, UpdateMode, Weights


@dataclass(frozen=True, slots=True)
class Reply:
    """The whole response that a sample will give.

    Attributes:
        token_ids: the response; cut by the sample's budget.
        stop: how it ends where the budget does not cut it.
        breaks_at: the engine loses the sample once, at this response position; None: never.
    """

    token_ids: tuple[int, ...]
    stop: Stop = "eos"
    breaks_at: int | None = None


@dataclass(slots=True)
class _Running:
    sample: Sample
    reply: Reply
    new: list[int] = field(default_factory=list)

    @property
    def position(self) -> int:
        return len(self.sample) + len(self.new)


def token_logprobs(sample: SampleId, seed: int, positions: npt.ArrayLike) -> npt.NDArray[np.float32]:
    """The log-prob that the scripted engine gives each position: a fixed function of the sample and the position."""
    return -uniforms([sample_key(seed, sample)], positions).astype(np.float32)


class ScriptedEngine:
    """Fixed replies under the engine contract.

    Args:
        replies: the response of each sample.
        clock: one token a sample every `tick_s` seconds.
        max_running: samples that advance in a tick; the others wait.
        report_every_tokens: a running sample reports its tokens this often.
    """

    name = "engine"

    def __init__(
        self,
        replies: Callable[[Sample], Reply],
        clock: Clock,
        *,
        tick_s: float = 1.0,
        max_running: int = 1_000_000,
        max_sample_tokens: int = 1 << 20,
        report_every_tokens: int = 256,
    ) -> None:
        self.caps = Caps(
            max_running=max_running,
            kv_tokens=1 << 40,
            max_sample_tokens=max_sample_tokens,
            update_modes=frozenset({"drain", "recompute", "keep_kv"}),
            addressed_random=True,
            entropy=False,
            score=True,
            shares_prefix=False,
        )
        self._replies, self._clock, self._tick_s, self._report_every = replies, clock, tick_s, report_every_tokens
        self._jobs: dict[SampleId, _Running] = {}
        self._outbox: list[Event] = []
        self._broken: set[SampleId] = set()
        self._next_tick_s = 0.0
        self._update: Version | None = None
        self._draining: set[SampleId] = set()
        self._sampler = "scripted"
        self._load = Load()

    def submit(self, samples: Sequence[Sample]) -> None:
        check_admission(samples, self._jobs, self.caps.max_sample_tokens)
        if not self._jobs:
            self._next_tick_s = self._clock.now() + self._tick_s
        for sample in samples:
            self._jobs[sample.id] = _Running(sample, self._replies(sample))

    def abort(self, ids: Sequence[SampleId] | None = None) -> None:
        for sample in list(self._jobs) if ids is None else ids:
            if sample in self._jobs:
                job = self._jobs.pop(sample)
                self._draining.discard(sample)
                self._outbox.append(Parked(self._clock.now(), sample, self._segment(job)))
        self._swap_if_quiet()

    def ready_at(self) -> float | None:
        if self._outbox:
            return self._clock.now()
        return self._next_tick_s if self._jobs else None

    def poll(self) -> list[Event]:
        while self._jobs and self._clock.now() >= self._next_tick_s:
            self._tick()
            self._next_tick_s += self._tick_s
        events, self._outbox = self._outbox, []
        return events

    def pending(self) -> list[str]:
        return [str(sample) for sample in self._jobs]

    def score(self, samples: Sequence[Sample]) -> list[npt.NDArray[np.float32]]:
        return [token_logprobs(s.id, s.spec.seed, np.arange(len(s))) if len(s) else np.zeros(0, np.float32) for s in samples]

    def update_weights(self, weights: Weights, version: Version, mode: UpdateMode = "drain") -> None:
        if mode == "drain" and self._jobs:
            self._update, self._draining = version, set(list(self._jobs)[: self.caps.max_running])
            return
        for job in self._jobs.values():
            self._report(job)
        if mode == "keep_kv" and self._jobs:
            self._sampler = "scripted+mixed-kv"
        self._load = replace(self._load, version=version)

    def load(self) -> Load:
        running = min(len(self._jobs), self.caps.max_running)
        return replace(self._load, running=running, waiting=len(self._jobs) - running)

    def close(self) -> None:
        self._jobs.clear()

    def _tick(self) -> None:
        jobs = [job for job in self._jobs.values() if not self._draining or job.sample.id in self._draining]
        jobs = jobs[: self.caps.max_running]
        for job in jobs:
            self._advance(job)
        busy_s = self._load.busy_s + self._tick_s
        slot_s = self._load.slot_s + self._tick_s * len(jobs) / self.caps.max_running
        self._load = replace(self._load, generated_tokens=self._load.generated_tokens + len(jobs), busy_s=busy_s, slot_s=slot_s)
        self._swap_if_quiet()

    def _advance(self, job: _Running) -> None:
        sample, reply = job.sample, job.reply
        if reply.breaks_at == job.position and sample.id not in self._broken:
            self._broken.add(sample.id)
            self._report(job)
            self._leave(Broken(self._clock.now(), sample.id, "scripted break"))
            return
        job.new.append(reply.token_ids[job.position])
        over = (
            job.position == sample.spec.max_new_tokens
            or len(sample.prompt.token_ids) + job.position == self.caps.max_sample_tokens
        )
        if job.position == len(reply.token_ids) or over:
            stop: Stop = reply.stop if job.position == len(reply.token_ids) else "length"
            self._leave(Finished(self._clock.now(), sample.id, self._segment(job), stop))
        elif len(job.new) >= self._report_every:
            self._report(job)

    def _leave(self, event: Finished | Broken) -> None:
        del self._jobs[event.id]
        self._draining.discard(event.id)
        self._outbox.append(event)

    def _swap_if_quiet(self) -> None:
        if self._update is not None and not self._draining:
            self._load, self._update = replace(self._load, version=self._update), None

    def _segment(self, job: _Running) -> Segment | None:
        if not job.new:
            return None
        start = len(job.sample)
        logprobs = token_logprobs(job.sample.id, job.sample.spec.seed, np.arange(start, start + len(job.new)))
        return Segment(np.array(job.new, np.int32), logprobs, self._load.version, self._sampler)

    def _report(self, job: _Running) -> None:
        segment = self._segment(job)
        if segment is not None:
            self._outbox.append(Progressed(self._clock.now(), job.sample.id, segment))
            job.sample, job.new = job.sample.extended(segment), []
