"""One attempt at a prompt, token by token.

A request to an engine is a `Sample`: resume, migration, forking and crash recovery are all
"submit this sample". Worked example, a response of five tokens cut once:

    token_ids           [ 7,  3,  9,  4,  1]
    behaviour_logprobs  [-.2, -1., -.5, -.1, -.3]
    loss_mask           [ 1,  1,  1,  1,  1]
    spans               [0, 3) sampled by version 4, [3, 5) sampled by version 5
    versions            [ 4,  4,  4,  5,  5]
    stop                "eos"
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from april.core.errors import DataError
from april.core.ids import NO_VERSION, SampleId, Version
from april.core.prompt import Prompt, Tokens, frozen_array
from april.core.routes import Routes, freeze_routes, joined_routes
from april.core.sampling import SamplingSpec

Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]
Origin = Literal["sampled", "reused", "forced", "environment"]
Stop = Literal["eos", "stop", "length"]


class Span(NamedTuple):
    """A run of response tokens [start, end) of one origin, one policy version and one sampler.

    Attributes:
        start, end: half-open interval of response positions.
        version: weights that sampled the tokens; `NO_VERSION` where no policy did.
        origin: "sampled" here, "reused" from another sample, "forced" prefix, or "environment" output.
        sampler: which engine and numerics drew the tokens.
    """

    start: int
    end: int
    version: Version
    origin: Origin = "sampled"
    sampler: str = ""


class Parent(NamedTuple):
    """Where a child was forked: the first `position` response tokens are the parent's."""

    id: SampleId
    position: int


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """New tokens of one sample, sampled in one go by one version.

    Attributes:
        token_ids: int32 (T,).
        logprobs: float32 (T,), of the distribution actually sampled from, in nats.
        version: weights that sampled all T tokens.
        sampler: which engine and numerics drew them.
        entropies: float32 (T,) in nats, or None where they were not asked for.
        routes: (T, layers, k), the experts of each MoE layer in the pass that drew the token, or None.
        prompt_routes: (P - 1, layers, k) of the prompt's tokens but the last, with a sample's first segment, or None.
    """

    token_ids: Tokens
    logprobs: Floats
    version: Version
    sampler: str = ""
    entropies: Floats | None = None
    routes: Routes | None = None
    prompt_routes: Routes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", frozen_array(self.token_ids, np.int32))
        object.__setattr__(self, "logprobs", frozen_array(self.logprobs, np.float32))
        if self.entropies is not None:
            object.__setattr__(self, "entropies", frozen_array(self.entropies, np.float32))
        freeze_routes(self, "routes", "prompt_routes")
        _check_aligned("segment", len(self.token_ids), logprobs=self.logprobs, entropies=self.entropies, routes=self.routes)

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One attempt: the prompt and the T response tokens so far.

    Attributes:
        id: immutable name.
        prompt: what was asked.
        spec: sampling parameters, frozen at first issue.
        token_ids: int32 (T,), the response, tokens of environments included.
        behaviour_logprobs: float32 (T,), of the distribution each token was sampled from; 0 where none was.
        loss_mask: bool (T,), True where the policy may be trained.
        spans: cover [0, T) without gaps; versions of sampled spans do not decrease.
        entropies: float32 (T,) or None.
        routes, prompt_routes: (T, layers, k) and (P - 1, layers, k) or None, as those of a segment.
        stop: why the sample ended; None while it may go on.
        parent: where it was forked from; None for a root.

    Raises:
        DataError: when any of the above does not hold.
    """

    id: SampleId
    prompt: Prompt
    spec: SamplingSpec
    token_ids: Tokens = field(default_factory=lambda: _NO_TOKENS)
    behaviour_logprobs: Floats = field(default_factory=lambda: _NO_LOGPROBS)
    loss_mask: Flags = field(default_factory=lambda: _NO_FLAGS)
    spans: tuple[Span, ...] = ()
    entropies: Floats | None = None
    stop: Stop | None = None
    parent: Parent | None = None
    routes: Routes | None = None
    prompt_routes: Routes | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", frozen_array(self.token_ids, np.int32))
        object.__setattr__(self, "behaviour_logprobs", frozen_array(self.behaviour_logprobs, np.float32))
        object.__setattr__(self, "loss_mask", frozen_array(self.loss_mask, np.bool_))
        if self.entropies is not None:
            object.__setattr__(self, "entropies", frozen_array(self.entropies, np.float32))
        freeze_routes(self, "routes", "prompt_routes")
        self._check()

    def _check(self) -> None:
        length = len(self.token_ids)
        _check_aligned(
            self.id,
            length,
            behaviour_logprobs=self.behaviour_logprobs,
            loss_mask=self.loss_mask,
            entropies=self.entropies,
            routes=self.routes,
        )
        self._check_new(length, self.behaviour_logprobs)
        end, newest = 0, NO_VERSION
        for span in self.spans:
            if span.start != end or span.end <= span.start:
                raise DataError("spans do not cover the response without gaps", where=str(self.id), got=self.spans)
            if span.origin == "environment" and self.loss_mask[span.start : span.end].any():
                raise DataError(
                    "tokens of an environment cannot be trained on", where=str(self.id), got=span, expected="loss_mask False"
                )
            if span.origin == "sampled":
                if span.version < newest:
                    raise DataError("versions decrease along a response", where=str(self.id), got=self.spans)
                newest = span.version
            end = span.end
        if end != length:
            raise DataError("spans do not cover the response", where=str(self.id), got=f"spans to {end}", expected=f"{length}")

    def _check_new(self, length: int, logprobs: Floats) -> None:
        """That a response of this length is within the budget, and that these are log-probs."""
        if length > self.spec.max_new_tokens:
            raise DataError(
                "a response is longer than its budget",
                where=str(self.id),
                got=length,
                expected=f"<= {self.spec.max_new_tokens}",
            )
        if not len(logprobs):
            return
        low, high = (logprobs.item(0),) * 2 if logprobs.strides == (0,) else (float(logprobs.min()), float(logprobs.max()))
        if not (low > -np.inf and high <= 1e-4):  # false for NaN, too
            raise DataError("a behaviour log-prob is not a log-prob", where=str(self.id), expected="finite and <= 0")

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def remaining_tokens(self) -> int:
        """Response tokens the budget still allows; counts all segments together."""
        return self.spec.max_new_tokens - len(self.token_ids)

    @property
    def versions(self) -> npt.NDArray[np.int32]:
        """int32 (T,): the version that sampled each token, `NO_VERSION` where none did."""
        out = np.full(len(self), NO_VERSION, np.int32)
        for span in self.spans:
            out[span.start : span.end] = span.version
        return out

    @property
    def oldest_version(self) -> Version | None:
        """The oldest version among policy tokens, or None when there are none."""
        return min((span.version for span in self.spans if span.version != NO_VERSION), default=None)

    @property
    def num_segments(self) -> int:
        """Number of runs of one version; 1 for a sample that was never continued by newer weights."""
        return len({span.version for span in self.spans if span.version != NO_VERSION})

    def extended(self, segment: Segment) -> Sample:
        """This sample with the segment's tokens appended; adjacent spans of one version are joined."""
        if self.stop is not None:
            raise DataError("a finished sample cannot grow", where=str(self.id), got=f"stop {self.stop!r}")
        if len(segment) == 0:
            return self
        start, end = len(self), len(self) + len(segment)
        self._check_new(end, segment.logprobs)
        newest = next((span.version for span in reversed(self.spans) if span.origin == "sampled"), NO_VERSION)
        if segment.version < newest:
            raise DataError("versions decrease along a response", where=str(self.id), got=f"{segment.version} after {self.spans}")
        span = Span(start, end, segment.version, "sampled", segment.sampler)
        spans = self.spans
        if spans and spans[-1][2:] == span[2:]:
            span, spans = span._replace(start=spans[-1].start), spans[:-1]
        simulated = segment.token_ids.strides == (0,)
        return _changed(
            self,
            token_ids=_appended(self.token_ids, segment.token_ids),
            behaviour_logprobs=_appended(self.behaviour_logprobs, segment.logprobs),
            loss_mask=_appended(self.loss_mask, repeated(_TRUE, len(segment)) if simulated else np.ones(len(segment), np.bool_)),
            spans=(*spans, span),
            entropies=_joined(self, segment),
            routes=joined_routes(self.routes, segment.routes, (start, len(segment)), self.id),
            prompt_routes=self.prompt_routes if start else segment.prompt_routes,
        )

    def finished(self, stop: Stop) -> Sample:
        """This sample, ended for the given reason."""
        return _changed(self, stop=stop)

    def forked(self, position: int, branch: str) -> Sample:
        """A child that shares the prompt and the first `position` response tokens, with its own random stream.

        Args:
            position: response tokens to share, 0 to T.
            branch: appended to the parent's branch path.
        """
        if not 0 <= position <= len(self):
            raise DataError("a fork lies outside the response", where=str(self.id), got=position, expected=f"0 to {len(self)}")
        path = f"{self.id.branch}.{branch}" if self.id.branch else branch
        spans = tuple(
            span._replace(end=min(span.end, position), origin="reused" if span.origin == "sampled" else span.origin)
            for span in self.spans
            if span.start < position
        )
        return Sample(
            id=self.id._replace(branch=path),
            prompt=self.prompt,
            spec=self.spec,
            token_ids=self.token_ids[:position],
            behaviour_logprobs=self.behaviour_logprobs[:position],
            loss_mask=self.loss_mask[:position],
            spans=spans,
            entropies=None if self.entropies is None else self.entropies[:position],
            parent=Parent(self.id, position),
            routes=None if self.routes is None else self.routes[:position],
            prompt_routes=self.prompt_routes,
        )


