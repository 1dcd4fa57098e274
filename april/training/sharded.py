"""The trainer on several ranks (`training.ranks` above 1): weights, gradients and optimiser in parts, samples dealt out.

Every rank gets the same batches and keeps the same columns; only model forwards are shared out. So credit, statistics and
denominators are those of one process, and so is the update: equal up to the rounding of sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from april.algorithms.bind import Algorithm
from april.algorithms.spec import AlgorithmConfig
from april.core.clock import Clock
from april.models.policy import Policy
from april.training.config import TrainerConfig
from april.training.sharded_checkpoint import in_parts, save_shards
from april.training.sharded_policy import ShardedPolicy
from april.training.sharded_ranks import Ranks
from april.training.sharded_step import ShardedLearner
from april.training.sharded_value import ShardedValueModel
from april.training.single import Trainer, adapted, has_value_model, reference_of
from april.training.value import ValueModel


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
        """
        self.ranks = ranks
        policy, atoms = adapted(policy, config), Algorithm.of(algorithm)
        # while the policy, which it copies, is still whole
        self._cut_value = ShardedValueModel(policy, atoms, config, ranks) if has_value_model(atoms) else None
        cut = ShardedPolicy(policy, ranks, config)
        frozen = None if reference is None else ShardedPolicy(_frozen(reference), ranks, config)
        frozen = reference_of(cut, algorithm, frozen)
        super().__init__(cut, algorithm, config, reference=frozen, clock=clock, total_steps=total_steps)
        self._learner = ShardedLearner(self.policy, self._algorithm, config, frozen, ranks=ranks)

    def _value_model(self) -> ValueModel:
        return cast(ValueModel, self._cut_value)

    def _dropout(self, num_before: int, rank: int = 0) -> AbstractContextManager[None]:
        return super()._dropout(num_before, self.ranks.index)

    def weights(self) -> dict[str, Tensor]:
        """What engines get: whole tensors in CPU memory on the first rank; nothing on the others."""
        return self.policy.weights()

    def save(self, folder: Path, tokenizer: Any = None) -> None:
        """Write the policy as a Hugging Face folder, `model` or `adapter`, and the parts of this rank, `shards`."""
        self.policy.save(folder / self._policy_folder, tokenizer)
        small = save_shards(folder, self.policy.module, self._optimizer)
        if self._cut_value is not None:
            small["value"] = self._cut_value.save(folder)
        if self.ranks.first:
            torch.save(self._small_state() | small, folder / "trainer.pt")
        self.ranks.wait()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken, here or in one process."""
        super().load_state_dict(in_parts(state, self.policy.module, self._optimizer))


def _frozen(policy: Policy) -> Policy:
    policy.module.requires_grad_(False)
    return policy
