"""One sample inside vLLM: what was asked, and what has come that is not reported yet."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from april.core.errors import EngineError
from april.core.ids import SampleId, Version
from april.core.random import sample_key, stream_key
from april.core.sample import Sample, Segment
from april.engines.embedded.check import check_sample


@dataclass(frozen=True, slots=True)
class Settings:
    """What one vLLM can do, and how its requests are made.

    Attributes:
        context_tokens: longest prompt plus response of the model.
        row_tokens: that also fits the KV memory.
        vocab_size: tokens are below it.
        largest_entropy_vocabulary: exact entropies need the log-probs of all tokens at every position; beyond so many they
            cost more than the step.
        entropy_top_k: likely tokens that entropies are estimated from; 0 asks for exact ones.
        has_tokenizer: whether stop strings can be looked for.
        seeded: whether each sample has a random stream of its own.
    """

    context_tokens: int
    row_tokens: int
    vocab_size: int
    largest_entropy_vocabulary: int
    entropy_top_k: int
    has_tokenizer: bool
    seeded: bool

    @property
    def exact_entropies(self) -> bool:
        """Whether entropies are those of the whole distribution."""
        return self.entropy_top_k == 0 and self.vocab_size <= self.largest_entropy_vocabulary

    def check(self, sample: Sample) -> None:
        """Refuse what vLLM cannot do for this sample.

        Raises:
            EngineError: it can never run, or asks for entropies or temperatures that vLLM has not.
        """
        check_sample(
            sample,
            context_tokens=self.context_tokens,
            row_tokens=self.row_tokens,
            vocab_size=self.vocab_size,
            has_tokenizer=self.has_tokenizer,
        )
        if sample.spec.entropy and not self.exact_entropies and self.entropy_top_k == 0:
            raise EngineError(
                "exact entropies are not recorded by vLLM for a vocabulary of this size",
                where="sampling.entropy",
                got=self.vocab_size,
                expected=f"at most {self.largest_entropy_vocabulary} tokens",
                hint='engine.entropy_top_k = 64 records estimates; or set sampling.entropy = false, or engine.type = "embedded"',
            )
        if sample.spec.adaptive is not None:
            raise EngineError(
                "vLLM draws all tokens of a sample at one temperature",
                where="sampling.adaptive_temperature",
                got=sample.spec.adaptive.strength,
                expected="0",
                hint='set sampling.adaptive_temperature = 0, or engine.type = "embedded"',
            )


class Request:
    """A sample's life in the engine, or a part of it.

    Attributes:
        serial: earlier requests go first when KV memory runs out.
        key: vLLM's name of it.
        sample: as submitted.
        context: prompt and response tokens that were given.
        started: whether any reply has come.
        mixed_kv: whether its KV was made by more than one version.
        num_sampled: tokens sampled in this life.
    """

    def __init__(self, serial: int, sample: Sample, owner: str = "april") -> None:
        self.serial, self.key, self.sample = serial, f"{owner}-{serial}", sample
        self.context = np.concatenate([sample.prompt.token_ids, sample.token_ids])
        self.started = self.mixed_kv = False
        self.num_sampled = 0
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._entropies: list[float] | None = [] if sample.spec.entropy else None
        self._response: list[int] = sample.token_ids.tolist()

    @property
    def id(self) -> SampleId:
        """The sample's name."""
        return self.sample.id

    @property
    def num_unreported(self) -> int:
        """Tokens that no segment has carried yet."""
        return len(self._tokens)

    def extend(self, token_ids: Sequence[int], logprobs: Iterable[float], entropies: Iterable[float] | None) -> int:
        """Add sampled tokens; returns how many."""
        self._tokens += token_ids
        self._response += token_ids
        self._logprobs += logprobs
        if self._entropies is not None and entropies is not None:
            self._entropies += entropies
        self.num_sampled += len(token_ids)
        return len(token_ids)

    def tail(self, num_tokens: int) -> list[int]:
        """The last response tokens, given ones included."""
        return self._response[-num_tokens:]

    def take(self, version: Version, sampler: str, num_tokens: int | None = None) -> Segment | None:
        """What no segment has carried yet, or the first `num_tokens` of it, as one."""
        end = len(self._tokens) if num_tokens is None else num_tokens
        if end <= 0 or not self._tokens:
            return None
        entropies = None if self._entropies is None else np.asarray(self._entropies[:end], np.float32)
        tokens, logprobs = np.asarray(self._tokens[:end], np.int32), np.asarray(self._logprobs[:end], np.float32)
        self._tokens, self._logprobs = self._tokens[end:], self._logprobs[end:]
        self._entropies = None if self._entropies is None else self._entropies[end:]
        return Segment(tokens, logprobs, version, sampler, entropies)

    def parameters(self, settings: Settings) -> dict[str, Any]:
        """vLLM's sampling parameters for what is left of the sample.

        A seeded stream belongs to the sample and to the position where this life begins, so a resumed or forked sample does
        not draw the same numbers again.
        """
        spec, given = self.sample.spec, len(self.sample)
        seeded = settings.seeded and spec.temperature > 0
        logprobs = 0 if not spec.entropy else settings.entropy_top_k or -1
        return {
            "temperature": spec.temperature,
            "top_p": spec.top_p,
            "top_k": spec.top_k,
            "seed": stream_key(sample_key(spec.seed, self.id), given) % (1 << 31) if seeded else None,
            "max_tokens": min(self.sample.remaining_tokens, settings.context_tokens - len(self.context)),
            "logprobs": logprobs,
            "stop_token_ids": list(spec.stop_token_ids),
            "ignore_eos": True,
            "detokenize": False,
        }


def entropy(logprobs: Sequence[float], top_k: int) -> float:
    """Entropy in nats of a distribution of which all log-probs are given, or an estimate from its `top_k` most likely tokens.

    The estimate H' = -sum_i p_i log p_i - r log r counts all other tokens as one of probability r. It is a lower bound: what is
    missing is r times the entropy within the others.

    Args:
        logprobs: log-probs of tokens, in any order; with `top_k`, those of the most likely ones are among them.
        top_k: how many of them are used; 0 for all, which must then be the whole distribution.
    """
    kept = sorted((value for value in logprobs if value > -math.inf), reverse=True)[: top_k or None]
    terms = [-math.exp(value) * value for value in kept]
    rest = 1.0 - math.fsum(map(math.exp, kept)) if top_k else 0.0
    return math.fsum(terms) - (rest * math.log(rest) if rest > 0 else 0.0)
