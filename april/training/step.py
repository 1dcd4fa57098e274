"""Hops 12 to 14 of a sample's way: credit -> loss -> gradients.

prepare     the whole batch on the CPU: columns of frozen models, then credit
backward    one optimiser step: what it evaluates once -> micro-batches -> forward -> loss -> gradients, which add up exactly
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from april.algorithms.bind import Algorithm
from april.algorithms.columns import TokenBatch
from april.algorithms.losses.compose import Loss, credit, policy_loss, stage
from april.algorithms.losses.ratio import interpolated
from april.core.errors import DataError, ModelError, RecipeError
from april.core.metric import Mean, Metrics, merge
from april.models.policy import PackedSequences, Policy, ResponseLogprobs
from april.training.batch import TrainingBatch
from april.training.config import TrainerConfig
from april.training.metrics import loss_metrics
from april.training.pack import micro_batches

POLICY_COLUMNS = frozenset({"proximal", "current", "current_entropy"})
"""Columns that a forward pass of the policy fills."""
Found = tuple[Metrics, dict[str, float]]
"""What one micro-batch reports: metrics, and its part of the loss and of each of its terms."""


@dataclass(frozen=True)
class Learner:
    """What turns columns into gradients: policies, atoms and options. Holds no state of its own."""

    policy: Policy
    algorithm: Algorithm
    config: TrainerConfig
    reference: Policy | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Of log-probs and losses: float32, or float64 for a float64 policy."""
        return torch.float64 if self.policy.dtype == torch.float64 else torch.float32

    def prepare(self, batch: TrainingBatch, values: Callable[[TrainingBatch], Tensor] | None = None) -> TokenBatch:
        """Columns of the whole batch with credit: only those model columns that an atom reads are computed.

        Args:
            batch: the whole batch.
            values: values (N,) of a batch, where there is a value model.

        Raises:
            RecipeError: an atom needs a reference policy and there is none.
        """
        tokens = batch.tokens
        everything = torch.arange(tokens.layout.num_samples)
        if "reference" in self.algorithm.config.requires:
            if self.reference is None:
                raise RecipeError(
                    "an atom needs a reference policy", where="algorithm.penalties, model.reference", got="no reference policy"
                )
            tokens = tokens.with_columns(reference=self.logprobs(self.reference, batch, everything))
        if values is not None:
            tokens = tokens.with_columns(value=values(batch))
        early = POLICY_COLUMNS & self.algorithm.credit_needs
        if early:
            tokens = self._with_policy(batch, tokens, everything, early)
        return credit(self.algorithm, tokens)

    def with_proximal(self, batch: TrainingBatch, tokens: TokenBatch) -> TokenBatch:
        """The batch with log-probs under the weights before its first optimiser step, where a sample can give a gradient."""
        if "proximal" in tokens:
            return tokens
        samples = torch.arange(tokens.layout.num_samples)
        if self.config.skip_zero_advantage and not POLICY_COLUMNS & self.algorithm.staged_needs:
            samples = samples[self.signal(tokens)]
        _, rows = tokens.layout.take(samples)
        proximal = tokens["behaviour"].clone()
        proximal[rows] = self.logprobs(self.policy, batch, samples)
        return tokens.with_columns(proximal=proximal)

    def _with_policy(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor, names: frozenset[str]) -> TokenBatch:
        """`tokens` of the given samples with columns of the policy as it is now; "proximal" stays where it is there already."""
        current, entropy = self._measured(self.policy, batch, samples, entropy="current_entropy" in names)
        columns = {"current": current} | ({} if entropy is None else {"current_entropy": entropy})
        if "proximal" in names and "proximal" not in tokens:
            between = self.config.proximal == "interpolate"
            columns["proximal"] = interpolated(tokens["behaviour"], current, tokens["lag"]) if between else current
        return tokens.with_columns(**columns)

    def logprobs(self, policy: Policy, batch: TrainingBatch, samples: Tensor) -> Tensor:
        """Log-probs (N,) on the CPU of the given samples' response tokens, without gradient."""
        return self._measured(policy, batch, samples)[0]

    def _measured(
        self, policy: Policy, batch: TrainingBatch, samples: Tensor, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        layout, _ = batch.tokens.layout.take(samples)
        logprobs = torch.zeros(layout.num_tokens, dtype=torch.float64)
        entropies = torch.zeros_like(logprobs) if entropy else None
        for micro in self._micro_batches(batch, samples):
            temperatures = batch.tokens.take(samples[micro])["temperature"]
            with torch.no_grad():
                output = policy.response_logprobs(self._sequences(policy, batch, samples[micro]), temperatures, entropy=entropy)
            _, rows = layout.take(micro)
            logprobs[rows] = output.logprobs.to("cpu", torch.float64)
            if entropies is not None and output.entropies is not None:
                entropies[rows] = output.entropies.to("cpu", torch.float64)
        return logprobs, entropies

    def _sequences(self, policy: Policy, batch: TrainingBatch, samples: Tensor) -> PackedSequences:
        """What a policy reads; the one that is trained uses the engine's experts where they are replayed."""
        return sequences_of(batch, samples, routes=self.config.replay_routes and policy is self.policy)

    def signal(self, tokens: TokenBatch) -> Tensor:
        """bool (S,): samples that can give a gradient.

        One whose trained tokens all have advantage 0 cannot, unless penalties, objectives or the surrogate itself train it.
        Where an atom sees whole groups, their samples go together.
        """
        active = tokens["trained"]
        if self.algorithm.zero_without_advantage:
            active = active & (tokens["advantage"] != 0)
        layout = tokens.layout
        own = layout.sum(active.double()) > 0
        return layout.group_sum(own.double())[layout.group_of_sample] > 0 if self.algorithm.whole_groups else own

    def backward(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> Metrics:
        """Add the gradients of one mini-batch to the policy's parameters.

        Args:
            batch: the whole batch.
            tokens: its prepared columns.
            samples: int64, the samples of this mini-batch; denominators count all of them.

        Raises:
            ModelError: the loss is not finite; gradients are then incomplete and must be thrown away.
        """
        tokens = self._staged(batch, tokens.take(samples), samples)
        chosen = torch.arange(len(samples))
        if self.config.skip_zero_advantage:
            chosen = chosen[self.signal(tokens)]
        measured = tokens.take(chosen)
        found = self._gradients(batch, measured, samples[chosen])
        parts, totals = [part for part, _ in found], [total for _, total in found]
        metrics = merge(parts)
        metrics["measured_fraction"] = Mean(float(measured["trained"].sum()), float(tokens["trained"].sum()))
        for name in totals[0] if totals else ():
            metrics[name] = Mean(float(sum(total[name] for total in totals)), 1)
        return metrics

    def _gradients(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> list[Found]:
        """Backward passes of all micro-batches; `tokens` are the staged columns of `samples`."""
        units = self._units(batch, samples)
        return [self._micro_backward(batch, tokens.take(micro), samples[micro]) for micro in units]

    def _staged(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> TokenBatch:
        """What this optimiser step evaluates once; a policy column made for it is left to the micro-batches afterwards."""
        names = POLICY_COLUMNS & self.algorithm.staged_needs
        if not names or ("proximal" in tokens and names == {"proximal"}):
            return stage(self.algorithm, tokens)
        staged = stage(self.algorithm, self._with_policy(batch, tokens, samples, names))
        made = POLICY_COLUMNS - tokens.columns.keys()
        return TokenBatch(staged.layout, {name: column for name, column in staged.columns.items() if name not in made})

    def _micro_backward(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> Found:
        output = self._forward(batch, tokens, samples)
        loss, tokens = self._loss(output, tokens)
        if not bool(torch.isfinite(loss.total)):
            raise not_finite(batch, samples, float(loss.total.detach()))
        loss.total.backward()  # type: ignore[no-untyped-call]
        return found_in(loss, tokens, output)

    def _forward(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> ResponseLogprobs:
        """The policy on the response tokens of these samples, with gradient."""
        entropy = self.config.entropy or "current_entropy" in self.algorithm.live_needs
        sequences = self._sequences(self.policy, batch, samples)
        return self.policy.response_logprobs(sequences, tokens["temperature"], entropy=entropy)

    def _loss(self, output: ResponseLogprobs, tokens: TokenBatch) -> tuple[Loss, TokenBatch]:
        """The loss of a micro-batch, and its columns where and in what precision it was computed."""
        tokens = tokens.to(self.policy.device, self.dtype)
        live = tokens if output.entropies is None else tokens.with_columns(current_entropy=output.entropies)
        return policy_loss(self.algorithm, output.logprobs, live, proximal=self.config.proximal), tokens

    def _units(self, batch: TrainingBatch, samples: Tensor) -> list[Tensor]:
        """Micro-batches for the backward pass: indices into `samples`, with whole groups, or all, where an atom needs it."""
        if self.algorithm.unit == "batch":
            return [torch.arange(len(samples))] if len(samples) else []
        parts = self._micro_batches(batch, samples, whole=self.algorithm.whole_groups)
        return [part.sort().values for part in parts]  # where an atom looks at order, it is that of the batch

    def _micro_batches(self, batch: TrainingBatch, samples: Tensor, *, whole: bool = False) -> list[Tensor]:
        """Indices into `samples` for each micro-batch."""
        return split(batch, samples, self.config.micro_batch_tokens, self.policy, whole=whole)


def not_finite(batch: TrainingBatch, samples: Tensor, total: float) -> ModelError:
    """The error of a loss that is not finite, with the first names of the samples it came from."""
    names = ", ".join(str(name) for name in batch.ids(samples)[:8])
    return ModelError("the loss is not finite", where=f"update {batch.step}, samples {names}", got=total)


def found_in(loss: Loss, tokens: TokenBatch, output: ResponseLogprobs) -> Found:
    """What a micro-batch reports: metrics, and its part of the loss and of each of its terms."""
    totals = {"loss": float(loss.total.detach()), **{name: float(part) for name, part in loss.parts.items()}}
    with torch.no_grad():
        return loss_metrics(loss, tokens, output.entropies), totals


def split(batch: TrainingBatch, samples: Tensor, budget_tokens: int, policy: Policy, *, whole: bool = False) -> list[Tensor]:
    """Micro-batches of some samples: indices into `samples`. A packed policy computes prompts once that stand together."""
    chosen = [batch.samples[index] for index in samples.tolist()]
    lengths = [len(sample.prompt.token_ids) + len(sample) for sample in chosen]
    groups = batch.tokens.layout.group_of_sample[samples].tolist() if whole or policy.packed else None
    parts = micro_batches(lengths, budget_tokens, padded=not policy.packed, groups=groups, whole=whole)
    return [torch.tensor(part, dtype=torch.int64) for part in parts]


def sequences_of(batch: TrainingBatch, samples: Tensor, *, routes: bool = False) -> PackedSequences:
    """Prompts and responses of some samples, ready for a model; with the `routes` that the engine took where asked.

    Raises:
        DataError: a sample without routes.
    """
    chosen = [batch.samples[index] for index in samples.tolist()]
    found = [(sample.prompt_routes, sample.routes) for sample in chosen if sample.routes is not None] if routes else []
    if routes and len(found) < len(chosen):
        missing = next(sample.id for sample in chosen if sample.routes is None)
        raise DataError("a sample has no routes to replay", where=str(missing), hint="set engine.record_routes = true")
    responses = [sample.token_ids for sample in chosen]
    return PackedSequences.of([sample.prompt.token_ids for sample in chosen], responses, found or None)
