"""Measuring an engine once, for the simulator: decode steps, prefill, updates, and what a sample costs besides.

decode    B samples of known contexts generate without an end; each poll is a point (B, context, seconds a step)
prefill   n new samples of a known length, one token each
the loop  synchronous batches of the recipe's own task: what is spent outside the engine, updates of several sizes,
          and changes of weights
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from april.config.resolve import Resolved, resolve
from april.core.errors import EngineError
from april.core.event import Broken, Event
from april.core.group import Batch
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine
from april.run.build import Parts, build, sampling_spec
from april.simulate.calibrate import DecodePoint, Measurements, PrefillPoint, UpdatePoint
from april.training.single import Trainer

MAX_PREFILL_TOKENS = 4096
SPARE = 2
"""Rows of KV memory may be reserved for twice the tokens that they hold."""
LOOP_OVERRIDES = ("schedule.type=sync", "engine.process=main", "training.process=main", "watch=false")
UPDATE_FRACTIONS = (1.0, 0.5, 0.25)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured.

    Attributes:
        rounds: repetitions of each point; medians count.
        polls: timed polls of each series of decode steps.
        batches: synchronous batches, after one that warms up.
    """

    rounds: int = 3
    polls: int = 2
    batches: int = 4


def measure(resolved: Resolved, effort: Effort, say: Callable[[str], None] = lambda _line: None) -> Measurements:
    """Measure the engine, the trainer and the loop of a recipe.

    Raises:
        EngineError: the engine loses a sample, or has no room for two of them.
    """
    given = [override for override in LOOP_OVERRIDES if _applies(override, resolved)]
    parts = build(resolve(resolved.values(), (), given))
    try:
        bench = _EngineBench(parts)
        decode = bench.decode_points(effort, say)
        prefill = bench.prefill_points(effort, say)
        loop = _loop(parts, effort, say)
    finally:
        parts.close()
    caps, recipe = parts.engine.caps, parts.recipe
    return Measurements(
        what=f"{recipe.engine.type} engine, {recipe.model.path}, {parts.num_parameters / 1e6:.2f} M parameters",
        decode=(*decode, *loop.decode),
        prefill=tuple(prefill),
        updates=tuple(loop.updates),
        sample_s=statistics.median(loop.outside_s) if loop.outside_s else 0.0,
        sync_s=statistics.median(loop.sync_s) if loop.sync_s else 0.0,
        kv_tokens=caps.kv_tokens,
        max_running=caps.max_running,
    )


def _applies(override: str, resolved: Resolved) -> bool:
    """Whether the recipe has what an override sets."""
    table, _, name = override.partition("=")[0].partition(".")
    return hasattr(getattr(resolved.recipe, table), name) if name else bool(getattr(resolved.recipe, table))


