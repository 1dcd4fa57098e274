"""Steps without the host on a CUDA device: `pytest -m gpu tests/unit/engines/test_embedded_cuda.py`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from april.core.clock import VirtualClock
from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.engine import EmbeddedEngine
from april.testing.engine_run import EngineRun, same_tokens
from april.testing.toy_model import toy_model

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _run(module: Any, **options: Any) -> EngineRun:
    config = EmbeddedConfig(max_running=8, kv_tokens=4096, steps_per_poll=8, **options)
    return EngineRun(EmbeddedEngine(module, clock=VirtualClock(), config=config))


def _samples(first_member: int = 0) -> list[Sample]:
    specs = [SamplingSpec(max_new_tokens=120, stop_token_ids=(0,)), SamplingSpec(max_new_tokens=70, top_p=0.9, seed=5)]
    prompts = [Prompt(f"p{serial}", np.arange(2, 8 + 20 * serial) % 40) for serial in range(len(specs))]
    return [
        Sample(GroupId(serial, 0, prompt.id).member(first_member + member), prompt, spec)
        for serial, (prompt, spec) in enumerate(zip(prompts, specs, strict=True))
        for member in range(4)
    ]


def _finish(run: EngineRun, samples: list[Sample]) -> list[Sample]:
    run.submit(samples)
    run.drain()
    return run.results(samples)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("options", [{"decode_chunk_steps": 8}, {"decode_chunk_steps": 8, "cuda_graphs": True}])
def test_chunks_and_graphs_give_the_samples_of_single_steps(
    dtype: torch.dtype, tolerance: float, options: dict[str, Any]
) -> None:
    module, other = (toy_model("qwen3", dtype=dtype, seed=seed).to("cuda") for seed in (0, 1))
    run = _run(module, **options)
    same_tokens(_finish(run, _samples()), _finish(_run(module), _samples()), tolerance)
    run.engine.update_weights(dict(other.named_parameters()), 1)
    found, expected = _finish(run, _samples(4)), _finish(_run(other), _samples(4))
    same_tokens(found, expected, tolerance)
    assert [len(sample) for sample in found] == [len(sample) for sample in expected]


def test_graphs_in_bfloat16_give_finite_log_probs() -> None:
    module = toy_model("qwen3", dtype=torch.bfloat16).to("cuda")
    for sample in _finish(_run(module, decode_chunk_steps=8, cuda_graphs=True), _samples()):
        assert np.isfinite(sample.behaviour_logprobs).all() and len(sample) > 0
