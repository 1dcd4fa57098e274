"""The trainer on several ranks (`training.ranks` above 1): weights, gradients and optimiser in parts, samples dealt out.

Every rank gets the same batches and keeps the same columns; only model forwards are shared out. So credit, statistics and
denominators are those of one process, and so is the update: equal up to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from april.algorithms.spec import AlgorithmConfig
from april.core.clock import Clock
from april.core.errors import RecipeError
from april.models.policy import Policy
from april.training.config import TrainerConfig
from april.training.sharded_checkpoint import in_parts, save_shards
from april.training.sharded_policy import ShardedPolicy
from april.training.sharded_ranks import Ranks
from april.training.sharded_step import ShardedLearner
from april.training.single import Trainer


class ShardedTrainer(Trainer):
    """See `Trainer`; every method is called by all ranks together, with the same arguments.

    Attributes:
        ranks: who they are.
    """

    def __init__(
        self,
        policy: Policy,
        algorithm: AlgorithmConfig,
        config: TrainerConfig,
        *,
        ranks: Ranks,
        reference: Policy | None = None,
        clock: Clock | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Cut the policy into parts and set up the optimiser on them.

        Args:
            policy: whole, the same on every rank; its module is taken over.
            algorithm: the atoms.
            config: the options.
            ranks: who shares the work.
            reference: frozen, for penalties; is cut, too.
            clock: dates the events.
            total_steps: see `Trainer`.

        Raises:
            RecipeError: the algorithm has a value model.
        """
        if "value" in algorithm.requires:
            raise RecipeError(
                "a value model is trained on one rank only",
                where="training.ranks, algorithm",
                got=f"{ranks.count} ranks, and an atom that reads values",
                hint="set training.ranks = 1",
            )
        whole = None if reference is None else ShardedPolicy(_frozen(reference), ranks, config)
        super().__init__(
            ShardedPolicy(policy, ranks, config), algorithm, config, reference=whole, clock=clock, total_steps=total_steps
        )
        self.ranks = ranks
        self._learner = ShardedLearner(self.policy, self._algorithm, config, whole, ranks=ranks)

    def weights(self) -> dict[str, Tensor]:
        """Hugging Face name -> whole tensor in CPU memory on the first rank; nothing on the others."""
        return self.policy.weights()

    def save(self, folder: Path, tokenizer: Any = None) -> None:
        """Write the policy as a Hugging Face folder, `model`, and the parts of this rank, `shards`."""
        self.policy.save(folder / "model", tokenizer)
        small = save_shards(folder, self.policy.module, self._optimizer)
        if self.ranks.first:
            torch.save(self._small_state() | small, folder / "trainer.pt")
        self.ranks.wait()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, here or in one process."""
        super().load_state_dict(in_parts(state, self.policy.module, self._optimizer))


def _frozen(policy: Policy) -> Policy:
    policy.module.requires_grad_(False)
    return policy
