"""Which samples an engine refuses, whatever it is made of."""

from __future__ import annotations

from collections.abc import Container, Sequence

from april.core.errors import EngineError
from april.core.ids import SampleId
from april.core.sample import Sample


def check_admission(samples: Sequence[Sample], live: Container[SampleId], max_sample_tokens: int) -> set[SampleId]:
    """The ids of one `submit` call, all of which may run.

    Args:
        samples: of the call.
        live: what the engine has already.
        max_sample_tokens: longest prompt plus response, as in `Caps`.

    Raises:
        EngineError: running already, given twice, finished, without budget, or without room for one more token.
    """
    seen: set[SampleId] = set()
    for sample in samples:
        tokens, problem = len(sample.prompt.token_ids) + len(sample), None
        if sample.id in live or sample.id in seen:
            problem = "it is running already"
        elif sample.stop is not None or sample.remaining_tokens < 1:
            problem = "nothing is left to generate"
        elif tokens >= max_sample_tokens:
            problem = f"{tokens} tokens leave no room in a context of {max_sample_tokens}"
        if problem:
            raise EngineError("a sample cannot be generated", where=str(sample.id), got=problem)
        seen.add(sample.id)
    return seen
