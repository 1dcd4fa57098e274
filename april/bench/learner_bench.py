"""`april bench learner`: April's packed training step against a plain padded loop over a Hugging Face model, on the same batch.

for each case:  same log-probs and gradients on both sides -> warm up -> whole updates in alternating order
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from april.algorithms.bind import Algorithm
from april.algorithms.spec import AlgorithmConfig
from april.bench.arithmetic import ratio, spread
from april.bench.padded_loop import PaddedLoop
from april.bench.shapes import shape_named
from april.bench.worker import random_model
from april.bench.workload import WorkloadOptions, describe_lengths, lognormal_lengths
from april.core.errors import DataError, ModelError
from april.core.group import Batch, Group, Reward
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment
from april.core.sampling import SamplingSpec
from april.models.policy import Policy
from april.training.batch import assemble
from april.training.config import TrainerConfig
from april.training.single import Trainer
from april.training.step import Learner

TOLERANCE = 1e-5
"""Largest accepted difference of log-probs in nats, and of gradients as a share of the largest gradient."""

_LONG_TAILED = WorkloadOptions()


@dataclass(frozen=True, slots=True)
class LearnerCase:
    """Lengths of a batch.

    Attributes:
        prompt_tokens: of every prompt; the samples of a group share theirs.
        new_tokens: of every response; None takes the log-normal lengths of `april bench engine`.
    """

    prompt_tokens: int
    new_tokens: int | None


CASES = {
    "equal": LearnerCase(8, 128),
    "shared-prompt": LearnerCase(128, 128),
    "long-tailed": LearnerCase(32, None),
}
"""By name: nothing to gain but the step itself; prompts as long as the responses; a few responses far longer than the others."""


@dataclass(frozen=True, slots=True)
class LearnerOptions:
    """What is measured.

    Attributes:
        model: name of a shape.
        samples, group_size: of the batch.
        micro_batch_tokens: most tokens that go through the model at once, padding included.
        rounds: updates of each side that count, after one that does not.
        threads: CPU threads of torch.

    Raises:
        DataError: when samples are no whole groups of two or more.
    """

    model: str = "3m"
    samples: int = 64
    group_size: int = 8
    micro_batch_tokens: int = 16384
    rounds: int = 5
    threads: int = 2

    def __post_init__(self) -> None:
        if self.group_size < 2 or self.samples < 1 or self.samples % self.group_size:
            got = f"{self.samples} samples in groups of {self.group_size}"
            raise DataError("groups are not whole", where="--samples", got=got, expected="a multiple of groups of 2 or more")

    @property
    def training(self) -> TrainerConfig:
        """Of both sides."""
        return TrainerConfig(micro_batch_tokens=self.micro_batch_tokens)


def run_learner_bench(options: LearnerOptions, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all cases.

    Returns:
        For each case its lengths, the largest differences of values, and response tokens per second of both sides with the
        ratio April / padded loop, round by round.

    Raises:
        ModelError: when the two sides compute different values.
    """
    torch.set_num_threads(options.threads)
    module = random_model(options.model)
    cases = []
    for name, case in CASES.items():
        cases.append({"name": name, **_run_case(module, make_batch(case, options), options)})
        speedup = cases[-1]["ratio"]
        say(f"{options.model}, {name}: {speedup['median']:.2f} ({speedup['low']:.2f} to {speedup['high']:.2f}) times as fast")
    return {"options": asdict(options), "cases": cases}


