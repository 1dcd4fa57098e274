"""The trainer of one process: batches in, versions out; also a source of events for the driver."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.compose import Algorithm
from april.algorithms.spec import AlgorithmConfig
from april.core.clock import Clock, WallClock
from april.core.errors import CheckpointError, ModelError
from april.core.event import Event, Updated
from april.core.group import Batch
from april.core.ids import Version
from april.core.metric import Max, Mean, Metrics, Sum, merge
from april.models.policy import Policy
from april.training.batch import TrainingBatch, assemble
from april.training.config import TrainerConfig, learning_rate
from april.training.metrics import batch_metrics, effective_samples
from april.training.optim import adamw, clip_gradients, set_learning_rate
from april.training.pack import mini_batches
from april.training.step import Learner


class Trainer:
    """Owns the weights and the optimiser.

    A batch is cut into `num_optimizer_steps` mini-batches of whole groups, each with its own denominators and optimiser
    step. With one, the detached current policy is the proximal one and no extra forward runs; with more, proximal
    log-probs are computed once before the first. A mini-batch without any trained token of non-zero advantage takes
    no optimiser step, which is counted ("skipped_steps").

    A loss or gradient that is not finite raises `ModelError` and leaves the weights of the last optimiser step, or
    skips that optimiser step and is counted, as `TrainerConfig.nonfinite` says.

    Attributes:
        policy: what is trained.
        version: batches consumed so far, skipped ones included; whatever number of optimiser steps each took.
    """

    name = "trainer"

    def __init__(
        self,
        policy: Policy,
        algorithm: AlgorithmConfig,
        config: TrainerConfig,
        *,
        reference: Policy | None = None,
        clock: Clock | None = None,
        total_steps: int | None = None,
    ) -> None:
        """Set up the optimiser.

        Args:
            policy: to train; its parameters change in place.
            algorithm: the atoms.
            config: the options.
            reference: frozen, for penalties; must not share parameters with `policy`.
            clock: dates the events.
            total_steps: updates of the whole run, where a falling learning rate ends; None leaves it at its peak.
        """
        self.policy, self.config, self.version = policy, config, Version(0)
        self._algorithm = Algorithm.of(algorithm)
        self._learner = Learner(policy, self._algorithm, config, reference)
        self._optimizer = adamw(policy.module.parameters(), config)
        self._clock: Clock = clock if clock is not None else WallClock()
        self._total_steps = total_steps
        self._waiting: list[Batch] = []

    def update(self, batch: Batch) -> Metrics:
        """Train on one batch and count one version.

        Raises:
            DataError: a sample that cannot be trained on.
            ModelError: a loss or gradient is not finite.
        """
        groups = batch.groups
        for compose in self._algorithm.compose:
            groups = compose(groups)
        data = assemble(batch, groups)
        tokens = self._learner.prepare(data)
        metrics = batch_metrics(data, tokens)
        set_learning_rate(self._optimizer, learning_rate(self.config, self.version, self._total_steps))
        signal = self._learner.signal(tokens)
        parts = mini_batches(tokens.layout.group_of_sample.tolist(), self.config.num_optimizer_steps)
        if len(parts) > 1 and bool(signal.any()):
            tokens = self._learner.with_proximal(data, tokens)
        steps: list[Metrics] = []
        for part in parts:
            samples = torch.tensor(part, dtype=torch.int64)
            steps.append(self._optimizer_step(data, tokens, samples) if bool(signal[samples].any()) else _SKIPPED)
        self.version += 1
        learned = merge(steps or [_SKIPPED])
        lr = {"lr": Mean(self._optimizer.param_groups[0]["lr"], 1)}
        return metrics | learned | effective_samples(learned) | lr

    def _optimizer_step(self, data: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> Metrics:
        self._optimizer.zero_grad(set_to_none=True)
        try:
            metrics = self._learner.backward(data, tokens, samples)
            norm = clip_gradients(
                [p.grad for p in self.policy.module.parameters() if p.grad is not None], self.config.max_grad_norm
            )
            if not math.isfinite(norm):
                raise ModelError(
                    "the gradient is not finite",
                    where=f"update {data.step}",
                    got=norm,
                    hint="lower training.lr, or set training.nonfinite = 'skip'",
                )
        except ModelError:
            self._optimizer.zero_grad(set_to_none=True)
            if self.config.nonfinite == "raise":
                raise
            return _SKIPPED | {"nonfinite_steps": Sum(1)}
        self._algorithm.update(self._optimizer.step)
        self._optimizer.zero_grad(set_to_none=True)
        return metrics | {
            "grad_norm": Mean(norm, 1),
            "grad_norm_max": Max(norm),
            "optimizer_steps": Sum(1),
            "skipped_steps": Sum(0),
        }

    def weights(self) -> dict[str, Tensor]:
        """Hugging Face name -> tensor; the trainer's own memory, to be copied before the next update."""
        return self.policy.weights()

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimiser and version; tensors are the trainer's own memory."""
        return {"version": self.version, "weights": self.weights(), "optimizer": self._optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            CheckpointError: the state belongs to another model or optimiser.
        """
        try:
            self.policy.module.load_state_dict(state["weights"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.version = int(state["version"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                "the trainer's state does not fit",
                where="trainer",
                got=str(error).splitlines()[0],
                expected="a state of the same model",
            ) from error

    def submit(self, batch: Batch) -> None:
        """Train on this batch in the next `poll`."""
        self._waiting.append(batch)

    def ready_at(self) -> float | None:
        """Now when a batch waits, else None."""
        return self._clock.now() if self._waiting else None

    def poll(self) -> list[Event]:
        """Train on one waiting batch."""
        if not self._waiting:
            return []
        metrics = self.update(self._waiting.pop(0))
        return [Updated(self._clock.now(), self.version, metrics)]

    def pending(self) -> list[str]:
        """The batches that wait."""
        return [f"update {batch.step}" for batch in self._waiting]


_SKIPPED: Metrics = {"optimizer_steps": Sum(0), "skipped_steps": Sum(1)}
