"""The continuous batching of `transformers`, with the settings it chooses itself wherever the CPU allows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from april.bench.peers.base import Generated, Setup, TokenLists
from april.core.errors import EngineError

_PAGE_TOKENS = 256
_WAIT_S = 1.0


class TransformersContinuous:
    """The number of KV pages is given, because without it a share of the machine's whole memory is taken."""

    def __init__(self, setup: Setup) -> None:
        import psutil  # noqa: F401  # without it, it finds no memory for its cache on a CPU
        import torch
        import transformers

        torch.set_num_threads(setup.threads)
        self.version = transformers.__version__
        loader: Any = transformers.AutoModelForCausalLM
        self._module = loader.from_pretrained(setup.folder, dtype=torch.float32).eval()

    def generate(self, prompts: TokenLists, max_new_tokens: Sequence[int], batch_rows: int) -> Generated:
        """One manager for the workload; requests are added at once, each with its own length."""
        import transformers
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        make_config: Any = transformers.GenerationConfig
        generation = make_config(
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=max(max_new_tokens),
            pad_token_id=0,
            eos_token_id=-1,
        )
        sizes = [len(tokens) + limit for tokens, limit in zip(prompts, max_new_tokens, strict=True)]
        pages = sum(-(-size // _PAGE_TOKENS) for size in sizes)
        config = ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS,
            num_blocks=pages,
            max_batch_tokens=max(4096, len(prompts)),
            max_requests_per_batch=len(prompts),
        )
        with self._module.continuous_batching_context_manager(
            generation_config=generation, continuous_batching_config=config
        ) as manager:
            started_s = time.perf_counter()
            for index, (tokens, limit) in enumerate(zip(prompts, max_new_tokens, strict=True)):
                manager.add_request(list(tokens), request_id=str(index), max_new_tokens=int(limit), eos_token_id=-1)
            counts = _collect(manager, len(prompts))
            wall_s = time.perf_counter() - started_s
        return Generated(wall_s, counts, num_steps=max(max_new_tokens))

    def close(self) -> None:
        """The manager ended with its workload."""


def _collect(manager: Any, num: int) -> list[int]:
    counts: dict[int, int] = {}
    while len(counts) < num:
        result = manager.get_result(timeout=_WAIT_S)
        if result is None:
            if not manager.is_running():
                raise EngineError("the generation thread of transformers ended", got=f"{len(counts)} of {num} requests")
        elif result.is_finished():
            if result.error:
                raise EngineError("transformers failed a request", where=result.request_id, got=result.error)
            counts[int(result.request_id)] = len(result.generated_tokens)
    return [counts[index] for index in range(num)]
