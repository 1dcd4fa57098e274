"""A vLLM server behind April's engine protocol.

    poll:  news of the streams -> ends, reports -> update (when its time has come) -> admit

The server batches, schedules and keeps the KV. This side sends at most `max_running` samples at once, reads their tokens as
they come, and updates the weights: it pauses the server, lets it read a file, names the version and lets it go on. When the
server dies or hangs, what was streamed is reported, and then `poll` raises: whoever watches this process starts another.
"""

from __future__ import annotations

import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

from april.core.clock import Clock
from april.core.errors import EngineError, ProcessError, nearest
from april.core.event import Broken, Event, Finished, Parked, Progressed
from april.core.ids import SampleId, Version
from april.core.sample import Sample, Segment
from april.engines.base import UpdateMode, Weights
from april.engines.embedded.stops import Decodes, completes_stop, window_tokens
from april.engines.vllm.bookkeeping import Bookkeeping
from april.engines.vllm.client import Broke, Client, Lost, Step, Updated
from april.engines.vllm.config import VllmServerConfig
from april.engines.vllm.files import WeightFiles
from april.engines.vllm.server_process import ServerProcess
from april.engines.vllm.server_promises import key_of, promises
from april.engines.vllm.server_request import ServerRequest
from april.engines.vllm.server_updates import Updates
from april.engines.vllm.start import tied_names
from april.engines.vllm.wire import Chunk, Garbage, Usage, body_of

_LOOK_S = 0.2
_END_S = 1.0
_ABORT_AGAIN_S = 0.25
"""An abort that reaches the server before its request has no effect, so it is sent until the stream has ended."""


class ServerLost(ConnectionError):
    """The server died, hangs, or is not the one that it was; another process may do better."""