class _EngineBench:
    """Samples without an end, for an engine that does nothing else."""

    def __init__(self, parts: Parts) -> None:
        self.engine: Engine = parts.engine
        self.spec: SamplingSpec = replace(
            sampling_spec(parts.recipe, parts.tokenizer), stop_token_ids=(), stop_strings=(), entropy=False
        )
        self._vocab = int(parts.policy.module.config.get_text_config().vocab_size)
        self._rng, self._serial = np.random.default_rng(0), 0
        self._longest = self.engine.caps.max_sample_tokens

    def decode_points(self, effort: Effort, say: Callable[[str], None]) -> list[DecodePoint]:
        """Every batch size with short and with mixed contexts."""
        points = []
        for batch in _powers(self.engine.caps.max_running):
            for low, high in ((8, 32), (8, self._longest // 2)):
                room = self.engine.caps.kv_tokens // (SPARE * batch)
                if room < 2 * low:
                    continue
                prompts = np.geomspace(low, max(low, min(high, room // 2)), batch).astype(int).tolist()
                rounds = [list(self._series(prompts, effort.polls)) for _ in range(effort.rounds)]
                points += [_median(same) for same in zip(*rounds, strict=False)]
            say(f"{batch} samples: {points[-1].step_s * 1e3:.2f} ms a step of {points[-1].context_tokens:.0f} context tokens")
        return points

    def _series(self, prompts: Sequence[int], polls: int) -> Iterator[DecodePoint]:
        """One batch that decodes for some polls; those in which anything else happened are left out."""
        batch, engine = len(prompts), self.engine
        start = engine.load().generated_tokens
        engine.submit(self._samples(prompts, self._longest))
        self._poll()  # prefill, and a warm-up
        for _ in range(polls):
            before, begun_s = engine.load(), time.perf_counter()
            if before.running != batch:
                break
            self._poll()
            seconds, after = time.perf_counter() - begun_s, engine.load()
            steps = (after.generated_tokens - before.generated_tokens) / batch
            if after.running == batch and after.preemptions == before.preemptions and steps >= 1:
                context = sum(prompts) + before.generated_tokens - start + batch * (steps - 1) / 2
                yield DecodePoint(batch=batch, context_tokens=context, step_s=seconds / steps)
        engine.abort(None)
        self._drain()

    def prefill_points(self, effort: Effort, say: Callable[[str], None]) -> list[PrefillPoint]:
        """Few and many samples, short and long ones."""
        points = []
        for tokens in (16, self._longest // 8, self._longest // 2):
            for count in (1, 4, 16, 64):
                if count <= self.engine.caps.max_running and count * tokens <= min(
                    MAX_PREFILL_TOKENS, self.engine.caps.kv_tokens // SPARE
                ):
                    seconds = statistics.median(self._prefill_s(count, tokens) for _ in range(effort.rounds))
                    points.append(PrefillPoint(samples=count, tokens=tokens, seconds=seconds))
        say(f"prefill: {points[-1].tokens} tokens in {points[-1].seconds * 1e3:.2f} ms")
        return points

    def _prefill_s(self, count: int, tokens: int) -> float:
        begun_s = time.perf_counter()
        self.engine.submit(self._samples([tokens] * count, 1))
        self._drain()
        return time.perf_counter() - begun_s

    def _samples(self, prompts: Sequence[int], new_tokens: int) -> list[Sample]:
        """New samples of random tokens; no two share a prefix."""
        samples = []
        for tokens in prompts:
            self._serial += 1
            ids = self._rng.integers(0, self._vocab, int(tokens)).astype(np.int32)
            group = GroupId(self._serial, 0, f"calibration-{self._serial}")
            budget = max(1, min(new_tokens, self._longest - int(tokens) - 1))
            samples.append(Sample(group.member(0), Prompt(group.prompt, ids), replace(self.spec, max_new_tokens=budget)))
        return samples

    def _poll(self) -> None:
        for event in self.engine.poll():
            if isinstance(event, Broken):
                raise EngineError("the engine lost a sample while it was measured", where=str(event.id), got=event.reason)

    def _drain(self) -> None:
        while self.engine.ready_at() is not None:
            self._poll()


def _powers(largest: int) -> list[int]:
    """1, 2, 4, ... and the largest."""
    return sorted({*(1 << power for power in range(largest.bit_length()) if 1 << power <= largest), largest})


def _median(points: Sequence[DecodePoint]) -> DecodePoint:
    return points[0].model_copy(update={"step_s": statistics.median(point.step_s for point in points)})


@dataclass(slots=True)
class _Loop:
    """What synchronous batches of the recipe's own task took.

    Attributes:
        decode: steps of their rollouts, gathered by size of the batch.
        outside_s: of each batch, seconds a sample outside the engine.
        sync_s: of each batch, the change of weights.
    """

    decode: list[DecodePoint] = field(default_factory=list)
    updates: list[UpdatePoint] = field(default_factory=list)
    outside_s: list[float] = field(default_factory=list)
    sync_s: list[float] = field(default_factory=list)


def _loop(parts: Parts, effort: Effort, say: Callable[[str], None]) -> _Loop:
    """Generate, train and publish as a run does; the first batch warms up."""
    out, trainer, driver, engine = _Loop(), parts.trainer, parts.driver, parts.engine
    if not isinstance(trainer, Trainer):
        return out
    for index in range(min(effort.batches + 1, parts.recipe.steps)):
        busy_s, begun_s = engine.load().busy_s, time.perf_counter()
        with _metered(engine) as decode:
            batch = driver.next_batch()
        outside_s = time.perf_counter() - begun_s - (engine.load().busy_s - busy_s)
        updates = [_update(trainer, part) for part in _parts_of(batch)]
        begun_s = time.perf_counter()
        driver.publish(trainer.weights(), trainer.version, driver.schedule.update_mode)
        if index:
            out.sync_s.append(time.perf_counter() - begun_s)
            out.outside_s.append(max(0.0, outside_s) / sum(len(group.samples) for group in batch.groups))
            out.updates += updates
            out.decode += [totals.point() for totals in decode.values()]
    if out.updates:
        last = out.updates[-1]
        say(f"{out.outside_s[-1] * 1e3:.2f} ms a sample outside the engine; {last.tokens} tokens trained in {last.seconds:.2f} s")
    return out


@dataclass(slots=True)
class _Steps:
    """Sums over decode steps of similar batches."""

    steps: float = 0.0
    tokens: float = 0.0
    context: float = 0.0
    seconds: float = 0.0

    def point(self) -> DecodePoint:
        batch, context = round(self.tokens / self.steps), self.context / self.steps
        return DecodePoint(batch=max(1, batch), context_tokens=context, step_s=self.seconds / self.steps)


@contextmanager
def _metered(engine: Engine) -> Iterator[dict[int, _Steps]]:
    """Time every poll that only decodes; octave of the batch size -> sums."""
    sums: dict[int, _Steps] = {}
    poll = engine.poll

    def metered() -> list[Event]:
        before, begun_s = engine.load(), time.perf_counter()
        events = poll()
        seconds, after = time.perf_counter() - begun_s, engine.load()
        batch, tokens = before.running, after.generated_tokens - before.generated_tokens
        if batch and tokens and after.prefill_tokens == before.prefill_tokens and after.shared_tokens == before.shared_tokens:
            known, steps = sums.setdefault(batch.bit_length(), _Steps()), tokens / batch
            known.steps += steps
            known.tokens += tokens
            known.context += steps * (before.kv_tokens + batch * (steps + 1) / 2)
            known.seconds += seconds
        return events

    engine.poll = metered  # type: ignore[method-assign]
    try:
        yield sums
    finally:
        engine.poll = poll  # type: ignore[method-assign]


def _parts_of(batch: Batch) -> list[Batch]:
    """The batch, and smaller ones."""
    counts = {max(1, round(fraction * len(batch.groups))) for fraction in UPDATE_FRACTIONS}
    return [replace(batch, groups=batch.groups[:count]) for count in sorted(counts)]


def _update(trainer: Trainer, batch: Batch) -> UpdatePoint:
    tokens = sum(len(s) + len(s.prompt.token_ids) for group in batch.groups for s, _ in group.rewarded)
    begun_s = time.perf_counter()
    trainer.update(batch)
    return UpdatePoint(tokens=tokens, seconds=time.perf_counter() - begun_s)
