"""One sample inside vLLM: what was asked, and what has come that is not reported yet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from april.core.ids import SampleId, Version
from april.core.random import sample_key, stream_key
from april.core.sample import Sample, Segment


class Request:
    """A sample's life in the engine.

    Attributes:
        key: vLLM's name of it.
        sample: as submitted.
        context: prompt and response tokens that were given.
        started: whether any reply has come.
        mixed_kv: whether its KV was made by more than one version.
        num_sampled: tokens sampled in this life.
    """

    def __init__(self, key: str, sample: Sample) -> None:
        self.key, self.sample = key, sample
        self.context = np.concatenate([sample.prompt.token_ids, sample.token_ids])
        self.started = self.mixed_kv = False
        self.num_sampled = 0
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._entropies: list[float] | None = [] if sample.spec.entropy else None
        self._response = sample.token_ids.tolist()

    @property
    def id(self) -> SampleId:
        """The sample's name."""
        return self.sample.id

    @property
    def num_unreported(self) -> int:
        """Tokens that no segment has carried yet."""
        return len(self._tokens)

    def extend(self, token_ids: Sequence[int], logprobs: Sequence[Mapping[int, Any]]) -> int:
        """Add sampled tokens with vLLM's table of log-probs of each position; returns how many."""
        for token, table in zip(token_ids, logprobs, strict=True):
            self._tokens.append(int(token))
            self._response.append(int(token))
            self._logprobs.append(min(0.0, float(table[token].logprob)))
            if self._entropies is not None:
                self._entropies.append(_entropy([float(entry.logprob) for entry in table.values()]))
        self.num_sampled += len(token_ids)
        return len(token_ids)

    def tail(self, num_tokens: int) -> list[int]:
        """The last response tokens, given ones included."""
        return self._response[-num_tokens:]

    def take(self, version: Version, sampler: str) -> Segment | None:
        """What no segment has carried yet, as one."""
        if not self._tokens:
            return None
        entropies = None if self._entropies is None else np.asarray(self._entropies, np.float32)
        segment = Segment(np.asarray(self._tokens, np.int32), np.asarray(self._logprobs, np.float32), version, sampler, entropies)
        self._tokens, self._logprobs = [], []
        self._entropies = None if self._entropies is None else []
        return segment


def sampling_params(sample: Sample, context_tokens: int, *, seeded: bool) -> Any:
    """vLLM's parameters for what is left of a sample.

    A seeded stream belongs to the sample and to the position where this life begins, so a resumed or forked sample does not
    draw the same numbers again.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    spec, length = sample.spec, len(sample.prompt.token_ids) + len(sample)
    seed = stream_key(sample_key(spec.seed, sample.id), len(sample)) % (1 << 31) if seeded and spec.temperature > 0 else None
    return SamplingParams(
        temperature=spec.temperature,
        top_p=spec.top_p,
        top_k=spec.top_k,
        seed=seed,
        max_tokens=min(sample.remaining_tokens, context_tokens - length),
        logprobs=-1 if spec.entropy else 0,
        stop_token_ids=list(spec.stop_token_ids),
        ignore_eos=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _entropy(logprobs: Sequence[float]) -> float:
    return -math.fsum(math.exp(value) * value for value in logprobs if value > -math.inf)
