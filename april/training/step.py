"""Hops 12 to 14 of a sample's way: credit -> loss -> gradients.

prepare     the whole batch on the CPU: credit; reference and proximal log-probs where an atom needs them
backward    one mini-batch: shares -> micro-batches -> forward -> loss -> gradients, which add up exactly
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.losses.compose import Algorithm, credit, policy_loss, shares
from april.core.errors import ModelError, RecipeError
from april.core.metric import Mean, Metrics, merge
from april.models.policy import PackedSequences, Policy
from april.training.batch import TrainingBatch
from april.training.config import TrainerConfig
from april.training.metrics import loss_metrics
from april.training.pack import micro_batches


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

    def prepare(self, batch: TrainingBatch) -> TokenBatch:
        """Columns of the whole batch with credit and, where an atom reads it, the reference.

        Raises:
            RecipeError: an atom needs a reference policy and there is none.
        """
        tokens = credit(self.algorithm, batch.tokens)
        if "reference" not in self.algorithm.config.requires:
            return tokens
        if self.reference is None:
            raise RecipeError(
                "an atom needs a reference policy", where="algorithm.penalties, model.reference", got="no reference policy"
            )
        everything = torch.arange(tokens.layout.num_samples)
        return tokens.with_columns(reference=self.logprobs(self.reference, batch, everything))

    def with_proximal(self, batch: TrainingBatch, tokens: TokenBatch) -> TokenBatch:
        """The batch with log-probs under the weights before its first optimiser step, where a sample can give a gradient."""
        samples = torch.arange(tokens.layout.num_samples)
        if self.config.skip_zero_advantage:
            samples = samples[self.signal(tokens)]
        _, rows = tokens.layout.take(samples)
        proximal = tokens["behaviour"].clone()
        proximal[rows] = self.logprobs(self.policy, batch, samples)
        return tokens.with_columns(proximal=proximal)

    def logprobs(self, policy: Policy, batch: TrainingBatch, samples: Tensor) -> Tensor:
        """Log-probs (N,) on the CPU of the given samples' response tokens, without gradient."""
        layout, _ = batch.tokens.layout.take(samples)
        out = torch.zeros(layout.num_tokens, dtype=torch.float64)
        for micro in self._micro_batches(batch, samples):
            temperatures = batch.tokens.take(samples[micro])["temperature"]
            with torch.no_grad():
                logprobs = policy.response_logprobs(_sequences(batch, samples[micro]), temperatures).logprobs
            _, rows = layout.take(micro)
            out[rows] = logprobs.to("cpu", torch.float64)
        return out

    def signal(self, tokens: TokenBatch) -> Tensor:
        """bool (S,): samples that can give a gradient.

        Without penalties and objectives a sample whose trained tokens all have advantage 0 cannot.
        """
        active = tokens["trained"]
        if not self.algorithm.terms:
            active = active & (tokens["advantage"] != 0)
        return tokens.layout.sum(active.double()) > 0

    def backward(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> Metrics:
        """Add the gradients of one mini-batch to the policy's parameters.

        Args:
            batch: the whole batch.
            tokens: its prepared columns.
            samples: int64, the samples of this mini-batch; denominators count all of them.

        Raises:
            ModelError: the loss is not finite; gradients are then incomplete and must be thrown away.
        """
        tokens = shares(self.algorithm, tokens.take(samples))
        chosen = torch.arange(len(samples))
        if self.config.skip_zero_advantage:
            chosen = chosen[self.signal(tokens)]
        parts, totals = [], []
        for micro in self._micro_batches(batch, samples[chosen]):
            part, total = self._micro_backward(batch, tokens.take(chosen[micro]), samples[chosen[micro]])
            parts.append(part)
            totals.append(total)
        metrics = merge(parts)
        for name in totals[0] if totals else ():
            metrics[name] = Mean(float(sum(total[name] for total in totals)), 1)
        return metrics

    def _micro_backward(self, batch: TrainingBatch, tokens: TokenBatch, samples: Tensor) -> tuple[Metrics, dict[str, float]]:
        output = self.policy.response_logprobs(_sequences(batch, samples), tokens["temperature"], entropy=self.config.entropy)
        tokens = tokens.to(self.policy.device, self.dtype)
        loss = policy_loss(self.algorithm, output.logprobs, tokens)
        totals = {"loss": float(loss.total.detach()), **{name: float(part) for name, part in loss.parts.items()}}
        if not bool(torch.isfinite(loss.total)):
            names = ", ".join(str(name) for name in batch.ids(samples)[:8])
            raise ModelError("the loss is not finite", where=f"update {batch.step}, samples {names}", got=totals["loss"])
        loss.total.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return loss_metrics(loss, tokens, output.entropies), totals

    def _micro_batches(self, batch: TrainingBatch, samples: Tensor) -> list[Tensor]:
        """Indices into `samples` for each micro-batch."""
        chosen = [batch.samples[index] for index in samples.tolist()]
        lengths = [len(sample.prompt.token_ids) + len(sample) for sample in chosen]
        parts = micro_batches(lengths, self.config.micro_batch_tokens, padded=not self.policy.packed)
        return [torch.tensor(part, dtype=torch.int64) for part in parts]


def _sequences(batch: TrainingBatch, samples: Tensor) -> PackedSequences:
    chosen = [batch.samples[index] for index in samples.tolist()]
    return PackedSequences.of([sample.prompt.token_ids for sample in chosen], [sample.token_ids for sample in chosen])
