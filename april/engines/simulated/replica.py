"""One replica: a batch that decodes in lockstep, its KV memory and its queue, moved from event to event.

    waiting --admit (prefill)--> running --finish--> ended
       ^                           | |
       `------- preempt -----------' `--tool call--> paused --> waiting (in front)

All running sequences take one step together, so a sequence admitted at step a with r tokens to go ends at step a + r, whatever
joins or leaves meanwhile; only the time of a step changes. Between two events nothing changes but the contexts' lengths, and
`EngineCosts.steps_s` gives the time of all those steps at once.
"""

from __future__ import annotations

import heapq
from collections import deque
from typing import Literal

from april.core.ids import GroupId, Version
from april.core.sample import Sample
from april.engines.simulated.costs import EngineCosts
from april.engines.simulated.course import Course

Why = Literal["step", "failure"]
WATERMARK_FRACTION = 0.01
"""Share of the KV memory that an admission leaves free, so that the next steps do not preempt at once."""


class Job:
    """One sample in the engine, from its submission to its terminal event.

    Attributes:
        total: response tokens at which it ends.
        done: response tokens when it was last admitted or stopped.
        reported: response tokens that the driver knows of.
        target: step of the replica at which it ends or pauses next.
        kv_kept: whether its KV is still there while it does not run.
        mixed: whether it decodes on KV of older weights.
        update: number of the weight update that waits for it; 0: none ever did.
        pinned: the version it stays on; None: that of its replica.
    """

    __slots__ = (
        "admitted",
        "course",
        "done",
        "group",
        "kv_kept",
        "mixed",
        "pinned",
        "prompt_tokens",
        "replica",
        "reported",
        "sample",
        "state",
        "target",
        "total",
        "update",
    )

    def __init__(self, sample: Sample, course: Course, total: int) -> None:
        self.sample, self.course, self.total = sample, course, total
        self.group: GroupId = sample.id.group
        self.prompt_tokens = len(sample.prompt.token_ids)
        self.done = self.reported = len(sample)
        self.admitted = self.target = 0
        self.state: Literal["waiting", "running", "paused", "gone"] = "waiting"
        self.kv_kept = self.mixed = False
        self.update = 0
        self.replica: Replica | None = None
        self.pinned: Version | None = None

    @property
    def context(self) -> int:
        """Tokens of prompt and response as of the last stop."""
        return self.prompt_tokens + self.done

    def next_stop(self) -> tuple[int, float]:
        """(response tokens at the next stop, seconds of the pause there; 0 at the end)."""
        for position, pause_s in self.course.pauses:
            if self.done < position < self.total:
                return position, pause_s
        return self.total, 0.0


