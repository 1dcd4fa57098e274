"""Small policies and batches for the learner's tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from april.core.group import Batch, Failure, Group, Outcome, Reward
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample, Segment
from april.core.sampling import SamplingSpec
from april.models.policy import Policy
from april.testing.toy_model import toy_model

VOCABULARY = 17


def small_policy(kind: str = "qwen3", dtype: torch.dtype = torch.float64, seed: int = 0) -> Policy:
    """Two layers of width 16."""
    module = toy_model(kind, dtype=dtype, seed=seed, vocab_size=VOCABULARY, hidden_size=16, num_heads=2, num_kv_heads=1)  # type: ignore[arg-type]
    return Policy(module)


def make_sample(
    group: GroupId,
    member: int,
    length: int,
    rng: np.random.Generator,
    versions: Sequence[tuple[int, int]] = (),
    temperature: float = 1.0,
) -> Sample:
    """A finished sample of random tokens; `versions` are (length, version) runs, else all of version 0."""
    prompt = Prompt(group.prompt, np.arange(2, 5 + group.serial % 3))
    sample = Sample(group.member(member), prompt, SamplingSpec(64, temperature=temperature))
    for count, version in versions or ((length, 0),):
        tokens = rng.integers(2, VOCABULARY, count)
        sample = sample.extended(Segment(tokens, -2.5 - rng.random(count), version))
    return sample.finished("eos")


def make_group(
    serial: int,
    rewards: Sequence[float | None],
    rng: np.random.Generator,
    *,
    lengths: Sequence[int] = (),
    temperature: float = 1.0,
) -> Group:
    """A group with these rewards; None is a failed member."""
    group = GroupId(serial, 0, f"p{serial}")
    sizes = lengths or [int(n) for n in rng.integers(1, 9, len(rewards))]
    samples = tuple(make_sample(group, i, n, rng, temperature=temperature) for i, n in enumerate(sizes))
    outcomes: list[Outcome] = [Failure("lost") if r is None else Reward(r, correct=r >= 1) for r in rewards]
    return Group(group, samples, tuple(outcomes))


def make_batch(
    rewards: Sequence[Sequence[float | None]], *, seed: int = 0, step: int = 0, version: int = 0, temperature: float = 1.0
) -> Batch:
    """One group for each list of rewards."""
    rng = np.random.default_rng(seed)
    groups = tuple(make_group(i, row, rng, temperature=temperature) for i, row in enumerate(rewards))
    return Batch(step, version, groups)


def snapshot(policy: Policy) -> dict[str, torch.Tensor]:
    """A copy of the weights."""
    return {name: tensor.clone() for name, tensor in policy.weights().items()}
