"""The trainer of one process: batches in, versions out; also a source of events for the driver."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from april.algorithms.advantages.returns import reward_to_go
from april.algorithms.bind import Algorithm
from april.algorithms.columns import TokenBatch
from april.algorithms.spec import AlgorithmConfig
from april.algorithms.update import Work
from april.core.clock import Clock, WallClock
from april.core.errors import CheckpointError, ModelError, RecipeError
from april.core.event import Event, Updated
from april.core.group import Batch
from april.core.ids import Version
from april.core.metric import Max, Mean, Metrics, Sum, merge, values
from april.core.random import stream_key
from april.models.policy import Policy, WithoutAdapters
from april.training.batch import TrainingBatch, assemble, trainable
from april.training.config import TrainerConfig, learning_rate
from april.training.metrics import batch_metrics, effective_samples
from april.training.notes import age_metrics, signal_metrics
from april.training.optim import adamw, guarded_step, set_learning_rate
from april.training.pack import mini_batches
from april.training.step import Learner
from april.training.value import ValueModel


class Trainer:
    """Owns the weights and the optimiser, and the value model where an atom reads its values.

    A batch is cut into `num_optimizer_steps` mini-batches of whole groups, each with its own denominators and optimiser
    step; the algorithm's update atom says how often each is trained on. With one optimiser step, the detached current
    policy is the proximal one and no extra forward runs; with more, proximal log-probs are computed once before the first,
    or interpolated without a forward, as the recipe says. A mini-batch whose tokens give no gradient (`Learner.signal`)
    takes no optimiser step, which is counted ("skipped_steps").

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
            policy: to train; its parameters change in place. With `config.lora` it is the base, and stays as it is.
            algorithm: the atoms.
            config: the options.
            reference: frozen, for penalties; must not share parameters with `policy`. With `config.lora` and without one the
                base is the reference.
            clock: dates the events.
            total_steps: updates of the whole run, where a falling learning rate ends; None leaves it at its peak.

        Raises:
            RecipeError: an atom reads values and no objective trains a value model.
        """
        policy = adapted(policy, config)
        reference = reference_of(policy, algorithm, reference)
        self.policy, self.config, self.version = policy, config, Version(0)
        self._algorithm = Algorithm.of(algorithm)
        self._learner = Learner(policy, self._algorithm, config, reference)
        self._optimizer = adamw(policy.module.parameters(), config)
        self._value = self._value_model() if has_value_model(self._algorithm) else None
        self._clock: Clock = clock if clock is not None else WallClock()
        self._total_steps = total_steps
        self._waiting: list[Batch] = []
        self._update_state: dict[str, Any] = {}
        self._steps_at = [0]  # optimiser steps that the weights of each version have seen

    def _value_model(self) -> ValueModel:
        return ValueModel(self.policy, self._algorithm, self.config)

    def update(self, batch: Batch) -> Metrics:
        """Train on one batch and count one version.

        Raises:
            DataError: a sample that cannot be trained on.
            ModelError: a loss or gradient is not finite.
        """
        needs = self._algorithm.config.requires
        groups = trainable(batch, needs)
        for compose in self._algorithm.compose:
            groups = compose(groups)
        data = assemble(batch, groups, needs)
        tokens = self._learner.prepare(data, None if self._value is None else self._value.values)
        metrics = batch_metrics(data, tokens) | signal_metrics(data)
        parts = [
            torch.tensor(part, dtype=torch.int64)
            for part in mini_batches(tokens.layout.group_of_sample.tolist(), self.config.num_optimizer_steps)
        ]
        set_learning_rate(self._optimizer, learning_rate(self.config, self.version, self._total_steps))
        warming_up = self._value is not None and self._value.warming_up
        learned = _SKIPPED if warming_up else self._train_policy(data, tokens, parts, metrics)
        if self._value is not None:
            if warming_up:
                tokens = tokens.with_columns(**{"return": reward_to_go(tokens)})
            learned = merge([learned, self._value.update(data, tokens, parts), {"value_warmup": Sum(float(warming_up))}])
        self.version += 1
        self._steps_at.append(self._steps_at[-1] + round(values(learned)["optimizer_steps"]))
        return metrics | learned | effective_samples(learned) | {"lr": Mean(self._optimizer.param_groups[0]["lr"], 1)}

    def _train_policy(self, data: TrainingBatch, tokens: TokenBatch, parts: list[Tensor], metrics: Metrics) -> Metrics:
        """The optimiser steps that the update atom asks for."""
        signal = self._learner.signal(tokens)
        if not bool(signal.any()):
            return _SKIPPED
        several = len(parts) * self.config.num_epochs > 1 or "proximal" in self._algorithm.config.update.needs
        if several and self.config.proximal == "recompute":
            tokens = self._learner.with_proximal(data, tokens)

        def step(part: int) -> bool:
            samples = parts[part]
            made = self._optimizer_step(data, tokens, samples, taken()) if bool(signal[samples].any()) else _SKIPPED
            work.metrics.append(made)
            return values(made)["optimizer_steps"] > 0

        def taken() -> int:
            return sum(round(values(made)["optimizer_steps"]) for made in work.metrics)

        work = Work(
            step,
            num_parts=len(parts),
            num_epochs=self.config.num_epochs,
            parameters=[parameter for group in self._optimizer.param_groups for parameter in group["params"]],
            index=self.version,
            reward_mean=_mean([reward.value for reward in data.rewards]),
            entropy=metrics["entropy_estimate"].value,
            state=self._update_state,
        )
        own = self._algorithm.update(work)
        return merge(work.metrics or [_SKIPPED]) | (own or {})

    def _optimizer_step(self, data: TrainingBatch, tokens: TokenBatch, samples: Tensor, num_before: int) -> Metrics:
        where = f"update {data.step}"
        self._optimizer.zero_grad(set_to_none=True)
        try:
            with self._dropout(num_before):
                metrics = self._learner.backward(data, tokens, samples)
            norm = guarded_step(self._optimizer, self.config.max_grad_norm, where)
        except ModelError:
            if self.config.nonfinite == "raise":
                raise
            return _SKIPPED | {"nonfinite_steps": Sum(1)}
        finally:
            self._optimizer.zero_grad(set_to_none=True)
        age = age_metrics(tokens.take(samples), data.version, self._steps_at, num_before)
        return (
            metrics
            | age
            | {
                "grad_norm": Mean(norm, 1),
                "grad_norm_max": Max(norm),
                "optimizer_steps": Sum(1),
                "skipped_steps": Sum(0),
            }
        )

    def _dropout(self, num_before: int, rank: int = 0) -> AbstractContextManager[None]:
        """What adapters leave out in one optimiser step is addressed: a run that is continued leaves out the same."""
        adapters = self.policy.adapters
        if adapters is None:
            return nullcontext()
        seed = stream_key(adapters.config.seed, "dropout", self.version, num_before, rank)
        return adapters.dropout(seed, self.policy.device)

    def weights(self) -> dict[str, Tensor]:
        """What engines get: Hugging Face name -> tensor, or adapters only (`Policy.weights`); the trainer's own memory, to be
        copied before the next update."""
        return self.policy.weights()

    def state_dict(self) -> dict[str, Any]:
        """Weights, optimisers, version and what the update atom remembers; tensors are the trainer's own memory."""
        state = self._small_state() | {"weights": self.policy.state(), "optimizer": self._optimizer.state_dict()}
        return state if self._value is None else state | {"value": self._value.state_dict()}

    def _small_state(self) -> dict[str, Any]:
        return {"version": self.version, "steps_at": list(self._steps_at), "update": copy.deepcopy(self._update_state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken.

        Raises:
            CheckpointError: the state belongs to another model or optimiser.
        """
        try:
            self.policy.load_state(state["weights"])
            self._optimizer.load_state_dict(state["optimizer"])
            self.version = int(state["version"])
            self._steps_at = [int(count) for count in state["steps_at"]]
            self._update_state.clear()
            self._update_state.update(copy.deepcopy(dict(state["update"])))
            if self._value is not None:
                self._value.load_state_dict(state["value"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                "the trainer's state does not fit",
                where="trainer",
                got=str(error).splitlines()[0],
                expected="a state of the same model",
            ) from error

    def save(self, folder: Path, tokenizer: Any = None) -> None:
        """Write the policy as a Hugging Face folder, `model` or `adapter`, and what `load` needs, `trainer.pt`."""
        self.policy.save(folder / self._policy_folder, tokenizer)
        torch.save(self.state_dict(), folder / "trainer.pt")

    @property
    def _policy_folder(self) -> str:
        return "model" if self.policy.adapters is None else "adapter"

    def load(self, folder: Path) -> None:
        """Continue exactly where `save` was called, by this trainer or by one of another number of ranks."""
        state = torch.load(folder / "trainer.pt", map_location=self.policy.device, weights_only=True)
        if "weights" not in state:
            from april.training.sharded_checkpoint import read_shards

            state |= read_shards(folder, self.policy.module, self._optimizer, state)
            if self._value is not None and "value" in state:
                state["value"] |= self._value.read_shards(folder, state["value"])
        self.load_state_dict(state)

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


def adapted(policy: Policy, config: TrainerConfig) -> Policy:
    """What is trained of a policy: all of it, or new adapters on it where the recipe says so."""
    return policy if config.lora is None or policy.adapters is not None else policy.adapted(config.lora)


def reference_of(policy: Policy, algorithm: AlgorithmConfig, reference: Policy | None) -> Policy | None:
    """The reference policy: what is given, else the base where adapters are trained and an atom reads one."""
    if reference is None and policy.adapters is not None and "reference" in algorithm.requires:
        return WithoutAdapters(policy)
    return reference


def has_value_model(algorithm: Algorithm) -> bool:
    """Whether an objective trains a value model.

    Raises:
        RecipeError: none does, and an atom reads values.
    """
    if not algorithm.value_terms and algorithm.reads_values:
        raise RecipeError(
            "an atom reads values, and nothing trains a value model",
            where="algorithm.advantage, algorithm.objectives",
            got=sorted(algorithm.config.objectives) or "no objectives",
            expected="an objective of the value model",
            hint="add algorithm.objectives.value = {}",
        )
    return bool(algorithm.value_terms)


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan
