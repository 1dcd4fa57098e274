"""The embedded engine under the contract kit, with each forward and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import torch

from april.core.clock import VirtualClock
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine, Weights
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.testing.engine_contract import EngineContract
from april.testing.toy_model import CharTokenizer, ToyKind, toy_model


@lru_cache
def _module(kind: ToyKind, dtype: torch.dtype, seed: int) -> Any:
    return toy_model(kind, dtype=dtype, seed=seed)


def _samples(longest: int, size: int) -> list[Sample]:
    specs = [
        SamplingSpec(max_new_tokens=longest, stop_token_ids=(0,)),
        SamplingSpec(max_new_tokens=longest * 3 // 4, temperature=1.3, top_p=0.9, seed=5),
        SamplingSpec(max_new_tokens=longest // 2, temperature=0.7, top_k=8, stop_token_ids=(0, 3)),
    ]
    random = np.random.default_rng(1)
    samples = []
    for serial, spec in enumerate(specs):
        prompt = Prompt(f"p{serial}", random.integers(2, 50, size=int(random.integers(3, 12))).astype(np.int32))
        samples += [Sample(GroupId(serial, 0, prompt.id).member(member), prompt, spec) for member in range(size)]
    return samples


class _Embedded(EngineContract):
    kind: ToyKind = "qwen3"
    dtype = torch.float64
    score_tolerance = cut_tolerance = 1e-6
    longest, size = 100, 3
    options: ClassVar[dict[str, Any]] = {}

    def make(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[Engine, list[Sample]]:
        config = EmbeddedConfig(
            max_running=max_running or 16,
            kv_tokens=kv_tokens or 4096,
            report_every_tokens=16,
            steps_per_poll=3,
            prefill_tokens=64,
            **self.options,
        )
        module = _module(self.kind, self.dtype, 0)
        return EmbeddedEngine(module, tokenizer=CharTokenizer(), clock=VirtualClock(), config=config), _samples(
            self.longest, self.size
        )

    def new_weights(self) -> Weights:
        return dict(_module(self.kind, self.dtype, 1).named_parameters())

    def decode(self, token_ids: Sequence[int]) -> str | None:
        return CharTokenizer().decode(token_ids)

    def small_kv_tokens(self) -> int | None:
        return 260 if self.longest == 100 else 140


class TestQwen3Float64(_Embedded):
    pass


class TestQwen3WithGuesses(_Embedded):
    options: ClassVar[dict[str, Any]] = {"max_draft_tokens": 4, "draft_match_tokens": 1, "draft_adaptive": False}


class TestQwen3InChunksOfSteps(_Embedded):
    options: ClassVar[dict[str, Any]] = {"decode_chunk_steps": 5}
    longest, size, num_cuts = 72, 2, 2


class TestQwen3WithoutRetention(_Embedded):
    longest, size, num_cuts = 72, 2, 1
    options: ClassVar[dict[str, Any]] = {"retain_parked": False, "share_prefix": False}


class TestLlamaFloat32(_Embedded):
    kind: ToyKind = "llama"
    longest, size = 72, 2
    dtype = torch.float32
    score_tolerance = cut_tolerance = 1e-4


class TestQwen2Float64(_Embedded):
    kind: ToyKind = "qwen2"
    longest, size, num_cuts = 72, 2, 1


class TestGptNeoxThroughTransformers(_Embedded):
    kind: ToyKind = "gpt_neox"
    longest, size = 72, 2


class TestGemma2ThroughTransformers(_Embedded):
    """Sliding windows: every step is computed from all tokens."""

    kind: ToyKind = "gemma2"
    longest, size, num_cuts = 24, 2, 1

    def small_kv_tokens(self) -> int | None:
        return None
