"""The value model: what reward is to be expected before each response token, learned beside the policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from april.algorithms.bind import Algorithm
from april.algorithms.columns import TokenBatch
from april.algorithms.losses.compose import shares, value_loss
from april.core.errors import ModelError
from april.core.metric import Mean, Metrics, Sum, merge
from april.models.policy import Policy
from april.training.batch import TrainingBatch
from april.training.config import TrainerConfig
from april.training.optim import adamw, guarded_step
from april.training.step import sequences_of, split


class ValueModel:
    """A copy of the policy's trunk with a linear head, and the optimiser of both.

    The value of a token is that of the state before it: the hidden state that predicts the token. The head starts at 0, so the
    first values are 0 and an advantage is then the plain return.

    Attributes:
        trunk: its copy of the policy with a `value_head`, (D) -> (1); the vocabulary projection has no part in it. Where the
            policy has adapters, so has the trunk, on the same base, and only those and the head are trained.
        num_updates: batches it was trained on.
    """

    def __init__(self, policy: Policy, algorithm: Algorithm, config: TrainerConfig) -> None:
        """Copy the policy.

        Args:
            policy: the trunk's first weights.
            algorithm: its objectives of role "value".
            config: micro-batches, and under `value` the optimiser.
        """
        self.trunk, self.num_updates = policy.copy(), 0
        width = int(self.trunk.module.config.get_text_config().hidden_size)
        head = nn.Linear(width, 1, device=policy.device, dtype=policy.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        self.trunk.module.value_head = head
        self._algorithm, self._config = algorithm, config
        self._optimizer = adamw(self.trunk.module.parameters(), config.value)

    @property
    def warming_up(self) -> bool:
        """Whether the policy waits for it."""
        return self.num_updates < self._config.value.warmup_steps

    def values(self, batch: TrainingBatch) -> Tensor:
        """float64 (N,) on the CPU: the value before each response token, without gradient."""
        out = torch.zeros(batch.tokens.layout.num_tokens, dtype=torch.float64)
        samples = torch.arange(batch.tokens.layout.num_samples)
        for micro in split(batch, samples, self._config.micro_batch_tokens, self.trunk):
            _, rows = batch.tokens.layout.take(micro)
            with torch.no_grad():
                out[rows] = self.trunk.response_values(sequences_of(batch, micro)).to("cpu", torch.float64)
        return out

    def update(self, batch: TrainingBatch, tokens: TokenBatch, parts: list[Tensor]) -> Metrics:
        """Passes over the mini-batches, one optimiser step each, on "return".

        Args:
            batch: the whole batch.
            tokens: its columns with "value" and "return".
            parts: the samples of each mini-batch.

        Raises:
            ModelError: a loss or gradient is not finite and the recipe does not skip it.
        """
        metrics = [_quality(tokens)]
        for _ in range(self._config.value.num_epochs):
            metrics += [self._step(batch, shares(self._algorithm, tokens.take(part)), part) for part in parts]
        self.num_updates += 1
        return merge(metrics)

    def _step(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> Metrics:
        self._optimizer.zero_grad(set_to_none=True)
        chosen = torch.nonzero(tokens.layout.sum(tokens["trained"].double()) > 0).squeeze(1)
        if len(chosen) == 0:
            return {}
        where = f"value model, update {batch.step}"
        try:
            losses = self._gradients(batch, tokens.take(chosen), samples[chosen], where)
            norm = guarded_step(self._optimizer, self._config.value.max_grad_norm, where)
        except ModelError:
            if self._config.nonfinite == "raise":
                raise
            return {"nonfinite_steps": Sum(1)}
        finally:
            self._optimizer.zero_grad(set_to_none=True)
        metrics: Metrics = {name: Mean(sum(part[name] for part in losses), 1) for name in losses[0]}
        return metrics | {"value_grad_norm": Mean(norm, 1), "value_optimizer_steps": Sum(1)}

    def _gradients(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor, where: str) -> list[dict[str, float]]:
        """Backward passes of all micro-batches, and their parts of the loss."""
        found: list[dict[str, float]] = []
        for micro in split(batch, samples, self._config.micro_batch_tokens, self.trunk):
            total, parts = self._loss(batch, tokens.take(micro), samples[micro])
            if not bool(torch.isfinite(total)):
                raise ModelError("the loss is not finite", where=where, got=float(total.detach()))
            total.backward()  # type: ignore[no-untyped-call]
            found.append(parts)
        return found

    def _loss(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> tuple[Tensor, dict[str, float]]:
        predicted = self.trunk.response_values(sequences_of(batch, samples))
        total, parts = value_loss(self._algorithm, predicted, tokens.to(predicted.device, predicted.dtype))
        return total, {name: float(part) for name, part in parts.items()}

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser and count; tensors are its own memory."""
        return {
            "weights": self.trunk.state(),
            "optimizer": self._optimizer.state_dict(),
            "num_updates": self.num_updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken."""
        self.trunk.load_state(state["weights"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.num_updates = int(state["num_updates"])

    def read_shards(self, folder: Path, small: Mapping[str, Any]) -> dict[str, Any]:
        """What is missing in a state that several ranks wrote; see `april.training.sharded_checkpoint`."""
        from april.training.sharded_checkpoint import VALUE_FOLDER, read_shards

        return read_shards(folder / VALUE_FOLDER, self.trunk.module, self._optimizer, small)


def _quality(tokens: TokenBatch) -> Metrics:
    """How well the values before the update foretell the returns: 1 - var(return - value) / var(return)."""
    mask = tokens["trained"]
    value, target = tokens["value"][mask], tokens["return"][mask]
    count = float(len(value))
    metrics: Metrics = {
        "value_mean": Mean(float(value.sum()), count),
        "return_mean": Mean(float(target.sum()), count),
    }
    if len(target) > 1 and float(target.var()) > 0:
        metrics["value_explained_variance"] = Mean(1 - float((target - value).var() / target.var()), 1)
    return metrics
