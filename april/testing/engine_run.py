"""Running an engine by hand: feed samples, collect events, check what holds for every engine at every event."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from april.core.errors import DataError
from april.core.event import Broken, Event, Finished, Parked, Progressed
from april.core.ids import SampleId
from april.core.sample import Sample, Segment
from april.engines.base import Engine

_MAX_POLLS = 100_000


class ContractViolation(AssertionError):
    """An engine broke a line of its contract."""


def require(holds: bool, sentence: str, got: object = None) -> None:
    """Raise unless the contract's sentence holds."""
    if not holds:
        raise ContractViolation(sentence if got is None else f"{sentence}; got {got!r}")


def cut(sample: Sample, num_tokens: int) -> Sample:
    """The sample as it was when it had this many response tokens."""
    spans = tuple(span._replace(end=min(span.end, num_tokens)) for span in sample.spans if span.start < num_tokens)
    return replace(
        sample,
        token_ids=sample.token_ids[:num_tokens],
        behaviour_logprobs=sample.behaviour_logprobs[:num_tokens],
        loss_mask=sample.loss_mask[:num_tokens],
        entropies=None if sample.entropies is None else sample.entropies[:num_tokens],
        routes=None if sample.routes is None else sample.routes[:num_tokens],
        spans=spans,
        stop=None,
    )


def _complete(sample: Sample) -> bool:
    """Whether the sample's own tokens end it."""
    last = int(sample.token_ids[-1]) if len(sample) else None
    return sample.remaining_tokens == 0 or last in sample.spec.stop_token_ids


@dataclass
class EngineRun:
    """One engine and everything it has reported.

    Attributes:
        engine: under test.
        advance: called before every poll; an engine on a virtual clock moves its clock here.
        samples: by id, extended by every reported segment.
        open: ids that wait for their terminal event.
        ends: terminal events, in order.
        segments: every reported segment, in order.
    """

    engine: Engine
    advance: Callable[[Engine], None] = lambda engine: None
    samples: dict[SampleId, Sample] = field(default_factory=dict)
    open: set[SampleId] = field(default_factory=set)
    ends: list[Finished | Parked | Broken] = field(default_factory=list)
    segments: list[tuple[SampleId, Segment]] = field(default_factory=list)
    _time_s: float = float("-inf")

    def submit(self, samples: Sequence[Sample]) -> None:
        """Submit and keep account."""
        self.engine.submit(samples)
        for sample in samples:
            self.samples[sample.id] = sample
            self.open.add(sample.id)

    def poll(self) -> list[Event]:
        """One poll, checked and booked."""
        self.advance(self.engine)
        events = self.engine.poll()
        for event in events:
            self._book(event)
        return events

    def _book(self, event: Event) -> None:
        if not isinstance(event, Progressed | Parked | Finished | Broken):
            raise ContractViolation(f"an engine reports tokens and ends of samples only; got {event!r}")
        require(event.id in self.open, "only a submitted sample without a terminal event is reported", event)
        require(event.time_s >= self._time_s, "times of events do not decrease", event.time_s)
        self._time_s = event.time_s
        if not isinstance(event, Broken) and event.segment is not None:
            require(len(event.segment) > 0, "a reported segment is not empty", event)
            require(bool(np.isfinite(event.segment.logprobs).all()), "each token has a finite log-prob", event)
            self.segments.append((event.id, event.segment))
            try:
                self.samples[event.id] = self.samples[event.id].extended(event.segment)
            except DataError as error:
                raise ContractViolation(f"a segment continues its sample; {error}") from error
        if isinstance(event, Finished):
            self.samples[event.id] = self.samples[event.id].finished(event.stop)
        if isinstance(event, Parked):
            require(not _complete(self.samples[event.id]), "a finish wins over an abort of the same tick", event)
        if not isinstance(event, Progressed):
            self.open.remove(event.id)
            self.ends.append(event)

    def until(self, done: Callable[[], bool]) -> None:
        """Poll until `done`, or fail when the engine goes quiet before."""
        for _ in range(_MAX_POLLS):
            if done():
                return
            require(
                self.engine.ready_at() is not None, "an engine with open samples is ready at some time", self.engine.pending()
            )
            self.poll()
        raise ContractViolation(f"an engine did not get done in {_MAX_POLLS} polls; open: {sorted(self.open)}")

    def drain(self) -> None:
        """Poll until every submitted sample has ended; then the engine must be quiet."""
        self.until(lambda: not self.open)
        load = self.engine.load()
        require((load.running, load.waiting) == (0, 0), "an engine without open samples runs nothing", load)

    def until_tokens(self, num_tokens: int) -> None:
        """Poll until so many tokens were sampled, or all samples have ended."""
        self.until(lambda: not self.open or self.engine.load().generated_tokens >= num_tokens)

    def results(self, samples: Iterable[Sample]) -> list[Sample]:
        """These samples as they are now."""
        return [self.samples[sample.id] for sample in samples]


def same_tokens(left: Sequence[Sample], right: Sequence[Sample], tolerance: float) -> None:
    """Require equal tokens and ends, and log-probs within the tolerance."""
    for a, b in zip(left, right, strict=True):
        require(a.token_ids.tolist() == b.token_ids.tolist(), f"{a.id}: tokens are equal", (a.token_ids, b.token_ids))
        require(a.stop == b.stop, f"{a.id}: reasons of the end are equal", (a.stop, b.stop))
        worst = float(np.abs(a.behaviour_logprobs - b.behaviour_logprobs).max(initial=0.0))
        require(worst <= tolerance, f"{a.id}: log-probs are equal within {tolerance}", worst)
