"""vLLM behind April's engine protocol, stepped in the caller's process.

    poll:  aborted samples park -> pending weights -> [admit -> one vLLM step -> collect] x steps_per_poll

vLLM batches, schedules and keeps the KV; this file keeps account: which sample a reply belongs to, which version sampled
its tokens, and what has been reported. A resumed sample is a new vLLM request whose prompt holds its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

from april.core.clock import Clock
from april.core.errors import EngineError, nearest
from april.core.event import Event, Finished, Parked, Progressed
from april.core.ids import SampleId, Version
from april.core.sample import Sample, Segment, Stop
from april.engines.base import Caps, UpdateMode, Weights
from april.engines.embedded.stops import Decodes, completes_stop, window_tokens
from april.engines.vllm.bookkeeping import Bookkeeping
from april.engines.vllm.config import VllmConfig
from april.engines.vllm.files import WeightFiles
from april.engines.vllm.request import Request, Settings, entropy
from april.engines.vllm.start import start_vllm, tied_names

_MODES: tuple[UpdateMode, ...] = ("drain", "recompute", "keep_kv")
_LARGEST_ENTROPY_VOCABULARY = 4096


class VllmEngine(Bookkeeping):
    """See `april.engines.base.Engine`. What vLLM cannot promise, `caps` says: a sample that is cut and resumed draws other
    numbers than one that is not, and there is no `score`.

    Args:
        module: a Hugging Face causal LM; the engine copies its weights.
        tokenizer: only for stop strings.
        clock: for event times and the busy counters.
        config: budgets.
        name: of the source.
        version: of the module's weights.
    """

    def __init__(
        self,
        module: Any,
        *,
        tokenizer: Decodes | None = None,
        clock: Clock,
        config: VllmConfig | None = None,
        name: str = "vllm",
        version: Version = 0,
    ) -> None:
        self.name, self._clock, self._tokenizer = name, clock, tokenizer
        self._config = config or VllmConfig()
        self._llm = start_vllm(module, self._config)
        settings = self._llm.vllm_config
        self._dtype = str(settings.model_config.dtype).removeprefix("torch.")
        context, blocks = int(settings.model_config.max_model_len), int(settings.cache_config.num_gpu_blocks - 1)
        kv_tokens = blocks * int(settings.cache_config.block_size)
        self._settings = Settings(
            context_tokens=context,
            row_tokens=min(context, kv_tokens),
            vocab_size=int(module.config.get_text_config().vocab_size),
            largest_entropy_vocabulary=_LARGEST_ENTROPY_VOCABULARY,
            entropy_top_k=self._config.entropy_top_k,
            has_tokenizer=tokenizer is not None,
            seeded=self._config.seeded,
        )
        self._waiting: deque[Request] = deque()
        self._running: dict[str, Request] = {}
        self._live: dict[SampleId, Request] = {}
        self._aborted: set[SampleId] = set()
        self._outbox: list[Event] = []
        self._pending: tuple[dict[str, torch.Tensor], Version] | None = None
        self._version, self._serial, self._num_updates = version, 0, 0
        self._counts = {"generated": 0, "prefill": 0, "shared": 0}
        self._busy_s = self._slot_s = 0.0
        self.caps = Caps(
            max_running=self._config.max_running,
            kv_tokens=kv_tokens,
            max_sample_tokens=self._settings.row_tokens,
            update_modes=frozenset(_MODES),
            addressed_random=False,
            entropy=self._settings.exact_entropies,
            score=False,
            shares_prefix=self._config.prefix_caching,
            sleeps=bool(settings.model_config.enable_sleep_mode),
        )
        self._tied = tied_names(module)
        # workers of several GPUs are other processes, which cannot read tensors of this one
        self._files = WeightFiles(None) if self._config.tensor_parallel > 1 else None
        self._load_weights(dict(module.named_parameters()), version)

    # -- the source -----------------------------------------------------------------------------------------------

    def ready_at(self) -> float | None:
        """Now while there is anything to do."""
        return self._clock.now() if self._live or self._outbox or self._pending else None

    def pending(self) -> list[str]:
        """What a caller who waits for this engine waits for."""
        lines = [f"{self.name}: {len(self._running)} running, {len(self._waiting)} waiting"] if self._live else []
        if self._pending is not None:
            lines.append(f"{self.name}: weights of version {self._pending[1]} wait for running samples")
        return lines

    def poll(self) -> list[Event]:
        """Up to `steps_per_poll` decode steps; returns after the step in which a sample ended."""
        self._park_aborted()
        self._swap_when_quiet()
        for _ in range(self._config.steps_per_poll):
            if any(isinstance(event, Finished | Parked) for event in self._outbox):
                break
            self._admit()
            if not self._running:
                break
            started_s, running = self._clock.now(), len(self._running)
            for output in self._llm.step():
                self._collect(output)
            spent_s = self._clock.now() - started_s
            self._busy_s += spent_s
            self._slot_s += spent_s * running / self._config.max_running
            self._swap_when_quiet()
        events, self._outbox = self._outbox, []
        return events

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, samples: Sequence[Sample]) -> None:
        """Accept all samples, or none and raise."""
        self._check(samples, self._settings)
        for sample in samples:
            request = Request(self._serial, sample)
            self._serial += 1
            self._live[sample.id] = request
            self._waiting.append(request)

    def abort(self, ids: Sequence[SampleId] | None = None) -> None:
        """Park these samples at the next poll; ids that are not here are ignored."""
        self._aborted |= set(self._live) if ids is None else set(ids) & set(self._live)

    def _park_aborted(self) -> None:
        if not self._aborted:
            return
        stopped = [request for request in self._running.values() if request.id in self._aborted]
        if stopped:
            self._llm.abort_request([request.key for request in stopped])
        queued = [request for request in self._waiting if request.id in self._aborted]
        self._waiting = deque(request for request in self._waiting if request.id not in self._aborted)
        for request in [*queued, *stopped]:
            self._running.pop(request.key, None)
            self._end(request, Parked(self._clock.now(), request.id, self._take(request)))
        self._aborted = set()

    def _end(self, request: Request, event: Event) -> None:
        del self._live[request.id]
        self._aborted.discard(request.id)
        self._outbox.append(event)

    # -- one step -------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        if self._pending is not None or not self._waiting:
            return
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        while self._waiting and len(self._running) < self._config.max_running:
            request = self._waiting.popleft()
            params = SamplingParams(**request.parameters(self._settings), output_kind=RequestOutputKind.DELTA)
            # the salt keys the prefix cache: blocks made by other weights can never be hit
            prompt = {"prompt_token_ids": request.context.tolist(), "cache_salt": str(self._num_updates)}
            self._llm.add_request(request.key, prompt, params, priority=request.serial)
            self._running[request.key] = request

    def _collect(self, output: Any) -> None:
        """Book one reply; the order of checks is the protocol's: end of sequence, stop string, length."""
        request = self._running.get(output.request_id)
        if request is None:
            return
        reply = output.outputs[0]
        if not request.started:
            request.started = True
            cached = int(output.num_cached_tokens or 0)
            self._counts["shared"] += cached
            self._counts["prefill"] += len(request.context) - cached
        logprobs = (min(0.0, float(at[token].logprob)) for token, at in zip(reply.token_ids, reply.logprobs, strict=True))
        self._counts["generated"] += request.extend(reply.token_ids, logprobs, self._entropies(request, reply.logprobs))
        stop: Stop | None = None
        if reply.finish_reason is not None:
            stop = "length" if reply.finish_reason == "length" else "eos"
            check_version(reply.weight_versions, self._version, request.id)
        strings = request.sample.spec.stop_strings
        if stop != "eos" and strings and self._tokenizer is not None:
            tail = request.tail(window_tokens(strings))
            if completes_stop(tail, strings, self._tokenizer.decode):
                if stop is None:
                    self._llm.abort_request([request.key])
                stop = "stop"
        if stop is not None:
            del self._running[request.key]
            self._end(request, Finished(self._clock.now(), request.id, self._take(request), stop))
        elif request.num_unreported >= self._config.report_every_tokens:
            self._report(request)

    def _entropies(self, request: Request, tables: Sequence[Any]) -> list[float] | None:
        if not request.sample.spec.entropy:
            return None
        top_k = self._settings.entropy_top_k
        return [entropy([float(entry.logprob) for entry in table.values()], top_k) for table in tables]

    def _report(self, request: Request) -> None:
        segment = self._take(request)
        if segment is not None:
            self._outbox.append(Progressed(self._clock.now(), request.id, segment))

    def _take(self, request: Request) -> Segment | None:
        sampler = f"vllm-{self._dtype}" + ("+mixed-kv" if request.mixed_kv else "")
        return request.take(self._version, sampler)

    # -- weights --------------------------------------------------------------------------------------------------

    def update_weights(self, weights: Weights, version: Version, mode: UpdateMode = "drain") -> None:
        """Switch to these weights; the newest call wins over one that still waits for running samples."""
        if mode not in _MODES:
            raise EngineError("an unknown way to update weights", got=mode, hint=nearest(str(mode), _MODES))
        if mode == "drain" and self._running:
            # The caller may change its tensors before the running samples are done.
            self._pending = ({name: tensor.detach().clone() for name, tensor in weights.items()}, version)
            return
        self._pending = None
        for request in self._running.values():
            self._report(request)
        self._load_weights(dict(weights), version)
        if mode == "keep_kv":
            for request in self._running.values():
                request.mixed_kv = request.mixed_kv or request.started
        elif self._running:
            self._llm.reset_prefix_cache(reset_running_requests=True)

    def _load_weights(self, weights: dict[str, torch.Tensor], version: Version) -> None:
        from april.engines.vllm.transfer import send

        self._num_updates += 1
        send(self._llm, weights, version, self._tied, self._files)
        self._version = version

    def _swap_when_quiet(self) -> None:
        if self._pending is None or self._running:
            return
        (weights, version), self._pending = self._pending, None
        self._load_weights(weights, version)
        self._llm.reset_prefix_cache()

    def sleep(self) -> None:
        """Give the GPU's memory back: the KV is dropped, the weights wait in the memory of the CPU.

        Raises:
            EngineError: samples are here.
        """
        self._check_idle()
        self._llm.sleep(1)

    def wake(self) -> None:
        """Take the memory again, with the weights of before."""
        self._llm.wake_up()

    def close(self) -> None:
        """Stop vLLM; nothing more is reported."""
        if self._running:
            self._llm.abort_request(list(self._running))
        self._waiting, self._running, self._live, self._outbox = deque(), {}, {}, []
        self._aborted, self._pending = set(), None
        self._llm.engine_core.shutdown()
        if self._files is not None:
            self._files.close()


def check_version(spans: Sequence[Any] | None, version: Version, sample: SampleId) -> None:
    """The version that vLLM says sampled the last tokens must be the one they are booked under.

    Raises:
        EngineError: it is another one, or vLLM does not say.
    """
    told = str(spans[-1].version) if spans else None
    if told != str(version):
        raise EngineError(
            "vLLM sampled with other weights than were published",
            where=str(sample),
            got="no version" if told is None else f"version {told}",
            expected=f"version {version}",
        )
