"""Everything a run writes for its readers: metrics, evaluations, transcripts, the timeline, the live view."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from april.algorithms.advice import notes
from april.core.clock import Clock
from april.core.event import Event, Finished, Judged, Parked
from april.core.group import Batch, Group
from april.core.ids import GroupId, SampleId
from april.engines.base import Load
from april.observe.console import RunView
from april.observe.environment import describe_environment
from april.observe.recorder import Recorder
from april.observe.sinks import JsonlSink, Sink, Sinks, TensorBoardSink, read_jsonl, read_lines
from april.observe.trace import Timeline
from april.rollout.driver import Driver
from april.rollout.measure import describe_batch
from april.rollout.view import Status
from april.run.evaluate import Evaluation

NOTE_EVERY_STEPS = 20
"""Steps before the console says the same thing again."""
_COUNTERS = (
    "prefill_tokens", "shared_tokens", "forked_tokens", "resumed_tokens", "preemptions", "drafted_tokens", "accepted_tokens",
)  # fmt: skip
_ENDS = (Status.TRAINED, Status.FILTERED, Status.EVICTED, Status.FAILED)


class TimelineWatcher:
    """Draws sample lifetimes and the number of running samples from the driver's events."""

    def __init__(self, timeline: Timeline) -> None:
        self.timeline = timeline
        self._running = 0

    def on_start(self, samples: Sequence[SampleId], time_s: float) -> None:
        for sample in samples:
            self.timeline.begin(str(sample), "running", time_s)
        self._count(len(samples), time_s)

    def on_event(self, event: Event) -> None:
        match event:
            case Parked():
                self.timeline.begin(str(event.id), "parked", event.time_s)
                self._count(-1, event.time_s)
            case Finished():
                self.timeline.begin(str(event.id), "scoring", event.time_s)
                self._count(-1, event.time_s)
            case Judged():
                self.timeline.end(str(event.id), event.time_s)
            case _:
                pass

    def _count(self, change: int, time_s: float) -> None:
        self._running += change
        self.timeline.counter("running", self._running, time_s)