class VllmServerEngine(Bookkeeping):
    """See `april.engines.base.Engine`; `caps` says what a server cannot promise.

    Args:
        module: a Hugging Face causal LM; the server is sent its weights.
        tokenizer: only for stop strings.
        clock: for event times.
        config: the address of a server, or how one is started.
        name: of the source.
        version: of the module's weights.
    """

    def __init__(
        self,
        module: Any,
        *,
        tokenizer: Decodes | None = None,
        clock: Clock,
        config: VllmServerConfig | None = None,
        name: str = "vllm_server",
        version: Version = 0,
    ) -> None:
        self.name, self._clock, self._tokenizer = name, clock, tokenizer
        self._config = config or VllmServerConfig()
        files = WeightFiles(self._config.weights_folder)
        self._process = None if self._config.urls else ServerProcess(module, self._config, (files.folder,))
        url = self._config.urls[0] if self._process is None else self._process.url
        vocab_size = int(module.config.get_text_config().vocab_size)
        self._client = Client(url, api_key=key_of(self._config.api_key), vocab_size=vocab_size)
        self._updates = Updates(files, tied_names(module))
        self._waiting: deque[ServerRequest] = deque()
        self._running: dict[str, ServerRequest] = {}
        self._live: dict[SampleId, ServerRequest] = {}
        self._aborting: dict[str, float] = {}
        self._outbox: list[Event] = []
        self._version, self._serial, self._owner = version, 0, f"april-{uuid.uuid4().hex[:8]}"
        self._counts = {"generated": 0, "prefill": 0, "shared": 0}
        self._busy_s = self._slot_s = 0.0
        self._counted_s = time.monotonic()
        self._lost: str | None = None
        try:
            self._begin(dict(module.named_parameters()), version, vocab_size)
        except BaseException:
            self.close()
            raise

    def _begin(self, weights: Weights, version: Version, vocab_size: int) -> None:
        """Wait for the server, learn what it can do, and give it the weights."""
        while self._client.ask("/health") is None:  # whoever watches this process bounds the time
            if self._process is not None:
                self._process.check()
            time.sleep(_LOOK_S)
        self._promised = promises(
            self._client.ask("/server_info", {"config_format": "json"}),
            self._config,
            self._client.url,
            vocab_size,
            self._tokenizer,
        )
        self.caps, self._sampler = self._promised.caps, f"vllm-{self._promised.dtype}"
        self._updates.wanted(weights, version, "drain")
        self._client.call(self._updates.begin())
        self._updates.done()

    # -- the source -----------------------------------------------------------------------------------------------

    def waitables(self) -> Sequence[Any]:
        """What can be read when the server has sent something."""
        return (self._client,)

    def ready_at(self) -> float | None:
        """Now when there is something to report; else when something is to be looked at again."""
        if self._outbox or self._lost is not None or (self._updates.waits and not self._running):
            return self._clock.now()
        if self._aborting:
            return self._clock.now() + _ABORT_AGAIN_S
        return self._clock.now() + 1.0 if self._live or self._updates.holds_back else None

    def pending(self) -> list[str]:
        """What a caller who waits for this engine waits for."""
        lines = [f"{self.name}: {len(self._running)} running, {len(self._waiting)} waiting"] if self._live else []
        return lines + [f"{self.name}: {line}" for line in self._updates.pending()]

    def poll(self) -> list[Event]:
        """What has come.

        Raises:
            ServerLost: the server is gone; what it had sent was reported by the poll before.
        """
        if self._lost is not None and not self._outbox:
            self.close()
            raise ServerLost(self._lost)
        self._count_time()
        for news in self._client.news():
            self._take(news)
        self._look_after()
        if self._lost is None:
            self._abort_again()
            self._start_update()
            self._admit()
        events, self._outbox = self._outbox, []
        return events

    def _take(self, news: Any) -> None:
        match news:
            case Chunk():
                self._collect(news)
            case Usage(_, prompt, cached):
                self._counts["shared"] += cached
                self._counts["prefill"] += prompt - cached
            case Broke(key, reason):
                self._broke(key, reason)
            case Updated():
                self._version = self._updates.done()
            case Lost(reason):
                ended = None if self._process is None else self._process.ended_within(_END_S)
                self._lose(f"{ended} ({reason})" if ended else reason)

    def _look_after(self) -> None:
        """Notice a server that is gone without a word, or says nothing."""
        if self._process is not None and (told := self._process.ended) is not None:
            self._lose(told)
        silent_s = time.monotonic() - self._client.heard_s
        if self._running and not self._updates.running and silent_s > self._config.silence_s:
            self._lose(f"the server said nothing for {silent_s:.1f} s while it had {len(self._running)} samples")

    def _lose(self, reason: str) -> None:
        if self._lost is None:
            self._lost = reason
            for request in self._running.values():
                self._report(request)

    def _count_time(self) -> None:
        now_s = time.monotonic()
        if self._running:
            self._busy_s += now_s - self._counted_s
            self._slot_s += (now_s - self._counted_s) * len(self._running) / self.caps.max_running
        self._counted_s = now_s

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, samples: Sequence[Sample]) -> None:
        """Accept all samples, or none and raise."""
        self._check(samples, self._promised.settings)
        for sample in samples:
            self._live[sample.id] = request = self._new(sample)
            self._waiting.append(request)
        self._admit()

    def _new(self, sample: Sample) -> ServerRequest:
        self._serial += 1
        return ServerRequest(self._serial, sample, self._owner)

    def _admit(self) -> None:
        if self._updates.holds_back or self._lost is not None:
            return
        while self._waiting and len(self._running) < self.caps.max_running:
            request = self._waiting.popleft()
            if not self._running:
                self._client.heard_s = time.monotonic()
            request.version = self._version
            self._running[request.key] = request
            # the salt keys the prefix cache: blocks made by other weights can never be hit
            body = body_of(
                request,
                self._promised.settings,
                salt=f"version-{self._version}",
                priority=self._promised.priority(request.serial),
            )
            self._client.generate(
                request.key, body, self._promised.settings.entropy_top_k if request.sample.spec.entropy else None
            )

    def abort(self, ids: Sequence[SampleId] | None = None) -> None:
        """Park these samples; those in the server when it has said where they stopped."""
        wanted = set(self._live) if ids is None else set(ids) & set(self._live)
        for request in [request for request in self._waiting if request.id in wanted]:
            self._end(request, Parked(self._clock.now(), request.id, None))
        self._waiting = deque(request for request in self._waiting if request.id not in wanted)
        asked = [request for request in self._running.values() if request.id in wanted]
        for request in asked:
            request.resubmit = False
        self._ask_to_end([request.key for request in asked if request.key not in self._aborting])

    def _ask_to_end(self, keys: Sequence[str]) -> None:
        if keys:
            self._aborting |= dict.fromkeys(keys, time.monotonic())
            self._client.abort(keys)

    def _abort_again(self) -> None:
        late_s = time.monotonic() - _ABORT_AGAIN_S
        self._ask_to_end([key for key, asked_s in self._aborting.items() if asked_s < late_s])

    # -- what comes back ------------------------------------------------------------------------------------------

    def _collect(self, chunk: Chunk) -> None:
        request = self._running.get(chunk.key)
        if request is None:
            return
        for index, (token, logprob) in enumerate(zip(chunk.token_ids, chunk.logprobs, strict=True)):
            if request.stop is not None:  # tokens that the server sampled beyond a stop string
                break
            request.extend([token], [logprob], None if chunk.entropies is None else chunk.entropies[index : index + 1])
            self._counts["generated"] += 1
            self._look_for_stop(request, last=chunk.finish == "stop" and index == len(chunk.token_ids) - 1)
        if chunk.finish is not None:
            self._ended(request, chunk)
        elif request.num_unreported >= self._config.report_every_tokens:
            self._report(request)

    def _look_for_stop(self, request: ServerRequest, *, last: bool) -> None:
        """The order of checks is the protocol's: end of sequence, stop string, length."""
        strings = request.sample.spec.stop_strings
        if last or not strings or self._tokenizer is None:
            return
        if completes_stop(request.tail(window_tokens(strings)), strings, self._tokenizer.decode):
            request.stop = "stop"
            self._ask_to_end([request.key])

    def _ended(self, request: ServerRequest, chunk: Chunk) -> None:
        """The server has let go of a request: its tokens are all here, and so are their versions."""
        wanted = self._aborting.pop(request.key, None) is not None
        del self._running[request.key]
        try:
            segments = request.settled(chunk.versions, self._sampler)
        except Garbage as error:
            self._end(request, Broken(self._clock.now(), request.id, f"{self.name}: the server sent garbage: {error}"))
            return
        if request.stop is None and chunk.finish in ("stop", "length"):
            request.stop = "eos" if chunk.finish == "stop" else "length"
        if request.stop is None and not wanted:
            self._end(request, Broken(self._clock.now(), request.id, f"the server ended it by itself: {chunk.finish}"), segments)
        elif request.stop is None and request.resubmit:
            self._resubmit(request, segments)
        else:
            last = segments.pop() if segments else None
            now_s = self._clock.now()
            end = Parked(now_s, request.id, last) if request.stop is None else Finished(now_s, request.id, last, request.stop)
            self._end(request, end, segments)

    def _resubmit(self, request: ServerRequest, segments: Sequence[Segment]) -> None:
        """Go on under the weights that come."""
        self._outbox += [Progressed(self._clock.now(), request.id, segment) for segment in segments]
        self._live[request.id] = again = self._new(request.continued())
        self._waiting.appendleft(again)

    def _broke(self, key: str, reason: str) -> None:
        request = self._running.pop(key, None)
        if request is None:
            return
        self._aborting.pop(key, None)
        self._client.abort([key])  # the server may not have noticed
        self._report(request)
        self._end(request, Broken(self._clock.now(), request.id, f"{self.name}: {reason}"))

    def _end(self, request: ServerRequest, event: Event, segments: Sequence[Segment] = ()) -> None:
        del self._live[request.id]
        self._outbox += [Progressed(event.time_s, request.id, segment) for segment in segments]
        self._outbox.append(event)

    def _report(self, request: ServerRequest) -> None:
        segment = request.known(self._sampler)
        if segment is not None:
            self._outbox.append(Progressed(self._clock.now(), request.id, segment))

    # -- weights --------------------------------------------------------------------------------------------------

    def update_weights(self, weights: Weights, version: Version, mode: UpdateMode = "drain") -> None:
        """Switch to these weights; the newest call wins over one that still waits for running samples."""
        if mode not in self.caps.update_modes:
            raise EngineError("an unknown way to update weights", got=mode, hint=nearest(str(mode), self.caps.update_modes))
        self._updates.wanted(weights, version, mode)
        self._start_update()

    def _start_update(self) -> None:
        if not self._updates.waits:
            return
        if self._updates.mode == "keep_kv":
            for request in self._running.values():
                self._report(request)  # what has come is of the old weights; what comes from here on may be of either
                request.crossed = True
        elif self._running:
            if self._updates.mode == "recompute":
                asked = [request for request in self._running.values() if request.key not in self._aborting]
                for request in asked:
                    request.resubmit = True
                self._ask_to_end([request.key for request in asked])
            return
        self._client.update(self._updates.begin())

    def sleep(self) -> None:
        """Have the server give the GPU's memory back: the KV is dropped, the weights wait in the memory of the CPU.

        Raises:
            EngineError: samples are here.
            ServerLost: the server does not.
        """
        self._check_idle()
        self._have(("/sleep", {"level": 1}, None))

    def wake(self) -> None:
        """Have it take the memory again, with the weights of before.

        Raises:
            ServerLost: the server does not.
        """
        self._have(("/wake_up", {}, None))

    def _have(self, step: Step) -> None:
        try:
            self._client.call([step])
        except ProcessError as error:
            raise ServerLost(f"{error.what}: {error.got}") from error

    def close(self) -> None:
        """Let go of the server, and end it where it is ours; nothing more is reported."""
        if self._process is None and self._running and self._lost is None:
            self._client.abort(list(self._running))
        self._client.close()
        if self._process is not None:
            self._process.close()
        self._updates.close()
        self._waiting, self._running, self._live, self._outbox = deque(), {}, {}, []
        self._aborting = {}
