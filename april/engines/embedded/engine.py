"""The embedded engine: continuous batching in the caller's process.

    poll:  aborted samples park -> pending weights -> [admit -> make room -> one decode step -> collect] x steps_per_poll

A decode step feeds the last token of every running sample, whose KV is not written yet, and samples the next one. So a
sample is admitted by computing (or copying) the KV of all its tokens but the last, and sampling happens in one place only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from april.core.clock import Clock
from april.core.errors import EngineError, nearest
from april.core.event import Event, Finished, Parked, Progressed
from april.core.ids import SampleId, Version
from april.core.sample import Sample, Segment, Stop
from april.engines.base import Caps, Load, UpdateMode, Weights
from april.engines.embedded.check import check_finite, check_sample
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.emitted import Column
from april.engines.embedded.noise import NormNoise
from april.engines.embedded.prefill import PrefillCosts, compute_prefixes
from april.engines.embedded.running import RunningBatch
from april.engines.embedded.scheduler import Request, Room, WaitingQueue, capacity_classes
from april.engines.embedded.score import score_samples
from april.engines.embedded.select import make_forward
from april.engines.embedded.stops import Decodes, completes_stop, window_tokens

_MODES: tuple[UpdateMode, ...] = ("drain", "recompute", "keep_kv")


class EmbeddedEngine:
    """See `april.engines.base.Engine`; every promise of `Caps` holds.

    Args:
        module: a Hugging Face causal LM; the engine copies its weights.
        tokenizer: only for stop strings.
        clock: for event times and the busy counters; no decision depends on it.
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
        config: EmbeddedConfig | None = None,
        name: str = "embedded",
        version: Version = 0,
    ) -> None:
        self.name, self._clock, self._tokenizer = name, clock, tokenizer
        self._config = config or EmbeddedConfig()
        if self._config.threads is not None:
            torch.set_num_threads(self._config.threads)
        self._forward = make_forward(module, self._config)
        self._noise = NormNoise(self._config.noise)
        if self._noise.level(version):
            self._forward.load(self._noise.applied(dict(module.named_parameters()), version))
        self._sampler_id = f"embedded-{str(self._forward.dtype).removeprefix('torch.')}"
        longest = min(self._forward.max_positions, self._config.kv_tokens)
        self._classes = capacity_classes(longest)
        self._waiting = WaitingQueue()
        self._running = RunningBatch(self._forward, self._config, self._classes)
        self._live: dict[SampleId, Request] = {}
        self._aborted: set[SampleId] = set()
        self._outbox: list[Event] = []
        self._pending: tuple[Weights, Version] | None = None
        self._version, self._serial = version, 0
        self._counts = Counter[str]()
        self._busy_s = self._slot_s = 0.0
        self.caps = Caps(
            max_running=self._config.max_running,
            kv_tokens=self._config.kv_tokens,
            max_sample_tokens=longest,
            update_modes=frozenset(_MODES),
            addressed_random=True,
            entropy=True,
            score=True,
            shares_prefix=self._config.share_prefix,
            sleeps=True,
        )

    # -- the source -----------------------------------------------------------------------------------------------

    def ready_at(self) -> float | None:
        """Now while there is anything to do."""
        return self._clock.now() if self._live or self._outbox or self._pending else None

    def pending(self) -> list[str]:
        """What a caller who waits for this engine waits for."""
        lines = [f"{self.name}: {self._running.size} running, {len(self._waiting)} waiting"] if self._live else []
        if self._pending is not None:
            lines.append(f"{self.name}: weights of version {self._pending[1]} wait for running samples")
        return lines

    @torch.inference_mode()
    def poll(self) -> list[Event]:
        """Up to `steps_per_poll` decode steps; returns after the step in which a sample ended."""
        started_s = self._clock.now()
        self._park_aborted()
        self._swap_when_quiet()
        for _ in range(-(-self._config.steps_per_poll // self._config.decode_chunk_steps)):
            if any(isinstance(event, Finished | Parked) for event in self._outbox):
                break
            self._admit()
            if not self._running.size:
                break
            self._make_room()
            running = self._running.size
            self._step()
            now_s = self._clock.now()
            self._busy_s += now_s - started_s
            self._slot_s += (now_s - started_s) * running / self._config.max_running
            started_s = now_s
            self._swap_when_quiet()
        events, self._outbox = self._outbox, []
        return events

    # -- requests -------------------------------------------------------------------------------------------------

    def submit(self, samples: Sequence[Sample]) -> None:
        """Accept all samples, or none and raise."""
        seen: set[SampleId] = set()
        for sample in samples:
            self._check(sample, seen)
            seen.add(sample.id)
        for sample in samples:
            context = np.concatenate([sample.prompt.token_ids, sample.token_ids])
            limit = min(sample.spec.max_new_tokens, self._forward.max_positions - len(sample.prompt.token_ids))
            request = Request(self._serial, sample, context, limit)
            self._serial += 1
            self._live[sample.id] = request
            self._waiting.add(request)

    def _check(self, sample: Sample, seen: set[SampleId]) -> None:
        if sample.id in self._live or sample.id in seen:
            raise EngineError("a sample is already running", where=str(sample.id), hint="wait for its Parked event")
        check_sample(
            sample,
            context_tokens=self._forward.max_positions,
            row_tokens=self._classes[-1],
            vocab_size=self._forward.vocab_size,
            has_tokenizer=self._tokenizer is not None,
        )

    def abort(self, ids: Sequence[SampleId] | None = None) -> None:
        """Park these samples at the next poll; ids that are not here are ignored."""
        self._aborted |= set(self._live) if ids is None else set(ids) & set(self._live)

    def _park_aborted(self) -> None:
        if not self._aborted:
            return
        for request in self._waiting.remove(self._aborted):
            self._end(request, Parked(self._clock.now(), request.id, None))
        slots = self._running.slots_of(self._aborted)
        parked = [(self._running.request(slot), self._take(slot)) for slot in slots]
        self._running.remove(slots, keep=self._config.retain_parked)
        for request, segment in parked:
            self._end(request, Parked(self._clock.now(), request.id, segment))
        self._aborted = set()

    def _end(self, request: Request, event: Event) -> None:
        del self._live[request.id]
        self._aborted.discard(request.id)
        self._outbox.append(event)

    # -- one tick -------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        if not len(self._waiting) or not self._running.num_free:
            return
        only = (lambda request: request.must_finish) if self._pending is not None else None
        room = Room(self._running.num_free, self._config.kv_tokens - self._running.reserved_tokens, self._config.prefill_tokens)
        share = self._config.share_prefix
        requests = self._waiting.admit(room, self._classes, PrefillCosts(self._running, share=share), only=only)
        if requests:
            self._counts.update(compute_prefixes(self._forward, self._running, requests, share=share))

    def _make_room(self) -> None:
        """Grow full rows; when that exceeds the budget, the youngest samples wait again and lose their KV."""
        for slot in self._running.over_budget():
            request = self._running.request(slot)
            self._report(slot)
            self._running.remove([slot])
            self._waiting.add(request)
            self._counts["preemptions"] += 1
        self._running.grow()

    def _step(self) -> None:
        emitted, ended = self._running.step(), dict[int, Stop]()
        check_finite(emitted, self._running.request, self._version)
        for column in emitted.columns(ended):
            self._counts["generated"] += len(column.slots)
            ended |= self._ends(column)
        for slot, stop in sorted(ended.items(), key=lambda item: self._running.request(item[0]).serial):
            request = self._running.request(slot)
            segment = self._take(slot)
            self._running.remove([slot], keep=self._config.retain_finished)
            self._end(request, Finished(self._clock.now(), request.id, segment, stop))
        for slot in self._running.full(emitted.slots):
            self._report(slot)

    def _ends(self, column: Column) -> dict[int, Stop]:
        """Append one token to each of the column's slots; those that end with it, and why."""
        eos, limited = self._running.record(column)
        ended: dict[int, Stop] = {int(slot): "length" for slot in limited}
        for slot in self._running.with_strings(column.slots):
            strings = self._running.request(slot).sample.spec.stop_strings
            tail = self._running.tail(slot, window_tokens(strings))
            if self._tokenizer is not None and completes_stop(tail.tolist(), strings, self._tokenizer.decode):
                ended[slot] = "stop"
        return ended | {int(slot): "eos" for slot in eos}

    def _report(self, slot: int) -> None:
        segment = self._take(slot)
        if segment is not None:
            self._outbox.append(Progressed(self._clock.now(), self._running.request(slot).id, segment))

    def _take(self, slot: int) -> Segment | None:
        mixed = "+mixed-kv" if self._running.is_mixed(slot) else ""
        sampler = self._sampler_id + self._noise.sampler(self._version) + mixed
        return self._running.take_segment(slot, self._version, sampler)

    # -- weights --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def update_weights(self, weights: Weights, version: Version, mode: UpdateMode = "drain") -> None:
        """Switch to these weights; the newest call wins over one that still waits for running samples.

        Raises:
            EngineError: an unknown mode.
            ModelError: weights of another model; nothing has changed then.
        """
        if mode not in _MODES:
            raise EngineError("an unknown way to update weights", got=mode, hint=nearest(str(mode), _MODES))
        if mode == "drain" and (self._running.size or self._draining()):
            self._forward.check(weights)
            # The caller may change its tensors before the running samples are done.
            copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
            if self._pending is None:
                for slot in self._running.slots():
                    self._running.request(slot).must_finish = True
            self._pending = (copies, version)
            return
        self._forward.load(self._noise.applied(weights, version))
        self._pending = None
        for request in self._live.values():
            request.must_finish = False
        for slot in self._running.slots():
            self._report(slot)
        self._version = version
        if mode == "keep_kv":
            self._running.mark_mixed()
            return
        self._running.kept.shrink(0)
        slots = self._running.slots()
        requests = [self._running.request(slot) for slot in slots]
        self._running.remove(slots)
        for request in requests:
            self._waiting.add(request)

    def _draining(self) -> bool:
        return self._pending is not None and any(request.must_finish for request in self._live.values())

    def _swap_when_quiet(self) -> None:
        if self._pending is None or self._draining():
            return
        weights, version = self._pending
        self._forward.load(self._noise.applied(weights, version))
        self._running.kept.shrink(0)
        self._pending, self._version = None, version

    # -- questions ------------------------------------------------------------------------------------------------

    def score(self, samples: Sequence[Sample]) -> list[npt.NDArray[np.float32]]:
        """Log-probs (T,) of each sample's response under the current weights and its own spec; -inf where it cannot draw."""
        return score_samples(self._forward, samples, self._config.prefill_tokens)

    def load(self) -> Load:
        """Counters; `slot_s / busy_s` is the mean occupied fraction."""
        return Load(
            running=self._running.size,
            waiting=len(self._waiting),
            kv_tokens=self._running.kv_tokens,
            version=self._version,
            generated_tokens=self._counts["generated"],
            prefill_tokens=self._counts["prefill"],
            shared_tokens=self._counts["shared"],
            forked_tokens=self._counts["forked"],
            resumed_tokens=self._counts["resumed"],
            preemptions=self._counts["preemptions"],
            busy_s=self._busy_s,
            slot_s=self._slot_s,
            drafted_tokens=self._running.payoff.drafted_tokens,
            accepted_tokens=self._running.payoff.accepted_tokens,
            speculation=self._running.payoff.state,
        )

    @torch.inference_mode()
    def sleep(self) -> None:
        """Give the KV memory back, also that of parked samples.

        Raises:
            EngineError: samples are here.
        """
        if self._live:
            raise EngineError("an engine with samples cannot sleep", where=self.name, got=f"{len(self._live)} samples")
        self._running.give_back()

    def wake(self) -> None:
        """Nothing: memory is taken when samples come."""

    @torch.inference_mode()
    def close(self) -> None:
        """Drop everything; nothing more is reported."""
        self._running.remove(self._running.slots())
        self._running.kept.shrink(0)
        self._waiting = WaitingQueue()
        self._live, self._aborted, self._outbox, self._pending = {}, set(), [], None
