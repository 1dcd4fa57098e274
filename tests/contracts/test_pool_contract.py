"""Several engines behind one under the contract kit."""

from __future__ import annotations

import numpy as np
import torch
from rollout_helpers import make_prompts

from april.core.clock import VirtualClock
from april.core.ids import GroupId
from april.core.random import stream_key
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.base import Engine, Weights
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.engines.pool import EnginePool
from april.engines.scripted import Reply, ScriptedEngine
from april.testing.engine_contract import EngineContract
from april.testing.toy_model import CharTokenizer, toy_model


def _reply(sample: Sample) -> Reply:
    length = 12 + stream_key(0, sample.id) % 25
    return Reply(tuple(int(token) for token in np.arange(length) + 100 * sample.id.member))


def _samples(longest: int) -> list[Sample]:
    spec = SamplingSpec(max_new_tokens=longest)
    return [
        Sample(GroupId(serial, 0, prompt.id).member(member), prompt, spec)
        for serial, prompt in enumerate(make_prompts(3))
        for member in range(2)
    ]


def _shares(total: int | None, num: int, default: int) -> list[int]:
    """Places of each of `num` engines that have `total` together."""
    return [default] * num if total is None else [total // num + (index < total % num) for index in range(num)]


class TestPoolOfScripted(EngineContract):
    children_differ = False  # fixed replies have no random stream
    num = 3

    def make(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[Engine, list[Sample]]:
        self.clock = VirtualClock()
        places = [share for share in _shares(max_running, self.num, 100) if share]
        members = {
            f"engine {index}": ScriptedEngine(_reply, self.clock, max_running=share, report_every_tokens=5)
            for index, share in enumerate(places)
        }
        return EnginePool(members, self.clock), _samples(30)

    def advance(self, engine: Engine) -> None:
        ready_s = engine.ready_at()
        if ready_s is not None:
            self.clock.wait_until(ready_s)


class TestPoolOfOne(TestPoolOfScripted):
    num = 1


class TestPoolOfEmbedded(EngineContract):
    score_tolerance = cut_tolerance = 1e-6
    num_cuts = 2

    def make(self, *, max_running: int | None = None, kv_tokens: int | None = None) -> tuple[Engine, list[Sample]]:
        clock = VirtualClock()
        places = [share for share in _shares(max_running, 2, 8) if share]
        module = toy_model("qwen3", dtype=torch.float64, seed=0)
        options = {"kv_tokens": kv_tokens or 2048, "report_every_tokens": 16, "steps_per_poll": 3, "prefill_tokens": 64}
        members = {
            f"embedded {index}": EmbeddedEngine(
                module, tokenizer=CharTokenizer(), clock=clock, config=EmbeddedConfig(max_running=share, **options)
            )
            for index, share in enumerate(places)
        }
        return EnginePool(members, clock), _samples(72)

    def new_weights(self) -> Weights:
        return dict(toy_model("qwen3", dtype=torch.float64, seed=1).named_parameters())

    def decode(self, token_ids: object) -> str | None:
        return CharTokenizer().decode(token_ids)  # type: ignore[arg-type]

    def small_kv_tokens(self) -> int | None:
        return 140
