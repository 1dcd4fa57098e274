"""The engine protocol. Every engine passes the contract kit in `april.testing.engine_contract`.

An engine is a source of events. It reports tokens when a sample parks or finishes and every few hundred tokens in
between, never token by token. KV cache is an optimisation: losing it changes time, never tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from april.core.event import Event
from april.core.ids import SampleId, Version
from april.core.sample import Sample

UpdateMode = Literal["drain", "recompute", "keep_kv", "next_request", "rolling"]
Weights = Mapping[str, Any]
"""Hugging Face parameter name -> tensor; the engine copies what it keeps."""


@dataclass(frozen=True, slots=True)
class Caps:
    """What an engine promises.

    Attributes:
        max_running: samples it decodes at once; more wait inside the engine.
        kv_tokens: tokens of KV cache it can hold.
        max_sample_tokens: longest prompt plus response of one sample.
        update_modes: ways in which weights may change.
        addressed_random: a sample cut anywhere and resumed under the same weights continues with the same tokens.
        entropy: exact entropies on request.
        score: `score` is available.
        shares_prefix: members of a group, and children, may share the KV of their common prefix.
        sleeps: `sleep` and `wake` are available: an engine that has no sample gives back memory that it can make again.
    """

    max_running: int
    kv_tokens: int
    max_sample_tokens: int
    update_modes: frozenset[UpdateMode]
    addressed_random: bool
    entropy: bool
    score: bool
    shares_prefix: bool
    sleeps: bool = False


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine is doing now, and what it has done so far.

    Attributes:
        running: samples being decoded.
        waiting: samples submitted and not yet decoded (or preempted).
        kv_tokens: KV tokens in use.
        version: weights that the next token will be sampled with.
        generated_tokens: response tokens sampled since the start.
        prefill_tokens: tokens that went through prefill (a cost, not generation).
        shared_tokens: prefill tokens saved because their KV was there: those of the next two, and else of a group's prompt.
        forked_tokens: those of them that children copied from relatives.
        resumed_tokens: those of them that parked samples found kept when they came back.
        preemptions: samples whose KV was taken away for want of memory.
        busy_s: seconds spent computing.
        slot_s: integral over busy time of samples running / max_running.
        drafted_tokens: guesses of speculative decoding that were verified.
        accepted_tokens: those of them that were what was drawn.
        speculation: whether guesses are made now, and why not.
    """

    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    version: Version = 0
    generated_tokens: int = 0
    prefill_tokens: int = 0
    shared_tokens: int = 0
    forked_tokens: int = 0
    resumed_tokens: int = 0
    preemptions: int = 0
    busy_s: float = 0.0
    slot_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    speculation: str = "off"


class Engine(Protocol):
    """Generates responses. The contract, each line of which is a test:

    1. Each submitted sample gets exactly one terminal event (`Finished`, `Parked` or `Broken`); submitting it again
       after `Parked` or `Broken` starts a new life of the same id. An id that is running cannot be submitted.
    2. `abort` is idempotent; ids that are not running are ignored; a finish of the same tick wins.
    3. The tokens of all segments together, in order, are the response; each has a log-prob.
    4. A segment has one version; tokens carry the version that sampled them.
    5. Tokens of a submitted sample are given: never sampled again; its budget counts them.
    6. `score` equals the sampler's log-prob of freshly sampled tokens at the same version.
    7. Children forked from a sample share its tokens and have their own random stream; the parent is untouched.
    8. `update_weights`: "drain" lets running samples finish on the old weights first and starts no waiting one before
       the swap; "recompute" reports what was sampled so far, swaps, and continues on KV made by the new weights;
       "keep_kv" swaps and continues on the old KV (another sampler id). Engines that hold several versions may offer
       "next_request" (running samples stay on their weights, later submissions get the new ones) and "rolling" (one
       worker after the other drains and swaps; `load().version` is the new one when all have).
    9. Losing KV changes time, never tokens.
    10. Stop strings are matched on decoded text (of the whole response) and cut at a token boundary.

    Raises:
        EngineError: for a sample that can never run (too long for the context or the KV memory, nothing left of its
            budget, already finished, id already running), before any of the call's samples is accepted.
    """

    name: str

    @property
    def caps(self) -> Caps: ...

    def ready_at(self) -> float | None: ...

    def poll(self) -> list[Event]: ...

    def pending(self) -> list[str]: ...

    def submit(self, samples: Sequence[Sample]) -> None:
        """Accept samples to generate or continue, in order of preference."""
        ...

    def abort(self, ids: Sequence[SampleId] | None = None) -> None:
        """Stop these samples (None: all); their events come with the next polls."""
        ...

    def score(self, samples: Sequence[Sample]) -> list[npt.NDArray[np.float32]]:
        """Log-probs (T,) of each sample's response tokens under the current weights and the sample's own spec."""
        ...

    def update_weights(self, weights: Weights, version: Version, mode: UpdateMode = "drain") -> None:
        """Switch to new weights; `load().version` tells when it has happened."""
        ...

    def load(self) -> Load: ...

    def close(self) -> None: ...
