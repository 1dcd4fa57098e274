"""A real vLLM under the contract kit (skipped where the extra is not installed)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from april.core.clock import VirtualClock
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine, Weights
from april.testing.engine_contract import EngineContract
from april.testing.toy_model import CharTokenizer, toy_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the extra april-rl[vllm] is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


@lru_cache
def _module(seed: int) -> Any:
    return toy_model("qwen3", dtype=torch.float32, seed=seed, hidden_size=128)


def _samples() -> list[Sample]:
    specs = [
        SamplingSpec(max_new_tokens=60, stop_token_ids=(0,)),
        SamplingSpec(max_new_tokens=40, temperature=1.3, top_p=0.9, seed=5),
        SamplingSpec(max_new_tokens=30, temperature=0.7, top_k=8, stop_token_ids=(0, 3)),
    ]
    random = np.random.default_rng(1)
    samples = []
    for serial, spec in enumerate(specs):
        prompt = Prompt(f"p{serial}", random.integers(2, 50, size=int(random.integers(3, 12))).astype(np.int32))
        samples += [Sample(GroupId(serial, 0, prompt.id).member(member), prompt, spec) for member in range(2)]
    return samples


class TestVllm(EngineContract):
    score_tolerance = cut_tolerance = 1e-4

    @pytest.fixture(autouse=True)
    def _close(self) -> Iterator[None]:
        self.opened: list[Engine] = []
        yield
        for engine in self.opened:
            engine.close()

    def make(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[Engine, list[Sample]]:
        from april.engines.vllm.config import VllmConfig
        from april.engines.vllm.engine import VllmEngine

        config = VllmConfig(
            max_running=max_running or 16,
            kv_tokens=kv_tokens or 2048,
            report_every_tokens=16,
            steps_per_poll=3,
            max_model_tokens=128,
        )
        engine = VllmEngine(_module(0), tokenizer=CharTokenizer(), clock=VirtualClock(), config=config)
        self.opened.append(engine)
        return engine, _samples()

    def new_weights(self) -> Weights:
        return dict(_module(1).named_parameters())

    def decode(self, token_ids: Sequence[int]) -> str | None:
        return CharTokenizer().decode(token_ids)

    def small_kv_tokens(self) -> int | None:
        return 160
