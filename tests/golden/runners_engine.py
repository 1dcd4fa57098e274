"""Golden cases of what engines and models do."""

from __future__ import annotations

import numpy as np
import torch

from april.core.sampling import temperature_factor
from april.engines.embedded.config import NoiseConfig
from april.engines.embedded.noise import noise_level, noise_levels
from april.models.routing import replayed_gates
from tests.golden.golden_helpers import Case, Values, runs


@runs("r3_replayed_gates")
def _replayed_gates(case: Case) -> Values:
    logits = torch.tensor(case["inputs"]["train_router_logits"])
    mask = torch.tensor(case["inputs"]["rollout_topk_mask"]) > 0
    experts = mask.nonzero()[:, 1].view(len(logits), -1)
    gates = replayed_gates(logits, experts).to(logits.dtype)
    return {"gates": torch.zeros_like(logits).scatter(1, experts, gates).tolist()}


@runs("qerl_noise_schedule")
def _noise_schedule(case: Case) -> Values:
    params, inputs = case["params"], case["inputs"]
    config = NoiseConfig(start=params["sigma_start"], end=params["sigma_end"], stages=params["stages"])
    return {
        "sigma_levels": noise_levels(config.start, config.end, config.stages),
        "sigma": [noise_level(step, inputs["total_steps"], config) for step in inputs["step"]],
    }


@runs("hapo_adaptive_temperature")
def _adaptive_temperature(case: Case) -> Values:
    """In torch as the sampler computes it; numpy, as the learner does, must give the same."""
    params, z = case["params"], case["inputs"]["log_entropy_z"]
    options = (params["tau"], params["scale_pos"], params["scale_neg"])
    sampled = params["base_temperature"] * temperature_factor(torch.tensor(z), *options)
    learned = params["base_temperature"] * temperature_factor(np.array(z), *options)
    assert np.allclose(sampled.numpy(), learned, atol=1e-6)
    return {"temperature": sampled.tolist()}
