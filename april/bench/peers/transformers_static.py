"""`generate` of `transformers` in static batches: each batch runs until its longest response is complete."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from april.bench.peers.base import Generated, Setup, TokenLists


class TransformersStatic:
    """Batches in the order of the requests. A row that has its tokens is padded until the batch ends."""

    def __init__(self, setup: Setup) -> None:
        import torch
        import transformers

        torch.set_num_threads(setup.threads)
        self.version = transformers.__version__
        loader: Any = transformers.AutoModelForCausalLM
        self._module = loader.from_pretrained(setup.folder, dtype=torch.float32).eval()

    def generate(self, prompts: TokenLists, max_new_tokens: Sequence[int], batch_rows: int) -> Generated:
        """Sample with a stopping criterion that ends each row at its own length."""
        counts: list[int] = []
        num_steps = num_batches = 0
        started_s = time.perf_counter()
        for start in range(0, len(prompts), batch_rows):
            limits = list(max_new_tokens[start : start + batch_rows])
            counts += self._batch(prompts[start : start + batch_rows], limits)
            num_steps += max(limits)
            num_batches += 1
        return Generated(time.perf_counter() - started_s, counts, num_steps, num_batches)

    def _batch(self, prompts: TokenLists, limits: list[int]) -> list[int]:
        import torch
        import transformers

        ids = torch.tensor(prompts)
        make_config: Any = transformers.GenerationConfig
        config = make_config(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max(limits), pad_token_id=0, eos_token_id=None
        )
        with torch.inference_mode():
            out = self._module.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                stopping_criteria=transformers.StoppingCriteriaList([_own_length(ids.shape[1], limits)]),
            )
        longest = out.shape[1] - ids.shape[1]
        return [min(longest, limit) for limit in limits]

    def close(self) -> None:
        """Nothing to end."""


def _own_length(prompt_tokens: int, limits: list[int]) -> Any:
    """The criterion that ends each row at its own length."""
    import torch
    from transformers import StoppingCriteria

    class OwnLength(StoppingCriteria):
        def __init__(self) -> None:
            self._limits = torch.tensor(limits)

        def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
            return input_ids.shape[1] - prompt_tokens >= self._limits

    return OwnLength()
