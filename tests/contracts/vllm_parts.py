"""The toy model and samples that the contract runs of both vLLM engines share."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

from april.core.ids import GroupId
from april.core.prompt import Prompt
from april.core.sample import Sample
from april.core.sampling import SamplingSpec
from april.testing.toy_model import toy_model


@lru_cache
def module(seed: int) -> Any:
    return toy_model("qwen3", dtype=torch.float32, seed=seed, hidden_size=128, max_positions=1536)


def samples(scale: int = 1) -> list[Sample]:
    """Six samples in three groups; `scale` above 1 makes them longer, for an engine that runs ahead of its caller."""
    specs = [
        SamplingSpec(max_new_tokens=60 * scale, stop_token_ids=(0,) if scale == 1 else ()),
        SamplingSpec(max_new_tokens=40 * scale, temperature=1.3, top_p=0.9, seed=5),
        SamplingSpec(max_new_tokens=30 * scale, temperature=0.7, top_k=8, stop_token_ids=(0, 3)),
    ]
    random = np.random.default_rng(1)
    found = []
    for serial, spec in enumerate(specs):
        prompt = Prompt(f"p{serial}", random.integers(2, 50, size=int(random.integers(3, 12))).astype(np.int32))
        found += [Sample(GroupId(serial, 0, prompt.id).member(member), prompt, spec) for member in range(2)]
    return found