_NO_TOKENS: Tokens = frozen_array(np.zeros(0), np.int32)
_NO_LOGPROBS: Floats = frozen_array(np.zeros(0), np.float32)
_NO_FLAGS: Flags = frozen_array(np.zeros(0), np.bool_)
_TRUE = np.ones(1, np.bool_)
_FIELDS = tuple(Sample.__dataclass_fields__)


def _changed(sample: Sample, **changes: Any) -> Sample:
    """A copy whose changes are known to be right: what was checked once is not checked again with each new segment."""
    out = object.__new__(Sample)
    for name in _FIELDS:
        object.__setattr__(out, name, changes[name] if name in changes else getattr(sample, name))
    for value in changes.values():
        if isinstance(value, np.ndarray) and value.flags.writeable:
            value.flags.writeable = False
    return out


def repeated(value: npt.NDArray[Any], length: int) -> npt.NDArray[Any]:
    """The first element of `value`, `length` times, in the memory of one (stride 0): what simulated engines report."""
    return _repeated(value.dtype, value.item(0), length)


@lru_cache(maxsize=1 << 16)
def _repeated(dtype: np.dtype[Any], value: Any, length: int) -> npt.NDArray[Any]:
    """A hundred thousand samples of a simulation have few different lengths; read-only, so all may have the same array."""
    out: npt.NDArray[Any] = np.ndarray((length,), dtype, np.array([value], dtype), 0, (0,))
    out.flags.writeable = False
    return out


def _appended(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Both in one array; a number that is only repeated goes on taking no memory."""
    if after.strides == (0,) and (len(before) == 0 or (before.strides == (0,) and before.item(0) == after.item(0))):
        return repeated(after, len(before) + len(after))
    return np.concatenate([before, after])


def _joined(sample: Sample, segment: Segment) -> Floats | None:
    if segment.entropies is None:
        return None
    before = sample.entropies if sample.entropies is not None else np.full(len(sample), np.nan, np.float32)
    return np.concatenate([before, segment.entropies])


def _check_aligned(where: object, length: int, **columns: npt.NDArray[np.generic] | None) -> None:
    for name, column in columns.items():
        if column is not None and len(column) != length:
            raise DataError(
                "columns of one response differ in length",
                where=f"{where}: {name}",
                got=len(column),
                expected=f"{length}, as token_ids",
            )
