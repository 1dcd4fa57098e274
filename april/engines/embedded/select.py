"""Which forward serves a module."""

from __future__ import annotations

from typing import Any

import torch

from april.core.errors import ModelError
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.forward import Forward, LeanForward
from april.engines.embedded.transformers_forward import transformers_forward
from april.models.lean_decode import LeanDecoder


def make_forward(module: Any, config: EmbeddedConfig) -> Forward:
    """The fastest forward that is exact for this module, on a copy of its weights.

    Raises:
        ModelError: when the lean forward is asked for by name and cannot serve the module.
    """
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    decoder = LeanDecoder.from_module(module, dtype) if config.forward != "transformers" else None
    if decoder is not None:
        return LeanForward(decoder)
    if config.forward == "lean":
        raise ModelError(
            "the lean forward does not know this architecture",
            got=getattr(getattr(module, "config", None), "model_type", type(module).__name__),
            expected="qwen3, qwen2 or llama with default rope and no sliding window",
            hint='set engine.forward = "auto"',
        )
    return transformers_forward(module, dtype)
