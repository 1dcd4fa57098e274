"""vLLM's CPU build, eager, with KV memory for all requests at once and all the cores that the benchmark uses."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from april.bench.peers.base import Generated, Setup, TokenLists


class VllmCpu:
    """Without tokenizer or text; no log-probs are asked for."""

    def __init__(self, setup: Setup) -> None:
        cores = sorted(os.sched_getaffinity(0))[: setup.threads]
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(setup.kv_gib))
        # By itself it leaves one core to the rest of the machine, half of a small one.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        import vllm

        self.version = vllm.__version__
        self._engine: Any = vllm.LLM(
            model=setup.folder,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_num_seqs=setup.max_rows,
            max_model_len=setup.max_tokens,
            disable_log_stats=True,
            seed=0,
        )

    def generate(self, prompts: TokenLists, max_new_tokens: Sequence[int], batch_rows: int) -> Generated:
        """All requests in one call, each with its own length."""
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=1.0, max_tokens=int(limit), ignore_eos=True, detokenize=False) for limit in max_new_tokens
        ]
        inputs: Any = [{"prompt_token_ids": list(tokens)} for tokens in prompts]
        started_s = time.perf_counter()
        outputs = self._engine.generate(inputs, params, use_tqdm=False)
        wall_s = time.perf_counter() - started_s
        return Generated(wall_s, [len(output.outputs[0].token_ids) for output in outputs], num_steps=max(max_new_tokens))

    def close(self) -> None:
        """Its child processes end with it."""
        del self._engine
