"""Warm start: the loss is that of completions only, it falls, and it repeats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from learner_fixtures import VOCABULARY, small_policy, snapshot

from april.core.errors import DataError
from april.models.policy import Policy
from april.training.config import SupervisedConfig
from april.training.supervised import Example, Progress, train_supervised


def examples(count: int = 12) -> list[Example]:
    """The completion repeats the last prompt token and ends with 0."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, VOCABULARY, rng.integers(1, 5)).astype(np.int32) for _ in range(count)]
    return [Example(prompt, np.array([prompt[-1], prompt[-1], 0], np.int32)) for prompt in prompts]


def config(**changes: object) -> SupervisedConfig:
    return SupervisedConfig(**({"num_steps": 30, "batch_size": 8, "lr": 1e-2, "warmup_steps": 3} | changes))  # type: ignore[arg-type]


def test_the_first_loss_is_the_mean_cross_entropy_of_completion_tokens() -> None:
    policy, data = small_policy(), examples(8)
    losses = []
    for example in data:
        ids = torch.tensor([*example.prompt.tolist(), *example.completion.tolist()])[None]
        logprobs = policy.module(input_ids=ids).logits[0].log_softmax(-1)[len(example.prompt) - 1 : -1]  # type: ignore[operator]
        losses += (-logprobs.gather(1, torch.tensor(example.completion.tolist())[:, None])[:, 0]).tolist()
    (first,) = train_supervised(small_policy(), data, config(num_steps=1, micro_batch_tokens=9))
    assert first.loss == pytest.approx(float(np.mean(losses)), abs=1e-9) and first.num_tokens == 24


def test_the_loss_falls_and_progress_is_told() -> None:
    seen: list[Progress] = []
    records = train_supervised(small_policy(dtype=torch.float32), examples(), config(), seen.append)
    assert seen == records and [record.step for record in records] == list(range(30))
    assert records[-1].loss < 0.5 * records[0].loss
    assert records[0].lr == pytest.approx(1e-2 / 3) and records[-1].lr < 1e-3


def test_it_repeats_bit_for_bit_and_depends_on_the_seed() -> None:
    def trained(seed: int) -> dict[str, torch.Tensor]:
        policy = small_policy(dtype=torch.float32)
        train_supervised(policy, examples(), config(num_steps=4, seed=seed))
        return snapshot(policy)

    one, two, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_micro_batches_change_nothing() -> None:
    policies = [small_policy(), small_policy()]
    for policy, budget in zip(policies, (7, 10_000), strict=True):
        train_supervised(policy, examples(), config(num_steps=2, micro_batch_tokens=budget))
    a, b = (snapshot(policy) for policy in policies)
    assert all(torch.allclose(a[name], b[name], atol=1e-9) for name in a)


def test_the_result_is_an_ordinary_folder_that_continues(tmp_path: Path) -> None:
    policy = small_policy(dtype=torch.float32)
    records = train_supervised(policy, examples(), config())
    policy.save(tmp_path)
    again = train_supervised(Policy.load(tmp_path), examples(), config(num_steps=1))
    assert again[0].loss < 0.6 * records[0].loss


def test_no_examples_is_an_error() -> None:
    with pytest.raises(DataError, match="nothing to train on") as error:
        train_supervised(small_policy(), [], config())
    assert "0 examples" in str(error.value)
