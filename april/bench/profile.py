"""Where a decode step of the embedded engine spends its time: `april bench profile`.

Parts of the engine are wrapped in timers of exclusive time while it runs, so nothing has to be guessed from operator names;
an engine without running timers takes turns with the timed one and shows what the timers cost. On a CPU operators are
synchronous, so the time of a call is the time of its work.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from april.bench.arithmetic import step_bound_s
from april.bench.peers.april_embedded import STEPS_PER_POLL, bench_engine, bench_samples, poll_step_s
from april.bench.probes import measure
from april.bench.shapes import MAX_POSITIONS, BenchShape, shape_named
from april.bench.table import changes_text
from april.bench.workload import WorkloadOptions, make_prompts
from april.core.errors import DataError

PARTS = (
    "dense products",
    "attention products",
    "KV append",
    "KV rows grow",
    "norms, rotary, elementwise",
    "sampling",
    "Python and bookkeeping",
)
_REST = PARTS[-1]


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What is profiled.

    Attributes:
        model: name of a shape.
        rows: samples decoded at once.
        prompt_tokens, new_tokens: of each; the first new tokens are a warm-up.
        rounds: repetitions, each with fresh engines.
        threads: CPU threads.
        probe_s: seconds of each probe of the machine.
        engine: options of the engine that are not its defaults.

    Raises:
        DataError: when no whole poll is left to measure, the context cannot hold the tokens, or there are drafts.
    """

    model: str = "3m"
    rows: int = 256
    prompt_tokens: int = 32
    new_tokens: int = 128
    rounds: int = 3
    threads: int = 2
    probe_s: float = 0.15
    engine: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine.get("max_draft_tokens", 0):
            what = "a step with drafts has no fixed number of tokens"
            raise DataError(what, where="--engine", got="max_draft_tokens", hint="april bench engine measures drafts")
        if self.num_polls < 2:
            expected = f"{2 * STEPS_PER_POLL} or more"
            raise DataError("too few tokens to measure a step", where="--new-tokens", got=self.new_tokens, expected=expected)
        if self.prompt_tokens + self.new_tokens > MAX_POSITIONS:
            total = self.prompt_tokens + self.new_tokens
            raise DataError("the models have fewer positions", where="--new-tokens", got=total, expected=f"<= {MAX_POSITIONS}")

    @property
    def num_polls(self) -> int:
        """Polls of one engine; the first is the warm-up."""
        return self.new_tokens // STEPS_PER_POLL


class Timers:
    """Exclusive seconds of nested calls.

    Attributes:
        seconds: of each part.
        running: whether calls are timed.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.running = False
        self._stack = [_REST]
        self._last_s = 0.0

    def start(self) -> None:
        """Time from now on; what no part claims belongs to the last one."""
        self.running, self._last_s = True, time.perf_counter()

    def stop(self) -> None:
        """Charge the time since the last change, and pause."""
        self._charge()
        self.running = False

    def _charge(self) -> None:
        now_s = time.perf_counter()
        self.seconds[self._stack[-1]] += now_s - self._last_s
        self._last_s = now_s

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose time belongs to this part but for what it calls of other parts."""

        def call(*args: Any, **options: Any) -> Any:
            if not self.running:
                return function(*args, **options)
            self._charge()
            self._stack.append(part)
            try:
                return function(*args, **options)
            finally:
                self._charge()
                self._stack.pop()

        return call