class Telemetry:
    """The writers of one run folder.

    Args:
        folder: the run's; continued when it has records already.
        clock: the run's clock.
        title, steps: for the live view.
        first_step: the next one; what the folder has of it and of later ones is dropped, for they are done again.
        decode: token ids to text.
        quiet: one line a step instead of the live view; None: nothing at all.
        clips_samples: whether the algorithm's bounds take or leave whole samples, for the notes.
    """

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        *,
        title: str,
        steps: int,
        first_step: int,
        decode: Any,
        observe: Any,
        quiet: bool | None,
        clips_samples: bool = False,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._clock = folder, clock
        sinks: list[Sink] = [JsonlSink(folder / "metrics.jsonl")]
        if observe.tensorboard:
            sinks.append(TensorBoardSink(folder / "tensorboard"))
        self.metrics = Sinks(sinks)
        self.evaluations = JsonlSink(folder / "evaluations.jsonl")
        self._lengths = JsonlSink(folder / "lengths.jsonl")
        self._transcripts = JsonlSink(folder / "transcripts.jsonl")
        self.timeline = Timeline(folder / "timeline.jsonl" if observe.timeline else None, clock)
        self._forget_from(first_step)
        rows = read_jsonl(folder / "metrics.jsonl")
        self._known_steps = {int(row["step"]) for row in rows}
        self.timeline.offset_s = self.offset_s = recorded_s(folder)
        self.timeline.step = first_step
        self._tokens_generated = int(rows[-1].get("tokens_generated") or 0) if rows else 0
        every = observe.transcripts_every_steps
        self.recorder = Recorder(self._transcripts, decode, num_groups=observe.transcript_groups, every=max(1, every))
        self.evaluation_recorder = Recorder(self._transcripts, decode, num_groups=3)
        self._record_transcripts = every > 0
        self._noted: dict[str, int] = {}
        self._clips_samples = clips_samples
        self.watcher = TimelineWatcher(self.timeline)
        mode: Any = "silent" if quiet is None else "auto"
        self.view = RunView(title, steps, first_step=first_step, quiet=bool(quiet), mode=mode)

    def _forget_from(self, step: int) -> None:
        """Drop the records of this step and of later ones; an evaluation of the same number came before the step."""
        self.metrics.truncate_from(step)
        self._lengths.truncate_from(step)
        self.evaluations.truncate_from(step + 1)
        self._transcripts.keep_if(lambda record: record.get("step", 0) < step + (record.get("source") == "evaluation"))
        self.timeline.truncate_from(step + 1)  # what ran before the step was cut has taken its time

    def environment(self) -> None:
        """Note versions and devices."""
        (self.folder / "environment.json").write_text(json.dumps(describe_environment(), indent=1, default=str) + "\n")

    def now(self) -> float:
        """Seconds of the whole run, those before a restart included."""
        return self._clock.now() + self.offset_s

    def evaluated(self, evaluation: Evaluation, step: int) -> dict[str, Any]:
        """Write an evaluation down and show it."""
        record = evaluation.to_record(step, self.now())
        self.evaluations.write(record)
        self.view.evaluation(record)
        if self._record_transcripts and evaluation.mode == "sampled":
            self._evaluation_transcripts(evaluation, step)
        return record

    def _evaluation_transcripts(self, evaluation: Evaluation, step: int) -> None:
        per_problem = evaluation.correct.shape[1]
        longest = np.argsort([-len(sample.prompt.token_ids) for sample in evaluation.samples[::per_problem]], kind="stable")
        groups = []
        for problem in longest[len(longest) // 4 :: max(1, len(longest) // 4)][:3]:
            at = int(problem) * per_problem
            members = evaluation.samples[at : at + per_problem]
            group = GroupId(*members[0].id[:3])
            groups.append(Group(group, members, evaluation.outcomes[at : at + per_problem]))
        self.evaluation_recorder.record(step, groups, evaluation.version, source="evaluation")

    def trained(self, batch: Batch, row: dict[str, Any]) -> None:
        """Write a step down, once, and show it."""
        if batch.step in self._known_steps:
            return
        self._known_steps.add(batch.step)
        self.metrics.write(row)
        self.timeline.step = batch.step + 1
        self.timeline.counter("parked", row["parked_samples"])
        self.timeline.flush()
        self.view.step(row)
        for kind, text in notes(row, clips_samples=self._clips_samples):
            if batch.step - self._noted.get(kind, -NOTE_EVERY_STEPS) >= NOTE_EVERY_STEPS:
                self._noted[kind] = batch.step
                self.view.note(f"step {batch.step + 1}: {text}")
        self._lengths.write_all([lengths_of(batch.step, group) for group in batch.groups])
        if self._record_transcripts:
            self.recorder.record(batch.step, batch.groups, batch.version)

    def row(
        self, batch: Batch, driver: Driver, learned: dict[str, float], seconds: dict[str, float], before: Load
    ) -> dict[str, Any]:
        """One line of metrics.jsonl."""
        pool, load = driver.pool, driver.engine.load()
        waiting = {group: state.waiting for group, state in pool.groups.items()}
        open_lengths = [len(pool[group.member(m)]) for group, members in waiting.items() for m in members]
        open_lengths += [len(pool[sample]) for sample in pool.running]
        issued = driver.lengths.issued_mean_tokens(np.array(open_lengths, np.int64))
        delivered = driver.lengths.delivered_mean_tokens
        generated, step_s = load.generated_tokens - before.generated_tokens, sum(seconds.values())
        # in one process an update stops the engine; parts in other processes work at the same time
        engine_s = step_s if "overlap_tokens" in learned else step_s - seconds.get("train_s", 0.0)
        counts = pool.ledger.counts
        self._tokens_generated += generated
        return {
            "step": batch.step,
            "version": batch.version + 1,
            "time_s": self.now(),
            **seconds,
            "step_s": step_s,
            "engine_s": engine_s,
            **describe_batch(batch),
            "delivered_mean_tokens": delivered,
            "issued_mean_tokens": issued,
            "length_bias": delivered / issued if issued else float("nan"),
            "parked_groups": sum(any(len(state.samples[m]) for m in state.waiting) for state in pool.groups.values()),
            "parked_samples": counts[Status.PARKED],
            "ready_groups": len(pool.ready),
            "parked_total": pool.ledger.parked_total,
            "resumed_total": pool.ledger.resumed_total,
            **{f"{status}_total": counts[status] for status in _ENDS},
            "issued_total": pool.ledger.issued,
            "ledger_balanced": pool.ledger.balanced,
            "tokens_generated": self._tokens_generated,
            "step_tokens_generated": generated,
            "tokens_per_s": generated / engine_s if engine_s else float("nan"),
            "idle_fraction": max(0.0, 1 - (load.slot_s - before.slot_s) / engine_s) if engine_s else float("nan"),
            **{name: getattr(load, name) - getattr(before, name) for name in _COUNTERS},
            "speculation": load.speculation,
            **learned,
        }

    def close(self) -> None:
        self.timeline.close()
        self.metrics.close()
        self.evaluations.close()
        self._transcripts.close()
        self._lengths.close()


def recorded_s(folder: Path) -> float:
    """The latest second that the records of a run speak of; 0 where there are none."""
    records = (record for name in ("metrics", "evaluations", "timeline") for record in read_lines(folder / f"{name}.jsonl"))
    return max((float(record.get("end_s", record.get("time_s", 0.0))) for record in records), default=0.0)


def lengths_of(step: int, group: Group) -> dict[str, Any]:
    """How long the answers of a trained group were: what a simulation replays."""
    return {
        "step": step,
        "serial": group.id.serial,
        "epoch": group.id.epoch,
        "prompt": group.id.prompt,
        "prompt_tokens": len(group.prompt.token_ids),
        "tokens": [len(sample) for sample in group.sampled.samples],
        "stops": [sample.stop for sample in group.sampled.samples],
    }