def make_batch(case: LearnerCase, options: LearnerOptions, seed: int = 0) -> Batch:
    """Random prompts and responses in groups whose members earn 0 and 1 in turn, so that every sample has a gradient."""
    rng, vocab_size = np.random.default_rng(seed), shape_named(options.model).vocab_size
    lengths = response_lengths(case, options.samples).reshape(-1, options.group_size)
    groups = []
    for serial, sizes in enumerate(lengths.tolist()):
        group = GroupId(serial, 0, f"p{serial}")
        prompt = Prompt(group.prompt, rng.integers(0, vocab_size, case.prompt_tokens, dtype=np.int32))
        samples = []
        for member, size in enumerate(sizes):
            response = Segment(rng.integers(0, vocab_size, size, dtype=np.int32), np.zeros(size, np.float32), 0)
            samples.append(Sample(group.member(member), prompt, SamplingSpec(size)).extended(response).finished("length"))
        rewards = tuple(Reward(float(member % 2), bool(member % 2)) for member in range(len(sizes)))
        groups.append(Group(group, tuple(samples), rewards))
    return Batch(0, 0, tuple(groups))


def response_lengths(case: LearnerCase, num: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Response tokens of each sample, int64 (num,)."""
    if case.new_tokens is not None:
        return np.full(num, case.new_tokens, np.int64)
    tail = _LONG_TAILED
    return lognormal_lengths(num, tail.mu, tail.sigma, tail.cap_tokens, tail.seed)


def _run_case(module: Any, batch: Batch, options: LearnerOptions) -> dict[str, Any]:
    differences = value_differences(module, batch, options.training)
    if max(differences.values()) > TOLERANCE:
        raise ModelError("the padded loop computes other values", got=differences, expected=f"at most {TOLERANCE:g}")
    sides: dict[str, Callable[[Batch], object]] = {
        "april": Trainer(Policy(copy.deepcopy(module)), AlgorithmConfig(), options.training).update,
        "padded": PaddedLoop(copy.deepcopy(module), options.training).update,
    }
    lengths = np.array([len(sample) for group in batch.groups for sample in group.samples])
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(options.rounds + 1):
        for name in list(sides) if index % 2 == 0 else list(sides)[::-1]:
            started_s = time.perf_counter()
            sides[name](batch)
            if index:
                rates[name].append(int(lengths.sum()) / (time.perf_counter() - started_s))
    return {
        "prompt_tokens": len(batch.groups[0].samples[0].prompt.token_ids),
        "lengths": describe_lengths(lengths),
        "differences": differences,
        "tokens_per_s": {name: spread(values).to_json() for name, values in rates.items()},
        "ratio": ratio(rates["april"], rates["padded"]).to_json(),
    }


def value_differences(module: Any, batch: Batch, config: TrainerConfig) -> dict[str, float]:
    """Largest difference of response log-probs in nats, and of gradients as a share of the largest one."""
    policy, padded = Policy(copy.deepcopy(module)), PaddedLoop(copy.deepcopy(module), config)
    data, learner = assemble(batch), Learner(policy, Algorithm.of(AlgorithmConfig()), config)
    everything = torch.arange(len(data.samples))
    logprobs = learner.logprobs(policy, data, everything)
    learner.backward(data, learner.prepare(data), everything)
    others = padded.gradients(batch)
    pairs = [(own.grad, other.grad) for own, other in zip(policy.module.parameters(), padded.module.parameters(), strict=True)]
    largest = max(float(other.abs().max()) for _, other in pairs)
    return {
        "logprob": float((logprobs - others).abs().max()),
        "gradient": max(float((own - other).abs().max()) for own, other in pairs) / largest,
    }


def learner_table(results: Sequence[Mapping[str, Any]]) -> str:
    """One row a model and case, in Markdown."""
    from april.bench.table import rows_of, spread_text

    header = ("batch", "prompt", "response tokens", "longest", "April, tokens/s", "padded loop, tokens/s", "April is")
    rows = [
        [
            f"{item['options']['model']}, {case['name']}",
            str(case["prompt_tokens"]),
            str(case["lengths"]["total"]),
            str(case["lengths"]["max"]),
            *(spread_text(case["tokens_per_s"][side], 0) for side in ("april", "padded")),
            spread_text(case["ratio"], 2) + "x",
        ]
        for item in results
        for case in item["cases"]
    ]
    return rows_of(header, rows)
