"""Samples and a clock for the tests of rewards."""

from collections.abc import Mapping
from typing import Any

from april.core.ids import SampleId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec


def sample_of(item: Mapping[str, Any] | None = None, member: int = 0, text: str = "", stop: Any = "eos") -> Sample:
    """A finished sample whose response is `text`, one token a byte."""
    ids = list(text.encode())
    prompt = Prompt("p", [1], "", {"question": "?", "answer": "42"} if item is None else item)
    segment_spec = SamplingSpec(max_new_tokens=max(1, len(ids)))
    empty = Sample(SampleId(0, 0, "p", member), prompt, segment_spec)
    if ids:
        from april.core.sample import Segment

        empty = empty.extended(Segment(ids, [-0.5] * len(ids), 0))
    return empty if stop is None else empty.finished(stop)


def decode(token_ids: Any) -> str:
    """The inverse of `sample_of`."""
    return bytes(int(token) for token in token_ids).decode()
