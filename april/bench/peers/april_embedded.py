"""April's embedded engine, as a run uses it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from april import __version__
from april.bench.peers.base import Generated, Setup, TokenLists
from april.bench.shapes import MAX_POSITIONS
from april.core.clock import WallClock
from april.core.errors import EngineError
from april.core.event import Broken, Finished, Progressed
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine

STEPS_PER_POLL = 32
_SMALLEST_ROW_TOKENS = 64


class AprilEmbedded:
    """Each workload meets an engine without any KV; behaviour log-probs are part of what it returns."""

    version = __version__

    def __init__(self, setup: Setup) -> None:
        import torch
        import transformers

        torch.set_num_threads(setup.threads)
        self._setup = setup
        loader: Any = transformers.AutoModelForCausalLM
        self._module = loader.from_pretrained(setup.folder, dtype=torch.float32).eval()

    def _engine(self, samples: Sequence[Sample], **changes: Any) -> EmbeddedEngine:
        return bench_engine(self._module, samples, self._setup.threads, {**self._setup.engine, **changes})

    def generate(self, prompts: TokenLists, max_new_tokens: Sequence[int], batch_rows: int) -> Generated:
        """All requests are submitted at once; the engine decodes them together."""
        samples = bench_samples(prompts, max_new_tokens)
        engine = self._engine(samples)
        counts = dict.fromkeys((sample.id for sample in samples), 0)
        started_s = time.perf_counter()
        engine.submit(samples)
        while engine.ready_at() is not None:
            for event in engine.poll():
                if isinstance(event, Broken):
                    raise EngineError("the engine lost a sample", where=str(event.id), got=event.reason)
                if isinstance(event, Progressed | Finished) and event.segment is not None:
                    counts[event.id] += len(event.segment)
        wall_s = time.perf_counter() - started_s
        engine.close()
        return Generated(wall_s, [counts[sample.id] for sample in samples], num_steps=max(max_new_tokens))

    def python_overhead(self, prompts: TokenLists) -> dict[str, float]:
        """Share of a decode step that is spent outside operators: torch's own, and compiled decoding.

        Three polls of equal size: the second runs under torch's profiler and gives the time inside operators, the first
        and the third give the time of a step without a profiler. There are no drafts, since a step with drafts has no fixed
        number of tokens.

        Returns:
            step_s, kernel_s and outside_fraction; all requests are running.
        """
        from torch.profiler import ProfilerActivity, profile

        samples = bench_samples(prompts, [5 * STEPS_PER_POLL] * len(prompts))
        engine = self._engine(samples, max_draft_tokens=0)
        engine.submit(samples)
        engine.poll()  # prefill and warm-up
        before_s = poll_step_s(engine)
        with _compiled_calls_seen(), profile(activities=[ProfilerActivity.CPU]) as profiler:
            poll_step_s(engine)
        after_s = poll_step_s(engine)
        outermost = [event for event in profiler.events() or () if event.cpu_parent is None]
        kernel_s = sum(event.cpu_time_total for event in outermost) * 1e-6 / STEPS_PER_POLL
        engine.close()
        step_s = (before_s + after_s) / 2
        return {"step_s": step_s, "kernel_s": kernel_s, "outside_fraction": max(0.0, 1 - kernel_s / step_s)}

    def close(self) -> None:
        """Nothing outlives a workload."""


@contextmanager
def _compiled_calls_seen() -> Iterator[None]:
    """Calls of compiled code show up in torch's profiler, like operators."""
    from torch.profiler import record_function

    from april.models.kv_rows import KvRows

    names = ("attend", "gated", "rms_normed")
    before = {name: getattr(KvRows, name) for name in names}
    try:
        for name, function in before.items():
            setattr(KvRows, name, record_function(f"KvRows.{name}")(function))
        yield
    finally:
        for name, function in before.items():
            setattr(KvRows, name, function)


def bench_engine(module: Any, samples: Sequence[Sample], threads: int, changes: Mapping[str, Any]) -> EmbeddedEngine:
    """An engine whose KV memory holds all samples at once; a row can be twice as long as what it holds.

    Args:
        changes: options that are not the engine's defaults.
    """
    tokens = [len(sample.prompt.token_ids) + sample.spec.max_new_tokens for sample in samples]
    config = EmbeddedConfig(
        max_running=len(samples),
        kv_tokens=max(sum(max(2 * count, _SMALLEST_ROW_TOKENS) for count in tokens), MAX_POSITIONS),
        threads=threads,
        steps_per_poll=STEPS_PER_POLL,
        **changes,
    )
    return EmbeddedEngine(module, clock=WallClock(), config=config)


def poll_step_s(engine: EmbeddedEngine) -> float:
    """Seconds of a step, over one poll in which nobody starts or ends.

    Raises:
        EngineError: when the poll did not run all its steps.
    """
    tokens, running, started_s = engine.load().generated_tokens, engine.load().running, time.perf_counter()
    engine.poll()
    seconds = time.perf_counter() - started_s
    num_steps = (engine.load().generated_tokens - tokens) / running
    if num_steps != STEPS_PER_POLL:
        raise EngineError("a poll did not run the steps it was asked for", got=num_steps, expected=str(STEPS_PER_POLL))
    return seconds / num_steps


def bench_samples(prompts: TokenLists, max_new_tokens: Sequence[int]) -> list[Sample]:
    """One sample a prompt; equal prompts are members of one group, as in training."""
    groups: dict[tuple[int, ...], tuple[GroupId, Prompt, list[Sample]]] = {}
    samples = []
    for tokens, limit in zip(prompts, max_new_tokens, strict=True):
        key, serial = tuple(tokens), len(groups)
        if key not in groups:
            groups[key] = GroupId(serial, 0, f"p{serial}"), Prompt(f"p{serial}", np.array(tokens, np.int32)), []
        group, prompt, members = groups[key]
        members.append(Sample(group.member(len(members)), prompt, SamplingSpec(max_new_tokens=int(limit))))
        samples.append(members[-1])
    return samples
