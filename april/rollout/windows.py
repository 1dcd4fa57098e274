"""Windows: a sample that may generate only so many tokens now, and goes on later.

The engine is asked for a response that ends with the window. What comes back as ended by its length, at that very token, was
parked and not finished. So a window is exact to the token under any engine, and needs no abort.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from april.core.event import Broken, Event, Finished, Parked
from april.core.ids import SampleId
from april.core.sample import Sample
from april.engines.base import Caps
from april.rollout.pool import Pool


class Windows:
    """The open windows of running samples."""

    def __init__(self, caps: Caps) -> None:
        self._caps = caps
        self._ends: dict[SampleId, int] = {}

    def opened(self, samples: Sequence[Sample], window_tokens: int | None) -> list[Sample]:
        """What the engine is given: the samples, their budgets cut to the window where it ends before they would."""
        return list(samples) if window_tokens is None else [self._opened(sample, window_tokens) for sample in samples]

    def _opened(self, sample: Sample, window_tokens: int) -> Sample:
        end = len(sample) + window_tokens
        if end >= sample.spec.max_new_tokens or len(sample.prompt.token_ids) + end >= self._caps.max_sample_tokens:
            return sample
        self._ends[sample.id] = end
        return replace(sample, spec=replace(sample.spec, max_new_tokens=end))

    def closed(self, event: Event, pool: Pool) -> Event:
        """The event as it is meant: a sample that ended with its window was parked."""
        if not self._ends or not isinstance(event, Finished | Parked | Broken):
            return event
        end = self._ends.pop(event.id, None)
        if end is None or not isinstance(event, Finished) or event.stop != "length":
            return event
        new_tokens = 0 if event.segment is None else len(event.segment)
        if len(pool[event.id]) + new_tokens < end:
            return event
        return Parked(event.time_s, event.id, event.segment)
