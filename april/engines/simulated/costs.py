"""What an engine's time is made of, and the time of many decode steps in one formula.

One decode step of B running sequences whose contexts hold K tokens together takes (`methods` 2.7 of the design notes; the
roofline of Williams, Waterman and Patterson, CACM 2009, plus overheads)

    t(B, K) = fixed + per_sequence B + max(weights(B) + context K, compute B)

and leaves K + B tokens. While B does not change, n steps cost a sum of at most two arithmetic series: no loop over tokens.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from functools import cached_property

from pydantic import Field, model_validator

from april.config.schema import Config


class EngineCosts(Config):
    """The constants of one replica (an engine process on its `tp` devices), in seconds and tokens. Calibration fits them."""

    step_fixed_s: float = Field(0.008, ge=0, description="launches, scheduling and sampling of a decode step")
    step_per_sequence_s: float = Field(1e-5, ge=0, description="the part of it that grows with the number of sequences")
    step_by_batch_s: tuple[tuple[int, float], ...] = Field(
        (), description="measured: (sequences, further seconds of a step), ascending; linear in between, the last one beyond"
    )
    weights_read_s: float = Field(0.0, ge=0, description="reading the weights that every step needs")
    experts_read_s: float = Field(0.0, ge=0, description="reading all experts of a mixture once")
    experts_share: float = Field(1.0, gt=0, le=1, description="share of the experts that one token uses")
    context_token_read_s: float = Field(0.0, ge=0, description="reading the KV of one context token")
    compute_per_sequence_s: float = Field(0.0, ge=0, description="arithmetic of one token; hidden behind the reads while shorter")
    admission_s: float = Field(0.0, ge=0, description="each time that samples are taken in between two steps, however many")
    admit_s: float = Field(0.0, ge=0, description="each sample taken in, however much of it is cached")
    prefill_fixed_s: float = Field(0.0, ge=0, description="each prefill, whatever its length")
    prefill_per_token_s: float = Field(0.0, ge=0, description="prefill, the part that is linear in the tokens")
    prefill_per_token2_s: float = Field(0.0, ge=0, description="prefill, the part that is quadratic in the tokens")
    kv_tokens: int = Field(1 << 40, ge=1, description="tokens of KV that fit")
    max_running: int = Field(256, ge=1, description="sequences decoded at once")
    sync_s: float = Field(0.0, ge=0, description="the engine stands still for so long while it takes new weights")

    def prefill_s(self, num_tokens: int) -> float:
        """Seconds in which a replica computes the KV of so many tokens of one sequence."""
        if num_tokens <= 0:
            return 0.0
        return self.prefill_fixed_s + self.prefill_per_token_s * num_tokens + self.prefill_per_token2_s * num_tokens * num_tokens

    @model_validator(mode="after")
    def _ascending(self) -> EngineCosts:
        sizes = [batch for batch, _ in self.step_by_batch_s]
        if sizes != sorted(set(sizes)) or any(batch < 1 or seconds < 0 for batch, seconds in self.step_by_batch_s):
            raise ValueError("step_by_batch_s has ascending numbers of sequences, and seconds that are not negative")
        return self

    @cached_property
    def _by_batch(self) -> dict[int, tuple[float, float, float]]:
        return {}

    def parts(self, batch: int) -> tuple[float, float, float]:
        """(overhead, weight reads, arithmetic) of a step of `batch` sequences, in seconds."""
        known = self._by_batch.get(batch)
        if known is None:
            touched = 1.0 - (1.0 - self.experts_share) ** batch
            reads = self.weights_read_s + self.experts_read_s * touched
            overhead = self.step_fixed_s + self.step_per_sequence_s * batch + interpolated(self.step_by_batch_s, batch)
            known = (overhead, reads, self.compute_per_sequence_s * batch)
            self._by_batch[batch] = known
        return known

    def step_s(self, batch: int, context_tokens: int) -> float:
        """Seconds of one decode step."""
        overhead, reads, compute = self.parts(batch)
        return overhead + max(reads + self.context_token_read_s * context_tokens, compute)

    def steps_s(self, batch: int, context_tokens: int, num_steps: int) -> float:
        """Seconds of `num_steps` decode steps that start with so many context tokens."""
        overhead, reads, compute = self.parts(batch)
        first = reads + self.context_token_read_s * context_tokens
        growth = self.context_token_read_s * batch
        bound = self._compute_bound_steps(first, growth, compute, num_steps)
        rest = num_steps - bound
        memory = rest * (first + growth * bound) + growth * (rest * (rest - 1) / 2)
        return num_steps * overhead + bound * compute + memory

    @staticmethod
    def _compute_bound_steps(first: float, growth: float, compute: float, num_steps: int) -> int:
        """How many of the next steps wait for arithmetic rather than for memory."""
        if first >= compute:
            return 0
        return num_steps if growth <= 0 else min(num_steps, math.ceil((compute - first) / growth))

    def steps_within(self, batch: int, context_tokens: int, seconds: float, limit: int) -> int:
        """How many whole steps, at most `limit`, end within so many seconds."""
        if seconds <= 0 or limit <= 0:
            return 0
        overhead, reads, compute = self.parts(batch)
        first, growth = reads + self.context_token_read_s * context_tokens, self.context_token_read_s * batch
        bound = self._compute_bound_steps(first, growth, compute, limit)
        left_s = seconds - bound * (overhead + compute)
        if left_s < 0:
            guess = seconds / (overhead + compute)
        elif growth * growth > 0:  # growth / 2 n^2 + linear n = left
            linear = overhead + first + growth * bound - growth / 2
            guess = bound + (math.sqrt(linear * linear + 2 * growth * left_s) - linear) / growth
        else:
            guess = bound + (left_s / (overhead + first) if overhead + first > 0 else limit)
        steps = max(0, int(min(guess, limit)))
        while steps < limit and self.steps_s(batch, context_tokens, steps + 1) <= seconds:
            steps += 1
        while steps > 0 and self.steps_s(batch, context_tokens, steps) > seconds:
            steps -= 1
        return steps


def interpolated(table: Sequence[tuple[int, float]], batch: int) -> float:
    """A value of a measured table: linear between its entries, constant outside; 0 of an empty one."""
    if not table:
        return 0.0
    place = bisect.bisect_left(table, (batch, -math.inf))
    if place in (0, len(table)):
        return table[min(place, len(table) - 1)][1]
    (low, before), (high, after) = table[place - 1], table[place]
    return before + (after - before) * (batch - low) / (high - low)
