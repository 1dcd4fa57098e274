"""Scripted engines that hold more than one version of the weights, or whose speed depends on what they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from april.core.clock import Clock
from april.core.event import Finished
from april.core.ids import SampleId, Version
from april.core.sample import Sample, Segment
from april.engines.base import UpdateMode
from april.engines.scripted import ScriptedEngine


class VersionedEngine(ScriptedEngine):
    """Running samples stay on the weights they were submitted under ("next_request")."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.caps = replace(self.caps, update_modes=frozenset({"next_request", "drain"}))
        self.versions: dict[SampleId, Version] = {}

    def submit(self, samples: Sequence[Sample]) -> None:
        super().submit(samples)
        self.versions |= {sample.id: self._load.version for sample in samples}

    def update_weights(self, weights: Mapping[str, Any], version: Version, mode: UpdateMode = "drain") -> None:
        if mode == "next_request":
            self._load = replace(self._load, version=version)
        else:
            super().update_weights(weights, version, mode)

    def _segment(self, job: Any) -> Segment | None:
        segment = super()._segment(job)
        return segment if segment is None else replace(segment, version=self.versions[job.sample.id])


class RollingEngine(VersionedEngine):
    """Workers that drain and swap one after the other; new samples go to a worker that is not draining."""

    num_workers = 2

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.caps = replace(self.caps, update_modes=frozenset({"rolling", "drain"}))
        self.worker_of: dict[SampleId, int] = {}
        self.worker_version = [0] * self.num_workers
        self.target = 0
        self.least_serving = self.num_workers

    def submit(self, samples: Sequence[Sample]) -> None:
        super().submit(samples)
        draining = self._draining_worker()
        for sample in samples:
            free = [worker for worker in range(self.num_workers) if worker != draining]
            worker = min(free, key=lambda w: sum(self.worker_of[job] == w for job in self._jobs if job in self.worker_of))
            self.worker_of[sample.id] = worker
            self.versions[sample.id] = self.worker_version[worker]

    def update_weights(self, weights: Mapping[str, Any], version: Version, mode: UpdateMode = "drain") -> None:
        self.target = version
        self._roll()

    def abort(self, ids: Sequence[SampleId] | None = None) -> None:
        super().abort(ids)
        self._roll()

    def _draining_worker(self) -> int | None:
        return next((worker for worker, version in enumerate(self.worker_version) if version < self.target), None)

    def _roll(self) -> None:
        while (worker := self._draining_worker()) is not None:
            if any(self.worker_of[job] == worker for job in self._jobs):
                self.least_serving = min(self.least_serving, self.num_workers - 1)
                return
            self.worker_version[worker] = self.target
        self._load = replace(self._load, version=self.target)

    def _tick(self) -> None:
        super()._tick()
        self._roll()


class CostlyEngine(ScriptedEngine):
    """A decode step takes base_s + row_s x running + context_s x tokens of context; KV memory preempts the youngest.

    A resumed or preempted sample is first computed again, at prefill_s a token.
    """

    base_s, row_s, context_s, prefill_s = 8e-3, 1e-4, 2e-8, 1.5e-5
    kv_capacity = 1 << 40

    def __init__(self, replies: Any, clock: Clock, **more: Any) -> None:
        super().__init__(replies, clock, **{"tick_s": self.base_s, "report_every_tokens": 1 << 30, **more})
        self.caps = replace(self.caps, kv_tokens=self.kv_capacity)
        self.resident: dict[SampleId, int] = {}
        self.computed_s = 0.0

    def _tick(self) -> None:
        jobs = list(self._jobs.values())[: self.caps.max_running]
        used, held = 0, []
        for job in jobs:
            context = len(job.sample.prompt.token_ids) + job.position + 1
            if used + context > self.kv_capacity and held:
                break
            used += context
            held.append(job)
        kept = {job.sample.id for job in held}
        lost = [sample for sample in self.resident if sample in self._jobs and sample not in kept]
        entering = [job for job in held if job.sample.id not in self.resident]
        prefill = sum(len(job.sample.prompt.token_ids) + job.position for job in entering)
        self.resident = {job.sample.id: 1 for job in held}
        self._tick_s = self.base_s + self.row_s * len(held) + self.context_s * used + self.prefill_s * prefill
        everything, self._jobs = self._jobs, {job.sample.id: job for job in held}
        super()._tick()
        ended = kept - self._jobs.keys()
        self._jobs = {sample: job for sample, job in everything.items() if sample not in ended}
        self._load = replace(
            self._load, preemptions=self._load.preemptions + len(lost), prefill_tokens=self._load.prefill_tokens + prefill
        )


def finished_order(entries: Sequence[Any]) -> list[SampleId]:
    """Ids of finished samples, as a tape saw them."""
    return [entry[2] for entry in entries if entry[0] == Finished.__name__]
