"""A real vLLM under the contract kit (skipped where the extra is not installed)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence

import pytest

from april.core.clock import VirtualClock
from april.core.sample import Sample
from april.engines.base import Engine, Weights
from april.testing.engine_contract import EngineContract
from april.testing.toy_model import CharTokenizer
from tests.contracts.vllm_parts import module, samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the extra april-rl[vllm] is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


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
        engine = VllmEngine(module(0), tokenizer=CharTokenizer(), clock=VirtualClock(), config=config)
        self.opened.append(engine)
        return engine, samples()

    def new_weights(self) -> Weights:
        return dict(module(1).named_parameters())

    def decode(self, token_ids: Sequence[int]) -> str | None:
        return CharTokenizer().decode(token_ids)

    def small_kv_tokens(self) -> int | None:
        return 160