@contextmanager
def timed_engine(timers: Timers) -> Iterator[None]:
    """Engines that are made inside are timed part by part."""
    from april.engines.embedded import running, static_step
    from april.engines.embedded.memory import KvMemory
    from april.models.kv import KvBucket
    from april.models.kv_rows import KvRows
    from april.models.kv_static import StaticRows
    from april.models.lean_decode import LeanDecoder
    from april.models.linear import FrozenLinear

    rows = [
        (owner, name, part)
        for owner in (KvBucket, StaticRows)
        for name, part in (("attend", "attention products"), ("begin_step", "KV append"), ("write", "KV append"))
    ]
    places: list[tuple[Any, str, str]] = [
        *rows,
        (KvRows, "attend", "attention products"),
        (KvRows, "begin_step", "KV append"),
        (FrozenLinear, "__call__", "dense products"),
        (FrozenLinear, "added_to", "dense products"),
        (KvMemory, "promote", "KV rows grow"),
        (LeanDecoder, "decode", "norms, rotary, elementwise"),
        (running, "draw", "sampling"),
        (running, "host_values", "sampling"),
        (static_step, "draw", "sampling"),
        (static_step.StaticStep, "results", "sampling"),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
    try:
        for owner, name, part in places:
            setattr(owner, name, timers.timed(part, getattr(owner, name)))
        yield
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


def run_profile(options: ProfileOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Time the parts and probe the machine.

    Returns:
        step_s with and without timers, mean context, the probes, the bound and the share of it that is reached, and for each
        part seconds of a step, share and rate.
    """
    import torch

    from april.bench.worker import random_model

    torch.set_num_threads(options.threads)
    shape, module = shape_named(options.model), random_model(options.model)
    num_bytes = options.rows * (options.prompt_tokens + options.new_tokens // 2) * shape.kv_bytes_per_token
    probes: list[dict[str, Any]] = [measure(shape, [options.rows], num_bytes, options.threads, options.probe_s)]
    rounds = []
    for index in range(options.rounds):
        rounds.append(_round(module, shape, options, index))
        say(f"{options.model}, {options.rows} rows, round {index + 1}: {rounds[-1]['plain_s'] * 1e3:.2f} ms a step")
    probes.append(measure(shape, [options.rows], num_bytes, options.threads, options.probe_s))
    best = {name: max(probe[name] for probe in probes) for name in ("matmul_flops_per_s", "copy_bytes_per_s")}
    median = {name: float(np.median([item[name] for item in rounds])) for name in rounds[0]}
    matmul_s = options.rows * shape.flops_per_token / best["matmul_flops_per_s"]
    bound_s = step_bound_s(matmul_s, options.rows, median["context"], shape.kv_bytes_per_token, best["copy_bytes_per_s"])
    return {
        "model": options.model,
        "rows": options.rows,
        "threads": options.threads,
        "rounds": options.rounds,
        "engine": dict(options.engine),
        "context_tokens": median["context"],
        "step_s": median["plain_s"],
        "timed_step_s": median["timed_s"],
        "probes": best,
        "bound_s": bound_s,
        "of_the_bound": bound_s / median["plain_s"],
        "parts": _parts(shape, options.rows, median, best),
    }


def _round(module: Any, shape: BenchShape, options: ProfileOptions, index: int) -> dict[str, float]:
    """Two engines take turns, poll by poll; one of them is timed."""
    timers = Timers()
    workload = WorkloadOptions(prompt_tokens=options.prompt_tokens, fixed_tokens=options.new_tokens)
    prompts = make_prompts(options.rows, shape.vocab_size, workload, index)
    with timed_engine(timers):
        engines = []
        for _ in range(2):
            samples = bench_samples(prompts, [options.new_tokens + STEPS_PER_POLL] * options.rows)
            engines.append(bench_engine(module, samples, options.threads, options.engine))
            engines[-1].submit(samples)
            engines[-1].poll()  # prefill and warm-up
        plain, timed = engines
        first_tokens, seconds = timed.load().kv_tokens, []
        for _ in range(1, options.num_polls):
            plain_s = poll_step_s(plain)
            timers.start()
            timed_s = poll_step_s(timed)
            timers.stop()
            seconds.append((plain_s, timed_s))
        last_tokens = timed.load().kv_tokens
        for engine in engines:
            engine.close()
    plain_s, timed_s = np.mean(seconds, axis=0).tolist()
    steps = len(seconds) * STEPS_PER_POLL
    parts = {part: value / steps for part, value in timers.seconds.items()}
    # A step sees what is there before it and its own token.
    context = ((first_tokens + last_tokens) / 2) / options.rows + 0.5
    return {"plain_s": plain_s, "timed_s": timed_s, "context": context, **parts}


def _parts(shape: BenchShape, rows: int, median: dict[str, float], probes: dict[str, float]) -> list[dict[str, Any]]:
    kv_bytes = rows * shape.kv_bytes_per_token
    work: dict[str, tuple[str, float]] = {
        "dense products": ("flops", rows * shape.flops_per_token),
        "attention products": ("bytes", median["context"] * kv_bytes),
        "KV append": ("bytes", kv_bytes),
        "sampling": ("bytes", rows * shape.vocab_size * 4),
    }
    total_s = sum(median[part] for part in PARTS)
    found = []
    for part in PARTS:
        entry: dict[str, Any] = {"part": part, "step_s": median[part], "share": median[part] / total_s}
        if part in work:
            unit, amount = work[part]
            probe = probes["matmul_flops_per_s" if unit == "flops" else "copy_bytes_per_s"]
            rate = amount / median[part]
            entry |= {"unit": unit, "amount": amount, "per_s": rate, "of_probe": rate / probe}
        found.append(entry)
    return found


def profile_table(profiles: Sequence[dict[str, Any]]) -> str:
    """The profiles in Markdown."""
    lines: list[str] = []
    for profile in profiles:
        threads = f"{profile['threads']} thread{'s' if profile['threads'] > 1 else ''}"
        flops, copied = (profile["probes"][name] * 1e-9 for name in ("matmul_flops_per_s", "copy_bytes_per_s"))
        lines += [
            f"{profile['model']}{changes_text(profile['engine'])}, {profile['rows']} rows, "
            f"{profile['context_tokens']:.0f} tokens of context, "
            f"{threads}: {profile['step_s'] * 1e3:.2f} ms a step ({profile['timed_step_s'] * 1e3:.2f} with "
            f"timers), bound {profile['bound_s'] * 1e3:.2f} ms ({profile['of_the_bound']:.0%}); "
            f"probes {flops:.0f} GFLOP/s of products, {copied:.0f} GB/s of copying",
            "",
            "| part | ms | share | rate | of the probe |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for entry in profile["parts"]:
            unit = {"flops": "GFLOP/s", "bytes": "GB/s"}.get(entry.get("unit", ""), "")
            rate = f"{entry['per_s'] * 1e-9:.1f} {unit}" if unit else ""
            of_probe = f"{entry['of_probe']:.0%}" if unit else ""
            lines.append(f"| {entry['part']} | {entry['step_s'] * 1e3:.2f} | {entry['share']:.0%} | {rate} | {of_probe} |")
        lines.append("")
    return "\n".join(lines)
