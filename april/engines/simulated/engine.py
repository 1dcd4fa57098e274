"""The engine protocol over replicas in virtual time."""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from april.core.clock import Clock
from april.core.errors import EngineError
from april.core.event import Broken, Event, Finished, Parked, Progressed
from april.core.ids import SampleId, Version
from april.core.random import stream_key, uniforms
from april.core.sample import Sample, Segment, repeated
from april.engines.admission import check_admission
from april.engines.base import Caps, Load, UpdateMode, Weights
from april.engines.simulated.config import SimulatedConfig
from april.engines.simulated.costs import EngineCosts
from april.engines.simulated.course import Courses
from april.engines.simulated.replica import Job, Replica
from april.engines.simulated.routing import Router

TOKEN, LOGPROB = np.zeros(1, np.int32), np.full(1, -1.0, np.float32)
_SWAP, _WAKE, _REPLICA = 0, 1, 2


class Update:
    """A change of weights on its way: on which replicas, after which samples, and when it will be done."""

    __slots__ = ("jobs", "replicas", "swap_s")

    def __init__(self, replicas: list[Replica]) -> None:
        self.replicas, self.jobs, self.swap_s = replicas, set[Job](), float("inf")


class SimulatedEngine:
    """Replicas in virtual time; all tokens are the same, and take no memory.

    Args:
        courses: what each sample will do; must be the same for the same id at every call.
        clock: usually virtual; the engine never waits.
        costs: of one replica.
        num_replicas: model replicas behind the engine.
        seed: of the failures.
    """

    name = "engine"

    def __init__(
        self,
        courses: Courses,
        clock: Clock,
        costs: EngineCosts,
        config: SimulatedConfig | None = None,
        *,
        num_replicas: int = 1,
        seed: int = 0,
    ) -> None:
        self.config = config = config or SimulatedConfig()
        self.costs, self._courses, self._clock, self._seed = costs, courses, clock, seed
        self.replicas = [Replica(index, costs, config.shares_prefix) for index in range(num_replicas)]
        self.caps = Caps(
            max_running=costs.max_running * num_replicas,
            kv_tokens=costs.kv_tokens * num_replicas,
            max_sample_tokens=min(config.max_sample_tokens, costs.kv_tokens),
            update_modes=frozenset({"drain", "recompute", "keep_kv", "next_request", "rolling"}),
            addressed_random=True,
            entropy=False,
            score=True,
            shares_prefix=config.shares_prefix,
        )
        self._router = Router(config.routing, num_replicas)
        self._central: deque[Job] = deque()
        self._jobs: dict[SampleId, Job] = {}
        self._outbox: list[Event] = []
        self._heap: list[tuple[float, int, int, int]] = []  # (time, kind, replica or pause, stamp of the replica's plan)
        self._stamps = [0] * num_replicas
        self._pauses: dict[int, Job] = {}
        self._num_pauses = 0
        self._version: Version = 0
        self._next: Version | None = None
        self._updates: dict[int, Update] = {}
        self._quiet: list[int] = []
        self._num_updates = 0
        self._rolling: deque[Replica] = deque()
        self._failures = [0] * num_replicas
        self.lost_tokens = 0
        for replica in self.replicas:
            self._draw_failure(replica)

    # -- samples ------------------------------------------------------------------------------------------------------

    def submit(self, samples: Sequence[Sample]) -> None:
        check_admission(samples, self._jobs, self.caps.max_sample_tokens)
        jobs = [self._job(sample) for sample in samples]
        now = self._clock.now()
        self._run_until(now)
        for job in jobs:
            self._jobs[job.sample.id] = job
        self._place(jobs, now)

    def _job(self, sample: Sample) -> Job:
        prompt, limit = len(sample.prompt.token_ids), self.caps.max_sample_tokens
        if min(prompt + sample.spec.max_new_tokens, self.config.max_sample_tokens) > self.costs.kv_tokens:
            problem = f"it may grow to more tokens than the {self.costs.kv_tokens} of KV that a replica holds"
            raise EngineError("a sample cannot be generated", where=str(sample.id), got=problem)
        course = self._courses(sample)
        total = min(course.num_tokens, sample.spec.max_new_tokens, limit - prompt)
        return Job(sample, course, max(total, len(sample) + 1))

    def abort(self, ids: Sequence[SampleId] | None = None) -> None:
        now = self._clock.now()
        self._run_until(now)
        wanted = dict.fromkeys(self._jobs if ids is None else ids)
        found = [self._jobs[sample] for sample in wanted if sample in self._jobs]
        for replica, jobs in self._by_replica(found).items():
            replica.settle(now)
            replica.remove(jobs)
        central = {job for job in found if job.replica is None}
        if central:
            self._central = deque(job for job in self._central if job not in central)
        for job in found:
            self._outbox.append(Parked(now, job.sample.id, self._segment(job)))
            self._forget(job)
        for replica in self._by_replica(found):
            self._look(replica, now)
        self._swap_if_quiet(now)

    @staticmethod
    def _by_replica(jobs: Sequence[Job]) -> dict[Replica, list[Job]]:
        out: dict[Replica, list[Job]] = {}
        for job in jobs:
            if job.replica is not None:
                out.setdefault(job.replica, []).append(job)
        return out

    def score(self, samples: Sequence[Sample]) -> list[npt.NDArray[np.float32]]:
        return [repeated(LOGPROB, len(sample)) for sample in samples]

    # -- source -------------------------------------------------------------------------------------------------------

    def ready_at(self) -> float | None:
        now, every = self._clock.now(), self.config.report_every_s
        if self._outbox:
            return now
        due_s = self._due_s()
        if due_s is None or not every:
            return due_s
        return (math.floor(now / every + 1e-9) + 1) * every

    def poll(self) -> list[Event]:
        self._run_until(self._clock.now())
        events, self._outbox = self._outbox, []
        return events

    def pending(self) -> list[str]:
        return [str(sample) for sample in self._jobs]

    def load(self) -> Load:
        now, replicas = self._clock.now(), self.replicas
        self._run_until(now)
        for replica in replicas:
            replica.settle(now)
        running = sum(len(replica.running) for replica in replicas)
        return Load(
            running=running,
            waiting=len(self._jobs) - running,
            kv_tokens=sum(replica.held_tokens for replica in replicas),
            version=self._version,
            generated_tokens=sum(replica.generated for replica in replicas),
            prefill_tokens=sum(replica.prefilled for replica in replicas),
            shared_tokens=sum(replica.shared for replica in replicas),
            preemptions=sum(replica.preemptions for replica in replicas),
            busy_s=sum(replica.busy_s for replica in replicas) / len(replicas),
            slot_s=sum(replica.slot_s for replica in replicas) / self.caps.max_running,
        )

    def close(self) -> None:
        self._jobs.clear()
        self._heap.clear()

    # -- time ---------------------------------------------------------------------------------------------------------

    def _due_s(self) -> float | None:
        """When the next thing happens; forgets plans that were changed."""
        while self._heap:
            time_s, kind, key, stamp = self._heap[0]
            if (
                (kind == _REPLICA and self._stamps[key] == stamp)
                or (kind == _WAKE and key in self._pauses)
                or (kind == _SWAP and key in self._updates)
            ):
                return time_s
            heapq.heappop(self._heap)
        return None

    def _run_until(self, now: float) -> None:
        """Everything that has happened by now, in order of time."""
        while (due_s := self._due_s()) is not None and due_s <= now:
            _, kind, key, _ = heapq.heappop(self._heap)
            if kind == _SWAP:
                self._swap(key, due_s)
            elif kind == _WAKE:
                self._wake(self._pauses.pop(key), due_s)
            else:
                self._on_replica(self.replicas[key], due_s)

    def _on_replica(self, replica: Replica, now: float) -> None:
        if replica.why == "failure":
            self._fail(replica, now)
            return
        for job in replica.on_due():
            if job.state == "paused":
                self._pause(job, now)
            else:
                stop = job.course.stop if job.total == job.course.num_tokens else "length"
                self._outbox.append(Finished(now, job.sample.id, self._segment(job), stop))
                self._forget(job)
        self._plan(replica, now)
        self._swap_if_quiet(now)

    def _plan(self, replica: Replica, now: float) -> None:
        """At the end of a step: admit, and see what is next."""
        while self._central and not replica.closed and self._router.loads[replica.index] < self.costs.max_running:
            job = self._central.popleft()
            job.replica = replica
            self._router.take(replica.index)
            replica.waiting.append(job)
        replica.plan(now)
        self._schedule(replica)

    def _look(self, replica: Replica, now: float) -> None:
        """In the middle of a step, after `settle`: what waits is admitted when the step ends."""
        if replica.running and replica.start_s < now and (replica.waiting or self._central):
            replica.at_next_boundary()
            self._schedule(replica)
        else:
            self._plan(replica, now)

    def _schedule(self, replica: Replica) -> None:
        self._stamps[replica.index] += 1
        if replica.due_s is not None:
            heapq.heappush(self._heap, (replica.due_s, _REPLICA, replica.index, self._stamps[replica.index]))

    def _place(self, jobs: Sequence[Job], now: float) -> None:
        """Give samples to replicas, or to the central queue, and let those replicas look."""
        touched: dict[Replica, None] = {}
        self._pass_over(now)
        for job in jobs:
            if self.config.routing == "queue" and not self._has_place(self._router.lightest()):
                self._central.append(job)
                continue
            job.replica = self.replicas[self._router.place(job.group)]
            job.replica.waiting.append(job)
            touched[job.replica] = None
        for replica in touched:
            replica.settle(now)
            self._look(replica, now)

    def _pass_over(self, now: float) -> None:
        """Tell the router which replicas drain, swap or restart; when all do, none is worse than the others."""
        if self.config.failures_per_hour or self._updates or self._router.down:
            down = {replica.index for replica in self.replicas if replica.closed or replica.free_s > now}
            self._router.down = down if len(down) < len(self.replicas) else set()

    def _has_place(self, index: int) -> bool:
        return not self.replicas[index].closed and self._router.loads[index] < self.costs.max_running

    def _forget(self, job: Job) -> None:
        del self._jobs[job.sample.id]
        if (update := self._updates.get(job.update)) is not None:
            update.jobs.discard(job)
            if not update.jobs:
                self._quiet.append(job.update)
        if job.replica is not None:
            self._router.leave(job.group, job.replica.index)

    # -- tools --------------------------------------------------------------------------------------------------------

    def _pause(self, job: Job, now: float) -> None:
        seconds = next(pause_s for position, pause_s in job.course.pauses if position == job.done)
        self._pauses[self._num_pauses] = job
        heapq.heappush(self._heap, (now + seconds, _WAKE, self._num_pauses, 0))
        self._num_pauses += 1

    def _wake(self, job: Job, now: float) -> None:
        if job.state == "paused" and job.replica is not None:
            job.replica.wake(job)
            job.replica.settle(now)
            self._look(job.replica, now)

    # -- failures -----------------------------------------------------------------------------------------------------

    def _draw_failure(self, replica: Replica) -> None:
        """The next failure, after an exponential working time."""
        if self.config.failures_per_hour:
            key = stream_key(self._seed, "failure", replica.index)
            draw = float(uniforms([key], self._failures[replica.index])[0])
            replica.fails_at_busy_s = replica.busy_s - math.log(1.0 - draw) * 3600 / self.config.failures_per_hour

    def _fail(self, replica: Replica, now: float) -> None:
        """A replica dies: what it did not report is lost, its samples come back, and others take what waited."""
        replica.settle(now)
        running, waiting = [*replica.running, *replica.paused], list(replica.waiting)
        replica.remove([*running, *waiting])
        for job in [*running, *(job for job in waiting if job.done > job.reported)]:
            whole = job.reported + (job.done - job.reported) // self.config.report_every_tokens * self.config.report_every_tokens
            self.lost_tokens += job.done - whole
            job.done = whole
            self._report(job, now)
            self._outbox.append(Broken(now, job.sample.id, "the replica failed"))
            self._forget(job)
        self._failures[replica.index] += 1
        replica.stand_still(now, now + self.config.restart_s, lose_kv=True)
        self._draw_failure(replica)
        self._plan(replica, now)
        self._reroute([job for job in waiting if job.sample.id in self._jobs], replica, now)
        self._swap_if_quiet(now)

    def _reroute(self, jobs: list[Job], replica: Replica, now: float) -> None:
        for job in jobs:
            self._router.leave(job.group, replica.index)
            job.state, job.replica = "waiting", None
        self._place(jobs, now)

    # -- weights ------------------------------------------------------------------------------------------------------

    def update_weights(self, weights: Weights, version: Version, mode: UpdateMode = "drain") -> None:
        now = self._clock.now()
        self._run_until(now)
        self._next, self._rolling = version, deque()
        self._updates.clear()
        if mode == "rolling":
            self._rolling.extend(self.replicas[1:])
            self._drain(self.replicas[:1], now)
        elif mode == "drain":
            each = self.config.drain == "each"
            for replicas in [[replica] for replica in self.replicas] if each else [self.replicas]:
                self._drain(replicas, now)
        else:
            self._switch(mode, now)
        self._swap_if_quiet(now)

    def _switch(self, mode: UpdateMode, now: float) -> None:
        """New weights under running samples; what they have is reported first, with the weights that made it."""
        for replica in self.replicas:
            replica.settle(now)
        for job in self._jobs.values():
            self._report(job, now)
            if mode == "next_request" and job.replica is not None and (job.kv_kept or job.done > len(job.sample)):
                job.pinned = job.replica.version if job.pinned is None else job.pinned
            job.mixed = job.mixed or (mode == "keep_kv" and job.kv_kept)
        self._begin_swap(self._new_update(self.replicas), now, lose_kv=mode == "recompute")

    def _new_update(self, replicas: list[Replica]) -> int:
        self._num_updates += 1
        self._updates[self._num_updates] = Update(replicas)
        return self._num_updates

    def _drain(self, replicas: list[Replica], now: float) -> None:
        """What runs there finishes first; what waits goes on with the new weights."""
        key = self._new_update(replicas)
        for replica in replicas:
            replica.closed = True
            for job in (*replica.running, *replica.paused):
                job.update = key
                self._updates[key].jobs.add(job)
            for job in replica.waiting:
                job.update = 0
                self._report(job, now)
        if not self._updates[key].jobs:
            self._quiet.append(key)

    def _report(self, job: Job, now: float) -> None:
        if segment := self._segment(job):
            self._outbox.append(Progressed(now, job.sample.id, segment))

    def stand_still(self, seconds: float, lose_kv: bool) -> None:
        """The devices do something else for so long, such as training; then everything goes on."""
        now = self._clock.now()
        self._run_until(now)
        self._hold(self.replicas, now, seconds, lose_kv)

    def _hold(self, replicas: list[Replica], now: float, seconds: float, lose_kv: bool) -> None:
        for replica in replicas:
            replica.settle(now)
            replica.stand_still(now, now + seconds, lose_kv)
            self._look(replica, now)

    def _begin_swap(self, key: int, now: float, lose_kv: bool) -> None:
        update = self._updates[key]
        if self.costs.sync_s or lose_kv:
            self._hold(update.replicas, now, self.costs.sync_s, lose_kv)
        update.swap_s = now + self.costs.sync_s
        if self.costs.sync_s:
            heapq.heappush(self._heap, (update.swap_s, _SWAP, key, 0))
        else:
            self._swap(key, now)

    def _swap_if_quiet(self, now: float) -> None:
        while self._quiet:
            key = self._quiet.pop()
            if key in self._updates and self._updates[key].swap_s == float("inf"):
                self._begin_swap(key, now, lose_kv=False)

    def _swap(self, key: int, now: float) -> None:
        """The new weights are there, on those replicas that were to take them."""
        taken = self._updates.pop(key).replicas
        version = self._version if self._next is None else self._next
        for replica in taken:
            replica.version, replica.closed = version, False
        if self._rolling:
            self._drain([self._rolling.popleft()], now)
        elif not self._updates:
            self._version = version
        for replica in taken:
            replica.settle(now)
            self._look(replica, now)
        self._swap_if_quiet(now)

    # -- tokens -------------------------------------------------------------------------------------------------------

    def _segment(self, job: Job) -> Segment | None:
        """The tokens since the last report, which is now."""
        done = job.done if job.replica is None else job.replica.tokens_of(job)
        new, job.reported = done - job.reported, done
        if not new:
            return None
        sampler = "simulated+mixed-kv" if job.mixed else "simulated"
        version = self._version if job.replica is None else job.replica.version
        version = version if job.pinned is None else job.pinned
        return Segment(repeated(TOKEN, new), repeated(LOGPROB, new), version, sampler)
