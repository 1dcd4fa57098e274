"""Seconds that a training step spends outside the model: from groups to columns, credit, shares, loss weights and metrics."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch

from april.algorithms.bind import Algorithm
from april.algorithms.columns import TokenBatch
from april.algorithms.losses.compose import Loss, credit, policy_loss, stage
from april.algorithms.spec import AlgorithmConfig
from april.core.group import Batch, Group, Reward
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment
from april.core.sampling import SamplingSpec
from april.training.batch import TrainingBatch, assemble
from april.training.metrics import batch_metrics, loss_metrics
from april.training.notes import signal_metrics
from april.training.pack import micro_batches


@dataclass(frozen=True)
class ColumnsOptions:
    """Size of the step.

    Attributes:
        algorithm: the atoms.
        name: of the algorithm, for the results.
        tokens: about so many response tokens in all.
        samples: S.
        group_size: G.
        micro_batch_tokens: as in a recipe; the loss runs in micro-batches.
        rounds: how often it is measured, after one run that is not.
        threads: CPU threads of torch.
    """

    algorithm: AlgorithmConfig
    name: str = "grpo"
    tokens: int = 1_000_000
    samples: int = 8192
    group_size: int = 8
    micro_batch_tokens: int = 65536
    rounds: int = 5
    threads: int = 2


def run_columns_bench(options: ColumnsOptions) -> dict[str, Any]:
    """Measure the stages of one step.

    Returns:
        Seconds of each stage and of all, the median over rounds; CPU seconds of a round over all threads, which tell how far
        other work on the machine disturbed the clock; and what was measured.
    """
    torch.set_num_threads(options.threads)
    batch = make_step(options)
    atoms = Algorithm.of(options.algorithm)
    _one_round(atoms, batch, options)
    before_s = time.process_time()
    rounds = [_one_round(atoms, batch, options) for _ in range(options.rounds)]
    cpu_s = (time.process_time() - before_s) / options.rounds
    stages = {name: median(row[name] for row in rounds) for name in rounds[0]}
    tokens = sum(len(sample) for group in batch.groups for sample in group.samples)
    return {
        "algorithm": options.name,
        "num_tokens": tokens,
        "num_samples": options.samples,
        "threads": options.threads,
        "stages_s": stages,
        "total_s": median(sum(row.values()) for row in rounds),
        "cpu_s": cpu_s,
        "rounds_s": [sum(row.values()) for row in rounds],
    }


def make_step(options: ColumnsOptions, seed: int = 0) -> Batch:
    """A batch of samples with log-normal lengths, two segments of different age each, and rewards of 0 or 1."""
    rng = np.random.default_rng(seed)
    num_groups = options.samples // options.group_size
    lengths = rng.lognormal(0.0, 0.8, options.samples)
    sizes = np.maximum(2, lengths * options.tokens / lengths.sum()).astype(int).reshape(num_groups, options.group_size)
    groups = []
    for serial in range(num_groups):
        group = GroupId(serial, 0, f"p{serial}")
        prompt = Prompt(group.prompt, np.arange(2, 34, dtype=np.int32))
        samples = tuple(_sample(group, prompt, member, int(size), rng) for member, size in enumerate(sizes[serial]))
        solved = rng.integers(0, 2, options.group_size)
        groups.append(
            Group(group, samples, tuple(Reward(float(right), bool(right), {"exact": float(right)}) for right in solved))
        )
    return Batch(5, 5, tuple(groups))


def _sample(group: GroupId, prompt: Prompt, member: int, size: int, rng: np.random.Generator) -> Sample:
    sample = Sample(group.member(member), prompt, SamplingSpec(max(1, size)))
    for count, version in ((size // 2, 3), (size - size // 2, 5)):
        ids, (logprobs, entropies) = rng.integers(2, 1000, count, dtype=np.int32), rng.random((2, count), dtype=np.float32)
        sample = sample.extended(Segment(ids, -logprobs, version, entropies=entropies))
    return sample.finished("eos")


def _one_round(atoms: Algorithm, batch: Batch, options: ColumnsOptions) -> dict[str, float]:
    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
        return result

    data: TrainingBatch = timed("assemble", lambda: assemble(batch, None, atoms.config.requires))
    tokens = data.tokens.with_columns(**_model_columns(data))  # what forwards of models would bring
    tokens = timed("credit", lambda: credit(atoms, tokens))
    timed("batch_metrics", lambda: (batch_metrics(data, tokens), signal_metrics(data)))
    tokens = timed("stage", lambda: stage(atoms, tokens))
    lengths = [len(sample.prompt.token_ids) + len(sample) for sample in data.samples]
    groups, whole = data.tokens.layout.group_of_sample.tolist(), atoms.whole_groups
    parts = timed("micro_batches", lambda: micro_batches(lengths, options.micro_batch_tokens, groups=groups, whole=whole))
    for part in parts:
        micro = timed("take", partial(_micro, tokens, part))
        current = (micro["behaviour"] + 0.01).requires_grad_()
        loss = timed("loss", partial(_backward, atoms, current, micro))
        with torch.no_grad():
            timed("loss_metrics", partial(loss_metrics, loss, micro, None))
    return seconds


def _model_columns(data: TrainingBatch) -> dict[str, torch.Tensor]:
    behaviour = data.tokens["behaviour"]
    near = dict.fromkeys(("proximal", "reference", "current"), behaviour - 0.01)
    return near | dict.fromkeys(("value", "current_entropy"), -behaviour)


def _micro(tokens: TokenBatch, part: list[int]) -> TokenBatch:
    return tokens.take(torch.tensor(part)).to(torch.device("cpu"), torch.float32)


def _backward(atoms: Algorithm, current: torch.Tensor, micro: TokenBatch) -> Loss:
    loss = policy_loss(atoms, current, micro)
    if loss.total.requires_grad:
        loss.total.backward()  # type: ignore[no-untyped-call]
    return loss