class Replica:
    """State of one model replica in virtual time.

    Attributes:
        due_s: when something happens next; None while nothing runs.
        closed: no admissions: a weight update is waiting for running samples.
        version: weights of the next token, but for samples that are pinned.
        free_s: it stands still until then (weight sync, restart).
    """

    def __init__(self, index: int, costs: EngineCosts, shares_prefix: bool) -> None:
        self.index, self.costs, self.shares_prefix = index, costs, shares_prefix
        self.running: dict[Job, None] = {}
        self.paused: dict[Job, None] = {}
        self.waiting: deque[Job] = deque()
        self.step = 0
        self.start_s = self.free_s = self._counted_s = 0.0
        self.due_s: float | None = None
        self.why: Why = "step"
        self._due_steps = 0
        self._stops: list[tuple[int, int, Job]] = []
        self._stop_number = 0
        self.read_tokens = self.held_tokens = 0
        self._holders: dict[GroupId, int] = {}
        self._num_idle_kv = 0
        self.closed = False
        self.version: Version = 0
        self.fails_at_busy_s = float("inf")
        self.busy_s = self.slot_s = 0.0
        self.generated = self.prefilled = self.shared = self.preemptions = 0

    # -- time ---------------------------------------------------------------------------------------------------------

    def settle(self, now: float) -> None:
        """Take every whole step that has ended by now; the step that is under way goes on."""
        if self.running:
            within = self.costs.steps_within(len(self.running), self.read_tokens, now - self.start_s, self._due_steps)
            if within:
                self._take(within, self.start_s + self.costs.steps_s(len(self.running), self.read_tokens, within))
        self._count(now)

    def _take(self, num_steps: int, end_s: float) -> None:
        tokens = num_steps * len(self.running)
        self.step += num_steps
        self._due_steps -= num_steps
        self.read_tokens += tokens
        self.held_tokens += tokens
        self.generated += tokens
        self.start_s = end_s

    def _count(self, now: float) -> None:
        seconds = now - self._counted_s
        if seconds > 0:
            if self.running:
                self.busy_s += seconds
                self.slot_s += seconds * len(self.running)
            self._counted_s = now

    def on_due(self) -> list[Job]:
        """Whatever was due: ends the sequences whose stop has come (they are returned), makes room, and admits.

        Paused ones are among those returned, with the state "paused".
        """
        now = self.due_s if self.due_s is not None else self.start_s
        self._count(now)
        if self._due_steps > 0:
            self._take(self._due_steps, now)
        stopped = []
        while self._stops and self._stops[0][0] <= self.step:
            _, _, job = heapq.heappop(self._stops)
            if job.state == "running" and job.target <= self.step:
                self._leave(job, "paused" if job.target - job.admitted + job.done < job.total else "gone")
                stopped.append(job)
        return stopped

    def plan(self, now: float) -> None:
        """Make room, admit what fits, and see what happens next."""
        self._make_room()
        self._admit(now)
        batch = len(self.running)
        if not batch:
            self.due_s = None
            return
        while self._stops[0][2].state != "running" or self._stops[0][2].target != self._stops[0][0]:
            heapq.heappop(self._stops)
        steps = self._stops[0][0] - self.step
        room = (self.costs.kv_tokens - self.held_tokens) // batch
        if 0 < room < steps:
            steps = room
        self._due_at(steps)

    def at_next_boundary(self) -> None:
        """Something waits to be admitted: look when the step under way ends."""
        if self.running:
            self._due_at(1)

    def _due_at(self, steps: int) -> None:
        self._due_steps, self.why = steps, "step"
        self.due_s = self.start_s + self.costs.steps_s(len(self.running), self.read_tokens, steps)
        failure_s = self._counted_s + self.fails_at_busy_s - self.busy_s
        if failure_s < self.due_s:
            self.due_s, self.why = failure_s, "failure"

    # -- admission and memory -----------------------------------------------------------------------------------------

    def _admit(self, now: float) -> None:
        if not self.running:
            self.start_s = max(now, self.free_s)
        prefill_s = 0.0
        while self.waiting and len(self.running) < self.costs.max_running:
            job = self.waiting[0]
            if self.closed and not job.update:
                break
            wanted = 0 if job.kv_kept else self._missing(job)
            spare = self.costs.kv_tokens * (1 - WATERMARK_FRACTION) - self.held_tokens - len(self.running) - 1
            if wanted > spare and self.running:
                break
            if wanted > spare and self._evict_paused():
                continue
            self.waiting.popleft()
            prefill_s += self._enter(job, wanted)
        self.start_s += prefill_s + (self.costs.admission_s if prefill_s > 0 else 0.0)

    def _enter(self, job: Job, wanted: int) -> float:
        """Put a sequence into the batch; gives the seconds of its prefill."""
        prefill_s = 0.0
        if not job.kv_kept:
            self._hold(job, 1)
            self.held_tokens += wanted
            self.shared += job.context - wanted
            self.prefilled += wanted
            prefill_s = self.costs.admit_s + self.costs.prefill_s(wanted)
            job.mixed = False
        else:
            self._num_idle_kv -= 1
        job.kv_kept, job.state = True, "running"
        self.running[job] = None
        self.read_tokens += job.context
        job.admitted = self.step
        job.target = self.step + job.next_stop()[0] - job.done
        self._stop_number += 1
        heapq.heappush(self._stops, (job.target, self._stop_number, job))
        return prefill_s

    def _missing(self, job: Job) -> int:
        """Tokens whose KV the replica does not hold."""
        shared = self.shares_prefix and self._holders.get(job.group, 0) > 0
        return job.context - (job.prompt_tokens if shared else 0)

    def _hold(self, job: Job, change: int) -> int:
        count = self._holders.get(job.group, 0) + change
        if count:
            self._holders[job.group] = count
        else:
            del self._holders[job.group]
        return count

    def _make_room(self) -> None:
        """Before the next step: pauses lose their KV first, then the sequence that was admitted last."""
        while len(self.running) > 1 and self.held_tokens + len(self.running) > self.costs.kv_tokens:
            if self._evict_paused():
                continue
            job = next(reversed(self.running))
            self._leave(job, "waiting")
            self.free(job)
            self.preemptions += 1
            self.waiting.appendleft(job)

    def _evict_paused(self) -> bool:
        """One that does not run loses its KV; False when none of them has any."""
        if not self._num_idle_kv:
            return False
        for job in (*self.paused, *self.waiting):
            if job.kv_kept:
                self.free(job)
                return True
        return False

    def free(self, job: Job) -> None:
        """A sequence that does not run gives its KV back."""
        if job.kv_kept:
            job.kv_kept = False
            self._num_idle_kv -= 1
            left = self._hold(job, -1)
            self.held_tokens -= job.context - (job.prompt_tokens if self.shares_prefix and left else 0)

    def _leave(self, job: Job, state: Literal["waiting", "paused", "gone"]) -> None:
        """Take a sequence out of the batch; its KV stays until it is freed."""
        self.read_tokens -= job.prompt_tokens + self.tokens_of(job)
        job.done = self.tokens_of(job)
        job.state = state
        del self.running[job]
        self._num_idle_kv += 1
        if state == "paused":
            self.paused[job] = None
        elif state == "gone":
            self.free(job)

    def tokens_of(self, job: Job) -> int:
        """Response tokens that a sequence has now (as of the last settled step)."""
        return job.done + self.step - job.admitted if job.state == "running" else job.done

    # -- what the engine does to it -----------------------------------------------------------------------------------

    def wake(self, job: Job) -> None:
        """A tool call is over: the sequence goes on before those that wait."""
        del self.paused[job]
        job.state = "waiting"
        self.waiting.appendleft(job)

    def remove(self, jobs: list[Job]) -> None:
        """Take sequences out, after `settle`; the step that is under way ends when it would have ended."""
        ends_s = self.start_s + self.costs.step_s(len(self.running), self.read_tokens) if self.running else 0.0
        for job in jobs:
            if job.state == "running":
                self._leave(job, "gone")
                continue
            if job.state == "paused":
                del self.paused[job]
            self.free(job)
            job.state = "gone"
        if self.waiting:
            self.waiting = deque(job for job in self.waiting if job.state != "gone")
        if self.running:
            self.start_s = ends_s - self.costs.step_s(len(self.running), self.read_tokens)

    def stand_still(self, now: float, until_s: float, lose_kv: bool) -> None:
        """No work between now and then, after `settle`; with `lose_kv` every running sequence is prefilled again."""
        self.free_s = max(self.free_s, until_s)
        self._counted_s = max(self._counted_s, until_s)
        if lose_kv:
            for job in (*self.paused, *self.waiting):
                self.free(job)
        if not self.running:
            return
        self.start_s = until_s
        if lose_kv:
            for job in self.running:
                context = job.prompt_tokens + self.tokens_of(job)
                self.prefilled += context
                self.start_s += self.costs.prefill_s(context)
                job.mixed = False
