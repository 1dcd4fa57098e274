"""A sample inside a server: its tokens come in a stream, and which version sampled them is told with the last ones."""

from __future__ import annotations

from collections.abc import Sequence

from april.core.errors import EngineError
from april.core.ids import NO_VERSION, Version
from april.core.sample import Sample, Segment, Stop
from april.engines.vllm.request import Request
from april.engines.vllm.wire import Garbage, VersionSpan


class ServerRequest(Request):
    """A request, and what is known of the versions of its tokens.

    A request that no update has met has one version, that of the server when it was sent. One that stayed in the server over an
    update gives out nothing more until its end, when the server says which tokens are of which version.

    Attributes:
        version: of the server when the request was sent.
        crossed: whether an update has met it in the server.
        resubmit: whether it is ended only to go on under other weights.
        stop: why it ends, where this side has found out first.
        reported: what segments have carried.
    """

    def __init__(self, serial: int, sample: Sample, owner: str) -> None:
        super().__init__(serial, sample, owner)
        self.version: Version = NO_VERSION
        self.crossed = self.resubmit = False
        self.stop: Stop | None = None
        self.reported: list[Segment] = []
        self._num_reported = 0

    def known(self, sampler: str) -> Segment | None:
        """Tokens whose version is sure, as one segment."""
        return None if self.crossed else self._taken(self.version, sampler)

    def settled(self, spans: Sequence[VersionSpan], sampler: str) -> list[Segment]:
        """All that is left, one segment a version, by the spans that came with the last tokens.

        Raises:
            EngineError: the server sampled with other weights than it was told to.
            Garbage: an update has met the request, and the server does not say of every token which weights sampled it.
        """
        versions = [self._checked(span) for span in spans]
        if not self.crossed:
            return [segment for segment in [self._taken(self.version, sampler)] if segment is not None]
        ends = [0, *(span.end for span in spans)]
        if [span.start for span in spans] != ends[:-1] or ends != sorted(ends) or ends[-1] < self.num_sampled:
            told = ", ".join(f"{span.version} of [{span.start}, {span.end})" for span in spans) or "none"
            raise Garbage(f"versions {told} of {self.num_sampled} tokens")
        segments = []
        for version, span in zip(versions, spans, strict=True):
            fresh = min(span.end, self.num_sampled) - self._num_reported
            segment = self._taken(version, sampler + ("" if version == self.version else "+mixed-kv"), fresh)
            segments += [] if segment is None else [segment]
        return segments

    def continued(self) -> Sample:
        """The sample with all that was reported of it."""
        sample = self.sample
        for segment in self.reported:
            sample = sample.extended(segment)
        return sample

    def _taken(self, version: Version, sampler: str, num_tokens: int | None = None) -> Segment | None:
        segment = self.take(version, sampler, num_tokens)
        if segment is not None:
            self.reported.append(segment)
            self._num_reported += len(segment)
        return segment

    def _checked(self, span: VersionSpan) -> Version:
        """The version of a span, which must be one that this request can have met."""
        version = int(span.version) if span.version.isdecimal() else NO_VERSION
        if version == self.version or (self.crossed and version > self.version):
            return version
        raise EngineError(
            "a vLLM server sampled with other weights than were published",
            where=str(self.id),
            got=f"version {span.version}",
            expected=f"version {self.version}" + (" or newer" if self.crossed else ""),
            hint="one run alone may update the weights of a server",
        )
