"""Noise on the sampler's norms: exploration that falls in stages, on a copy that the trainer never sees.

    sigma_k = start (end / start)^(k / (stages - 2)),   stage j of training: sigma_{j - 1}, the first stage: none
    w_norm <- w_norm + N(0, sigma^2)

A norm multiplies channels, so this is multiplicative noise on the inputs of the projections behind it. Source: QeRL
(arXiv 2510.11696), adaptive quantisation noise, and its release for the stages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from april.core.errors import EngineError
from april.core.ids import Version
from april.core.random import stream_key
from april.engines.embedded.config import NoiseConfig


def noise_levels(start: float, end: float, stages: int) -> list[float]:
    """Standard deviations of the stages after the first, which has none."""
    return [start * (end / start) ** (k / max(1, stages - 2)) for k in range(stages - 1)]


def noise_level(step: int, total_steps: int, config: NoiseConfig) -> float:
    """Standard deviation at an update (from 0); a run of fewer updates than stages skips some, the last one stays."""
    stage = int(min(step, total_steps) // (total_steps / config.stages))
    return noise_levels(config.start, config.end, config.stages)[min(stage, config.stages - 1) - 1] if stage else 0.0


class NormNoise:
    """Weights as a noisy sampler wants them; the draw belongs to (seed, version, parameter).

    Args:
        config: None for no noise at all.

    Raises:
        EngineError: the number of updates is not known.
    """

    def __init__(self, config: NoiseConfig | None) -> None:
        if config is not None and config.total_steps is None:
            raise EngineError(
                "the stages of noise need the number of updates", where="engine.noise.total_steps", expected="updates of the run"
            )
        self._config = config

    def level(self, version: Version) -> float:
        """Standard deviation for weights of this version."""
        config = self._config
        return 0.0 if config is None or config.total_steps is None else noise_level(version, config.total_steps, config)

    def sampler(self, version: Version) -> str:
        """What the id of a sampler with these weights ends with."""
        level = self.level(version)
        return f"+noise-{level:.3g}" if level else ""

    def applied(self, weights: Mapping[str, Any], version: Version) -> Mapping[str, Any]:
        """The same weights with noise on the norms; what is given is not changed, and returned as it is where there is none.

        Raises:
            EngineError: a model without norms that have weights.
        """
        level, config = self.level(version), self._config
        if not level or config is None:
            return weights
        norms = [name for name, weight in weights.items() if weight.ndim == 1 and name.endswith("norm.weight")]
        if not norms:
            raise EngineError("there are no norms to add noise to", where="engine.noise", expected="parameters *norm.weight")
        keys = {name: stream_key(config.seed or 0, "noise", version, name) for name in norms}
        return {**weights, **{name: _noisy(weights[name], level, key) for name, key in keys.items()}}


def _noisy(weight: torch.Tensor, level: float, key: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(key % 2**63)
    noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64) * level
    return weight.detach() + noise.to(device=weight.device, dtype=weight.dtype)
