"""The whole framework against the one-file oracle: the same tokens, log-probs, rewards and weights, step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from april.config.resolve import resolve
from april.core.group import Batch
from april.run.loop import Run
from april.training.single import Trainer
from tests.integration.test_oracle_learner import oracle

STEPS = 3
TOLERANCE = 2e-8
"""Of weights after updates of size 1e-3; transformers takes norms in float32 even in float64 models: the last bit may differ."""
SIZES = (
    f"steps={STEPS}",
    "task.size=60",
    "sampling.max_new_tokens=24",
    "batch.groups_per_step=4",
    "batch.group_size=4",
    "engine.max_running=16",
    "training.dtype=float64",
    "training.lr=1e-3",
    "algorithm.bounds.high=1.2",
    "algorithm.aggregate.type=sequence_mean",
    "algorithm.weights.tis=false",
    "evaluation.num_problems=4",
    "evaluation.modes=['greedy']",
    "checkpoint.every_steps=0",
    "observe.timeline=false",
    "seed=3",
)


def framework_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str
) -> tuple[Run, list[Batch], list[dict[str, torch.Tensor]]]:
    """A run, with the batch of each update and the weights after it."""
    batches: list[Batch] = []
    weights: list[dict[str, torch.Tensor]] = []
    plain_update = Trainer.update

    def update(self: Trainer, batch: Batch) -> Any:
        metrics = plain_update(self, batch)
        batches.append(batch)
        weights.append({name: tensor.clone() for name, tensor in self.weights().items()})
        return metrics

    monkeypatch.setattr(Trainer, "update", update)
    run = Run(resolve("quickstart", overrides=[*SIZES, f"out='{folder}'", *more]), quiet=None)
    run.run()
    return run, batches, weights


def oracle_steps(run: Run) -> tuple[list[Any], list[dict[str, torch.Tensor]]]:
    """The same run by the oracle: its steps, and the weights after each."""
    from transformers import AutoModelForCausalLM

    from april.run.build import model_path

    recipe, prompts, verifier = run.parts.recipe, run.parts.data.train, run.parts.verifier
    model = AutoModelForCausalLM.from_pretrained(model_path("packaged"), dtype=torch.float64)
    problems = [oracle.Problem(prompt.id, prompt.token_ids.tolist(), prompt) for prompt in prompts]

    def reward(problem: Any, token_ids: list[int]) -> float:
        text = run.parts.tokenizer.decode(token_ids)
        return float(verifier(text, None, problem.item.item).value)  # type: ignore[arg-type, union-attr]

    options = oracle.Options(
        steps=STEPS,
        prompts_per_step=recipe.batch.groups_per_step,
        group_size=recipe.batch.group_size,
        max_new_tokens=recipe.sampling.max_new_tokens,
        eos_ids=run.parts.tokenizer.eos_ids,
        seed=recipe.seed,
        lr=recipe.training.lr,
    )
    steps, weights = [], []
    for step in oracle.train(model, problems, reward, options):
        steps.append(step)
        weights.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    return steps, weights


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def check_same_samples(batch: Batch, step: Any) -> None:
    assert [group.id.prompt for group in batch.groups] == [problem.id for problem in step.problems]
    for group, responses, rewards in zip(batch.groups, step.responses, step.rewards, strict=True):
        assert [reward.value for _, reward in group.rewarded] == rewards
        for sample, response in zip(group.samples, responses, strict=True):
            assert sample.token_ids.tolist() == response.token_ids
            np.testing.assert_allclose(sample.behaviour_logprobs, response.logprobs, rtol=0, atol=1e-6)  # kept in float32


def test_a_synchronous_run_equals_the_oracle_step_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, batches, weights = framework_run(tmp_path / "run", monkeypatch, "schedule.type=sync")
    steps, expected = oracle_steps(run)
    for step in range(STEPS):
        check_same_samples(batches[step], steps[step])
        assert largest_difference(weights[step], expected[step]) < TOLERANCE, f"weights differ after step {step}"
    assert any(len(set(rewards)) > 1 for step in steps for rewards in step.rewards), "without signal nothing was compared"


def test_partial_rollouts_with_nothing_in_excess_equal_the_oracle_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, batches, weights = framework_run(tmp_path / "run", monkeypatch, "schedule.over_provision=1", "schedule.max_lag_steps=0")
    steps, expected = oracle_steps(run)
    for step in range(STEPS):
        check_same_samples(batches[step], steps[step])
        assert largest_difference(weights[step], expected[step]) < TOLERANCE


def test_the_equality_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, weights = framework_run(tmp_path / "run", monkeypatch, "schedule.type=sync", "algorithm.aggregate.type=token_mean")
    _, expected = oracle_steps(run)
    assert largest_difference(weights[-1], expected[-1]) > 100 * TOLERANCE
