"""Warm start: next-token training on worked completions, from scratch or from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from april.core.errors import DataError, ModelError
from april.core.prompt import Tokens
from april.core.random import permutation
from april.models.policy import PackedSequences, Policy
from april.training.config import SupervisedConfig, learning_rate
from april.training.optim import adamw, clip_gradients, set_learning_rate
from april.training.pack import micro_batches


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """What to continue and how; int32 (P,) and (T,). The completion ends with its end-of-sequence token."""

    prompt: Tokens
    completion: Tokens


@dataclass(frozen=True, slots=True)
class Progress:
    """One finished step: its number from 0, loss in nats a token, gradient norm, learning rate, and tokens trained so far."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    num_tokens: int


def train_supervised(
    policy: Policy, examples: Sequence[Example], config: SupervisedConfig, progress: Callable[[Progress], None] | None = None
) -> list[Progress]:
    """Minimise the mean cross-entropy of completion tokens; weights change in place.

    Each step takes the next `batch_size` examples of an addressed order that starts anew with every pass.

    Args:
        policy: what to train; `policy.save` writes the result as a Hugging Face folder.
        examples: all data.
        config: the options.
        progress: called after every step.

    Returns:
        One record a step.

    Raises:
        DataError: no examples.
        ModelError: a gradient is not finite.
    """
    if not examples:
        raise DataError("there is nothing to train on", where="warm start", got="0 examples", expected="at least one")
    optimizers = _optimizers(policy, config)
    out: list[Progress] = []
    num_tokens = 0
    for step in range(config.num_steps):
        lr = learning_rate(config, step, config.num_steps)
        for optimizer, share in optimizers:
            set_learning_rate(optimizer, lr * share)
        chosen = [examples[index] for index in _indices(step, len(examples), config)]
        policy.module.zero_grad(set_to_none=True)
        loss, count = _backward(policy, chosen, config.micro_batch_tokens)
        norm = clip_gradients([p.grad for p in policy.module.parameters() if p.grad is not None], config.max_grad_norm)
        if not np.isfinite(norm):
            raise ModelError(
                "the gradient is not finite", where=f"warm start, step {step}", got=norm, hint="lower the learning rate"
            )
        for optimizer, _ in optimizers:
            optimizer.step()
        num_tokens += count
        out.append(Progress(step, loss, norm, lr, num_tokens))
        if progress is not None:
            progress(out[-1])
    policy.module.zero_grad(set_to_none=True)
    return out


def _optimizers(policy: Policy, config: SupervisedConfig) -> list[tuple[torch.optim.Optimizer, float]]:
    """Each optimiser with its share of the scheduled learning rate.

    Muon (Jordan et al. 2024) orthogonalises the momentum of hidden matrices; embeddings, the output layer and vectors keep AdamW.
    """
    if not config.muon_lr:
        return [(adamw(policy.module.parameters(), config), 1.0)]
    embedding = {id(layer.weight) for layer in (policy.module.get_input_embeddings(), policy.module.get_output_embeddings())}  # type: ignore[operator]
    hidden = [p for p in policy.module.parameters() if p.ndim == 2 and id(p) not in embedding]
    others = [p for p in policy.module.parameters() if p.ndim != 2 or id(p) in embedding]
    muon = torch.optim.Muon(hidden, lr=config.muon_lr, momentum=0.95, weight_decay=config.weight_decay)
    return [(adamw(others, config), 1.0), (muon, config.muon_lr / config.lr)]


def _indices(step: int, size: int, config: SupervisedConfig) -> list[int]:
    """The examples of a step: a window of the endless sequence of shuffled passes."""
    places = range(step * config.batch_size, (step + 1) * config.batch_size)
    orders = {epoch: permutation(config.seed, epoch, size) for epoch in {place // size for place in places}}
    return [int(orders[place // size][place % size]) for place in places]


def _backward(policy: Policy, examples: Sequence[Example], budget_tokens: int) -> tuple[float, int]:
    """Add the gradient of the mean loss; returns that loss and the number of tokens."""
    lengths = [len(example.prompt) + len(example.completion) for example in examples]
    count = sum(len(example.completion) for example in examples)
    total = 0.0
    for part in micro_batches(lengths, budget_tokens, padded=not policy.packed):
        sequences = PackedSequences.of([examples[i].prompt for i in part], [examples[i].completion for i in part])
        loss = -policy.response_logprobs(sequences, torch.ones(len(sequences.rows))).logprobs.sum() / count
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total, count
