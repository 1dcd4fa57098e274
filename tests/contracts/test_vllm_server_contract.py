"""A real vLLM server, started by April, under the contract kit (skipped where the extra is not installed)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import pytest

from april.core.clock import WallClock, readable
from april.core.sample import Sample
from april.engines.base import Engine, UpdateMode, Weights
from april.testing.engine_contract import EngineContract
from april.testing.toy_model import CharTokenizer
from tests.contracts.vllm_parts import module, samples

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="the extra april-rl[vllm] is not installed"),
    pytest.mark.filterwarnings("ignore"),
]


class TestVllmServer(EngineContract):
    """One server for all tests: each new engine in front of it gives it the weights again, as a run that connects does."""

    score_tolerance = cut_tolerance = 1e-4
    runs_ahead = True
    scale = 3
    served: ClassVar[list[object]] = []

    @pytest.fixture(autouse=True)
    def _close(self) -> Iterator[None]:
        self.opened: list[Engine] = []
        yield
        for engine in self.opened:
            engine.close()

    @pytest.fixture(autouse=True, scope="class")
    def _server(self) -> Iterator[None]:
        from april.engines.vllm.client import Client
        from april.engines.vllm.config import VllmServerConfig
        from april.engines.vllm.server_process import ServerProcess

        os.environ.setdefault("OMP_NUM_THREADS", "1")
        config = VllmServerConfig(max_running=16, kv_tokens=8192, max_model_tokens=1536, stream_every_tokens=2)
        server = ServerProcess(module(0), config)
        client = Client(server.url, api_key=None, vocab_size=1)
        try:
            while client.ask("/health") is None:
                server.check()
                readable([client], 0.2)
            type(self).served = [server.url]
            yield
        finally:
            client.close()
            server.close()

    def make(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[Engine, list[Sample]]:
        from april.engines.vllm.config import VllmServerConfig
        from april.engines.vllm.server import VllmServerEngine

        config = VllmServerConfig(urls=(str(self.served[0]),), max_running=max_running or 16, report_every_tokens=16)
        engine = VllmServerEngine(module(0), tokenizer=CharTokenizer(), clock=WallClock(), config=config)
        self.opened.append(engine)
        return engine, samples(self.scale)

    def advance(self, engine: Engine) -> None:
        ready_s = engine.ready_at()
        if ready_s is not None:
            clock: WallClock = engine._clock  # type: ignore[attr-defined]
            readable(engine.waitables(), max(0.0, ready_s - clock.now()))  # type: ignore[attr-defined]

    def _updated(self, mode: UpdateMode) -> Any:
        self.scale = 24  # on a busy machine tokens reach the caller late, and some sample is to outlive the update
        return super()._updated(mode)

    def new_weights(self) -> Weights:
        return dict(module(1).named_parameters())

    def decode(self, token_ids: Sequence[int]) -> str | None:
        return CharTokenizer().decode(token_ids)

    def small_kv_tokens(self) -> int | None:
        return 160
