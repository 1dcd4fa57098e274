"""The training step as one writes it by hand: GRPO over padded rows of a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from april.core.group import Batch
from april.core.sample import Sample
from april.training.config import TrainerConfig
from april.training.optim import adamw

_LOW, _HIGH, _EPS = 0.8, 1.2, 1e-6


class PaddedLoop:
    """Rows in the order of the batch, padded on the right to the longest of their micro-batch; logits for responses only.

    What it computes is April's default algorithm: group-relative advantages, a clipped surrogate, the mean over samples of
    the mean over tokens (Shao et al. 2024, arXiv 2402.03300, without KL).

    Attributes:
        module: the causal LM; its parameters are trained.

    Args:
        config: of the optimiser, and the tokens that go through the model at once, padding included.
    """

    def __init__(self, module: Any, config: TrainerConfig) -> None:
        self.module, self._config = module, config
        self._optimizer = adamw(module.parameters(), config)

    def update(self, batch: Batch) -> None:
        """One optimiser step."""
        self.gradients(batch)
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._config.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def gradients(self, batch: Batch) -> Tensor:
        """Add up the gradients of a batch whose prompts are equally long; returns the log-probs of all response tokens, (N,)."""
        samples = [sample for group in batch.groups for sample in group.samples]
        advantages = torch.cat([_advantages([reward.value for _, reward in group.rewarded]) for group in batch.groups])
        longest = max(len(sample) for sample in samples) + len(samples[0].prompt.token_ids)
        num_rows = max(1, self._config.micro_batch_tokens // longest)
        found = []
        for start in range(0, len(samples), num_rows):
            logprobs, mask = self._logprobs(samples[start : start + num_rows])
            ratio = torch.exp(logprobs - logprobs.detach())
            credit = advantages[start : start + num_rows, None]
            losses = -torch.minimum(credit * ratio, credit * ratio.clamp(_LOW, _HIGH))
            loss = ((losses * mask).sum(1) / mask.sum(1)).sum() / len(samples)
            loss.backward()
            found.append(logprobs.detach()[mask.bool()])
        return torch.cat(found)

    def _logprobs(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor]:
        """Log-probs of the responses and their mask, both (rows, longest response)."""
        responses = [torch.from_numpy(sample.token_ids.astype("int64")) for sample in samples]
        targets = torch.nn.utils.rnn.pad_sequence(responses, batch_first=True)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(response)) for response in responses], batch_first=True)
        prompts = torch.stack([torch.from_numpy(sample.prompt.token_ids.astype("int64")) for sample in samples])
        attended = torch.cat([torch.ones_like(prompts), mask.long()], 1)
        count = targets.shape[1] + 1
        out = self.module(torch.cat([prompts, targets], 1), attention_mask=attended, logits_to_keep=count, use_cache=False)
        logits = out.logits[:, :-1].flatten(0, 1)
        return -F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(mask), mask


def _advantages(rewards: list[float]) -> Tensor:
    values = torch.tensor(rewards)
    return (values - values.mean()) / (values.std() + _EPS)
