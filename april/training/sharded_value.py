"""The value model of one rank: weights in parts, samples dealt out, as `april.training.sharded_step` does with the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from april.algorithms.bind import Algorithm
from april.algorithms.columns import TokenBatch
from april.core.errors import AprilError, ModelError
from april.models.policy import Policy
from april.training.batch import TrainingBatch
from april.training.config import TrainerConfig
from april.training.optim import adamw
from april.training.sharded_checkpoint import VALUE_FOLDER, in_parts, save_shards
from april.training.sharded_policy import ShardedPolicy
from april.training.sharded_ranks import Ranks
from april.training.sharded_step import backward_in_rounds, rounds, shortest
from april.training.step import sequences_of
from april.training.value import ValueModel


class ShardedValueModel(ValueModel):
    """See `ValueModel`; every method is called by all ranks with the same arguments, and returns the same on all.

    Args:
        policy: whole; is copied, and the copy is cut.
        algorithm, config: see `ValueModel`.
        ranks: who shares it.
    """

    def __init__(self, policy: Policy, algorithm: Algorithm, config: TrainerConfig, ranks: Ranks) -> None:
        super().__init__(policy, algorithm, config)
        self._ranks = ranks
        self.trunk = ShardedPolicy(self.trunk, ranks, config)
        self._optimizer = adamw(self.trunk.module.parameters(), config.value)

    def values(self, batch: TrainingBatch) -> Tensor:
        """float64 (N,) on the CPU: the value before each response token, without gradient."""
        out = torch.zeros(batch.tokens.layout.num_tokens, dtype=torch.float64)
        samples = torch.arange(batch.tokens.layout.num_samples)
        for micro in self._rounds(batch, samples):
            chosen = shortest(batch, samples) if micro is None else micro
            with torch.no_grad():
                values = self.trunk.response_values(sequences_of(batch, samples[chosen]))
            if micro is not None:
                out[batch.tokens.layout.take(micro)[1]] = values.to("cpu", torch.float64)
        return self._ranks.sum(out)

    def _rounds(self, batch: TrainingBatch, samples: Tensor) -> list[Tensor | None]:
        return rounds(self._ranks, batch, samples, self._config.micro_batch_tokens, self.trunk)

    def _gradients(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor, where: str) -> list[dict[str, float]]:
        def forward(micro: Tensor) -> tuple[Tensor, Callable[[], dict[str, float]], AprilError | None]:
            total, parts = self._loss(batch, tokens.take(micro), samples[micro])
            finite = bool(torch.isfinite(total))
            problem = None if finite else ModelError("the loss is not finite", where=where, got=float(total.detach()))
            return total, lambda: parts, problem

        def company() -> Tensor:
            return self.trunk.response_values(sequences_of(batch, samples[shortest(batch, samples)])).sum()

        return backward_in_rounds(self._ranks, self._rounds(batch, samples), forward, company)

    def save(self, folder: Path) -> dict[str, Any]:
        """Write the parts of this rank; returns what reading them needs besides, small."""
        return {"num_updates": self.num_updates} | save_shards(folder / VALUE_FOLDER, self.trunk.module, self._optimizer)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, here or in one process."""
        super().load_state_dict(in_parts(state, self.trunk.module, self._optimizer))
