"""The learner against the oracle: given the same samples, `Trainer.update` and the plain loop make the same weights."""

from __future__ import annotations

import copy
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from april.algorithms.spec import AlgorithmConfig
from april.core.group import Batch, Group, Reward
from april.core.ids import GroupId
from april.core.metric import values
from april.core.prompt import Prompt
from april.core.random import permutation, sample_key, stream_key, uniforms
from april.core.sample import Sample, Segment
from april.core.sampling import SamplingSpec
from april.models.policy import Policy
from april.testing.toy_model import toy_model
from april.training.config import TrainerConfig
from april.training.single import Trainer

EOS = 0


def load_oracle() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "examples" / "minimal_grpo.py"
    spec = importlib.util.spec_from_file_location("minimal_grpo", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["minimal_grpo"] = module
    spec.loader.exec_module(module)
    return module


oracle = load_oracle()


def tiny(kind: str = "qwen3") -> Any:
    return toy_model(kind, dtype=torch.float64, vocab_size=12, hidden_size=16, num_heads=2, num_kv_heads=1)  # type: ignore[arg-type]


def reward(problem: Any, token_ids: list[int]) -> float:
    """Many odd tokens and an early end are good; graded, so that groups seldom agree."""
    return sum(token % 2 for token in token_ids) / 10 - 0.02 * len(token_ids)


def as_batch(step: Any, number: int, options: Any) -> Batch:
    """The oracle's samples as the framework's data."""
    groups = []
    spec = SamplingSpec(options.max_new_tokens, temperature=options.temperature, stop_token_ids=(EOS,), seed=options.seed)
    for index, (problem, responses, rewards) in enumerate(zip(step.problems, step.responses, step.rewards, strict=True)):
        group = GroupId(number * len(step.problems) + index, 0, problem.id)
        prompt = Prompt(problem.id, np.array(problem.token_ids))
        samples = []
        for member, response in enumerate(responses):
            segment = Segment(np.array(response.token_ids), np.array(response.logprobs), number)
            stop = "eos" if response.token_ids[-1] == EOS else "length"
            samples.append(Sample(group.member(member), prompt, spec).extended(segment).finished(stop))  # type: ignore[arg-type]
        groups.append(Group(group, tuple(samples), tuple(Reward(value) for value in rewards)))
    return Batch(number, number, tuple(groups))


def options(**changes: Any) -> Any:
    plain = {
        "steps": 4,
        "prompts_per_step": 3,
        "group_size": 4,
        "max_new_tokens": 12,
        "eos_ids": (EOS,),
        "lr": 3e-3,
        "temperature": 0.9,
    }
    return oracle.Options(**(plain | changes))


PROBLEMS = [(f"p{i}", list(range(2, 4 + i))) for i in range(5)]


def run_both(
    opts: Any, *, kind: str = "qwen3", algorithm: dict[str, Any] | None = None, micro_batch_tokens: int = 40
) -> tuple[float, list[dict[str, float]], list[Any]]:
    """Train twins; returns the largest difference of any weight after any step, our metrics, and the oracle's steps."""
    theirs = tiny(kind)
    ours = Policy(copy.deepcopy(theirs))
    config = TrainerConfig(lr=opts.lr, max_grad_norm=opts.max_grad_norm, micro_batch_tokens=micro_batch_tokens, dtype="float64")
    trainer = Trainer(ours, AlgorithmConfig.model_validate(algorithm or {}), config)
    worst, metrics, steps = 0.0, [], []
    problems = [oracle.Problem(name, ids) for name, ids in PROBLEMS]
    for number, step in enumerate(oracle.train(theirs, problems, reward, opts)):
        metrics.append(values(trainer.update(as_batch(step, number, opts))))
        steps.append(step)
        weights = theirs.state_dict()
        worst = max(worst, *(float((weights[name] - mine).abs().max()) for name, mine in trainer.weights().items()))
    return worst, metrics, steps


def test_random_streams_and_orders_are_those_of_the_package() -> None:
    sample = GroupId(7, 2, "p1").member(3)
    key = oracle.stream_key(5, 2, "p1", 7, 3, "")
    assert key == sample_key(5, sample) and oracle.stream_key(5, "order", 1) == stream_key(5, "order", 1)
    ours = uniforms([key] * 50, np.arange(50))
    assert [oracle.uniform(key, t) for t in range(50)] == ours.tolist()
    order = oracle.prompt_order(list(range(9)), 4)
    taken = [next(order) for _ in range(18)]
    assert [x for _, x in taken] == [*permutation(4, 0, 9).tolist(), *permutation(4, 1, 9).tolist()] and taken[9][0] == 1


def test_sampled_log_probs_are_those_of_the_padded_forward() -> None:
    model, opts = tiny(), options()
    problem = oracle.Problem("p", [2, 3, 4])
    step = oracle.collect(model, [(0, 0, problem)], reward, opts)
    sequences = [(problem.token_ids, response.token_ids) for response in step.responses[0]]
    logprobs, mask = oracle.response_logprobs(model, sequences, opts.temperature)
    recorded = [x for response in step.responses[0] for x in response.logprobs]
    assert len({len(response.token_ids) for response in step.responses[0]}) > 1
    assert torch.allclose(logprobs[mask], torch.tensor(recorded, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
def test_the_learner_equals_the_plain_loop_step_by_step(kind: str) -> None:
    worst, metrics, steps = run_both(options(), kind=kind)
    assert worst < 1e-9
    assert all(m["optimizer_steps"] == 1 and m["num_failed_samples"] == 0 for m in metrics)
    for ours, theirs in zip(metrics, steps, strict=True):
        assert ours["loss"] == pytest.approx(theirs.loss, abs=1e-9)
        assert ours["grad_norm"] == pytest.approx(theirs.grad_norm, rel=1e-7)


def test_other_algorithms_do_not_equal_it() -> None:
    for algorithm in ({"aggregate": "token_mean"}, {"advantage": {"type": "group", "std": "population"}, "adjust": ["whiten"]}):
        worst, _, _ = run_both(options(steps=2), algorithm=algorithm)
        assert worst > 1e-5


def test_the_correction_changes_nothing_when_the_engine_agrees() -> None:
    worst, metrics, _ = run_both(options(steps=2), algorithm={"weights": {"tis": {"cap": 2.0}}})
    assert worst < 1e-6  # behaviour log-probs are recorded in float32
    assert all(m["mismatch_abs_max"] < 1e-6 and abs(m["weight_mean"] - 1) < 1e-6 for m in metrics)


def test_a_step_without_signal_is_skipped_by_both() -> None:
    opts = options(steps=1, max_new_tokens=1, lr=1.0)
    theirs = tiny()
    before = copy.deepcopy(theirs.state_dict())
    trainer = Trainer(Policy(copy.deepcopy(theirs)), AlgorithmConfig(), TrainerConfig(lr=1.0, dtype="float64"))
    (step,) = oracle.train(theirs, [oracle.Problem("p", [2])] * 3, lambda problem, ids: 0.25, opts)
    metrics = values(trainer.update(as_batch(step, 0, opts)))
    assert metrics["skipped_steps"] == 1 and trainer.version == 1
    for weights in (theirs.state_dict(), trainer.weights()):
        assert all(torch.equal(weights[name], before[name]) for name in before)
