"""Accuracy on held-out problems: one version of the weights, apart from the training pool."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from april.core.clock import readable
from april.core.errors import EngineError, Interrupted
from april.core.event import Broken, Finished, Parked, Progressed
from april.core.group import Failure, Outcome, Reward
from april.core.ids import GroupId, SampleId, Version
from april.core.prompt import Prompt, Tokens
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine
from april.observe.statistics import paired_difference, pass_at_k, wilson_interval
from april.rewards.base import Verifier
from april.rewards.judge import judge_all

MAX_LOSSES = 3
"""How often a sample of an evaluation may lose its engine."""
WAIT_S = 0.5
EVALUATION_SERIAL = -1
"""Group serial of evaluation samples: they have random streams of their own, the same at every evaluation."""


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """What a policy achieved on P problems with K samples each.

    Attributes:
        mode: "greedy" or "sampled".
        version: weights evaluated.
        temperature: of the sampling; 0 for greedy.
        correct: bool (P, K).
        lengths: int64 (P, K), response tokens.
        samples, outcomes: everything, problem by problem.
    """

    mode: str
    version: Version
    temperature: float
    correct: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int64]
    samples: tuple[Sample, ...]
    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        """Share of correct samples; the mean over problems, as each has K."""
        return float(self.correct.mean())

    @property
    def failures(self) -> Counter[str]:
        """Why samples got no reward, and how many; they count as not solved."""
        return Counter(outcome.reason for outcome in self.outcomes if isinstance(outcome, Failure))

    def to_record(self, step: int, time_s: float) -> dict[str, Any]:
        """For evaluations.jsonl. The interval is Wilson's for one sample a problem, else the normal one over problems."""
        num_problems, num_samples = self.correct.shape
        if num_samples == 1:
            interval = wilson_interval(int(self.correct.sum()), num_problems)
            low, high = interval.low, interval.high
        else:
            shares = self.correct.mean(1)
            half = 1.96 * float(shares.std(ddof=1)) / max(1, num_problems) ** 0.5 if num_problems > 1 else float("nan")
            low, high = max(0.0, self.accuracy - half), min(1.0, self.accuracy + half)
        solved = self.correct.sum(1)
        powers = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if k <= num_samples]
        return {
            "step": step,
            "time_s": time_s,
            "mode": self.mode,
            "temperature": self.temperature,
            "version": self.version,
            "n_problems": num_problems,
            "num_samples": num_samples,
            "failed": sum(self.failures.values()),
            "accuracy": self.accuracy,
            "low": low,
            "high": high,
            "length_mean": float(self.lengths.mean()),
            "length_p50": float(np.percentile(self.lengths, 50)),
            "length_p99": float(np.percentile(self.lengths, 99)),
            "pass_at": {str(k): float(pass_at_k(np.full(num_problems, num_samples), solved, k).mean()) for k in powers},
            "num_correct": [int(count) for count in solved],
        }


def evaluate(
    engine: Engine,
    prompts: Sequence[Prompt],
    verifier: Verifier,
    decode: Callable[[Tokens], str],
    spec: SamplingSpec,
    *,
    mode: str,
    num_samples: int = 1,
    timeout_s: float = 5.0,
    progress: Callable[[int], None] = lambda _done: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Answer every problem with an engine that does nothing else.

    Args:
        engine: idle; its weights are evaluated.
        prompts: P held-out problems.
        verifier: judges.
        decode: token ids to text.
        spec: of the samples; greedy mode sets its temperature to 0.
        mode: "greedy" or "sampled".
        num_samples: K samples a problem; greedy takes one.
        timeout_s: for each judgement.
        progress: told how many samples are done.
        should_stop: asked between events.

    Raises:
        EngineError: the engine is busy, or loses a sample.
        Interrupted: when `should_stop` says so; the engine is idle again.
    """
    if mode == "greedy":
        spec, num_samples = replace(spec, temperature=0.0, top_p=1.0, top_k=0), 1
    ids = [GroupId(EVALUATION_SERIAL, 0, prompt.id).member(k) for prompt in prompts for k in range(num_samples)]
    samples = [Sample(id, prompt, spec) for id, prompt in zip(ids, (p for p in prompts for _ in range(num_samples)), strict=True)]
    finished = _generate(engine, samples, progress, should_stop)
    version = engine.load().version
    outcomes = judge_all(verifier, finished, decode, timeout_s)
    shape = (len(prompts), num_samples)
    correct = np.array([isinstance(outcome, Reward) and outcome.correct for outcome in outcomes]).reshape(shape)
    lengths = np.array([len(sample) for sample in finished]).reshape(shape)
    return Evaluation(mode, version, spec.temperature, correct, lengths, tuple(finished), tuple(outcomes))


def _generate(
    engine: Engine, samples: list[Sample], progress: Callable[[int], None], should_stop: Callable[[], bool]
) -> list[Sample]:
    """Finish all samples; the engine must be idle."""
    load = engine.load()
    if load.running or load.waiting:
        raise EngineError(
            "an engine that is generating cannot evaluate", got=f"{load.running} running, {load.waiting} waiting", expected="idle"
        )
    state: dict[SampleId, Sample] = {sample.id: sample for sample in samples}
    unfinished, lost = set(state), dict[SampleId, int]()
    engine.submit(samples)
    while unfinished:
        if should_stop():
            _empty(engine, unfinished)
            raise Interrupted("an evaluation was asked to stop")
        _wait(engine)
        for event in engine.poll():
            match event:
                case Progressed() | Finished():
                    if event.segment is not None:
                        state[event.id] = state[event.id].extended(event.segment)
                    if isinstance(event, Finished):
                        state[event.id] = state[event.id].finished(event.stop)
                        unfinished.discard(event.id)
                case Broken() if lost.setdefault(event.id, 0) < MAX_LOSSES:
                    lost[event.id] += 1
                    engine.submit([state[event.id]])  # with the tokens that were reported: the rest is drawn as before
                case Parked() | Broken():
                    raise EngineError("an engine lost a sample of an evaluation", where=str(event.id), got=event)
                case _:
                    pass
        progress(len(samples) - len(unfinished))
    return [state[sample.id] for sample in samples]


def _empty(engine: Engine, samples: Collection[SampleId]) -> None:
    """Take the samples out of the engine and forget them."""
    engine.abort(list(samples))
    while engine.load().running or engine.load().waiting:
        _wait(engine)
        engine.poll()


def _wait(engine: Engine) -> None:
    """Wait for an engine in another process to say something; one that computes in its `poll` is asked at once."""
    if getattr(engine, "computes_outside", hasattr(engine, "waitables")):
        readable(engine.waitables(), WAIT_S)  # type: ignore[attr-defined]


def gain(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """The paired difference in accuracy of two records on the same problems, with its 95 % interval."""
    shares = [np.array(record["num_correct"], float) / record["num_samples"] for record in (before, after)]
    estimate = paired_difference(shares[0], shares[1])
    return {"gain": estimate.value, "gain_low": estimate.low, "gain_high": estimate.high}
