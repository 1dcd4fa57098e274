"""Any causal LM of `transformers`, correct before fast: it computes every step from all tokens.

Architectures differ in what they cache (windows, states, compressed KV); the tokens are what all have in common. So the
"KV" of this forward is the token ids themselves, kept in the same buckets as real KV.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from april.core.errors import ModelError
from april.engines.embedded.forward import TokenRows
from april.models.kv import KvBucket


class _TokenRows:
    """Token ids in the form of KV, (1, 2, 1, T, 1)."""

    def __init__(self, rows: TokenRows, device: torch.device) -> None:
        self._rows, self._device = rows, device

    def kv_of(self, index: int) -> torch.Tensor:
        ids = torch.from_numpy(self._rows[index].astype(np.float64)).to(self._device)
        return ids.view(1, 1, 1, -1, 1).expand(1, 2, 1, -1, 1)


class TransformersForward:
    """The module's own forward on a deep copy of the module.

    Sequences are padded behind their last token, where causal attention does not look.
    """

    def __init__(self, module: Any, dtype: torch.dtype | None = None) -> None:
        self._module = copy.deepcopy(module).eval().requires_grad_(False)
        if dtype is not None:
            self._module = self._module.to(dtype)
        weight = self._module.get_input_embeddings().weight
        self.dtype, self.device = weight.dtype, weight.device
        self.vocab_size = self._module.get_output_embeddings().weight.shape[0]
        self.max_positions = int(self._module.config.get_text_config().max_position_embeddings)

    def bucket(self, capacity: int) -> KvBucket:
        return KvBucket(1, 1, 1, capacity, torch.float64, self.device)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Any]) -> None:
        """Copy weights by name; parameters tied to a given one follow it.

        Raises:
            ModelError: when a parameter is missing; nothing has changed then.
        """
        parameters = dict(self._module.named_parameters())
        missing = sorted(set(parameters) - set(weights))
        if missing:
            raise ModelError("a parameter is missing", where=missing[0], expected="the names of the Hugging Face model")
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])

    def prefill(self, rows: TokenRows) -> _TokenRows:
        return _TokenRows(rows, self.device)

    @torch.inference_mode()
    def decode(self, token_ids: torch.Tensor, positions: torch.Tensor, longest: int, buckets: Sequence[KvBucket]) -> torch.Tensor:
        outputs, start = [], 0
        for bucket in buckets:
            end = start + bucket.size
            ids = token_ids[start:end].to(torch.float64).view(-1, 1, 1)
            bucket.write(0, ids.expand(-1, 2, -1))
            history = bucket.views(0)[0].reshape(bucket.size, -1).to(torch.int64)
            outputs.append(self._last_logits(history, positions[start:end]))
            start = end
        return torch.cat(outputs)

    def _last_logits(self, history: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        # All positions are needed only where rows end at different places; they do, so pick after the head.
        logits = self._module(input_ids=history, use_cache=False).logits
        return logits[torch.arange(len(last), device=last.device), last]

    @torch.inference_mode()
    def response_logits(self, rows: TokenRows, starts: Sequence[int]) -> list[torch.Tensor]:
        longest = max(len(row) for row in rows)
        padded = np.zeros((len(rows), longest), np.int64)
        for index, row in enumerate(rows):
            padded[index, : len(row)] = row
        logits = self._module(input_ids=torch.from_numpy(padded).to(self.device), use_cache=False).logits
        return [logits[i, start - 1 : len(row) - 1] for i, (row, start) in enumerate(zip(rows, starts, strict=True))]
