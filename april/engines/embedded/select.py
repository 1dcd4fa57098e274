"""Which forward serves a module."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from april.core.errors import EngineError, ModelError
from april.engines.embedded.chunks import ChunkDecoder, cuda_graph_capture
from april.engines.embedded.config import EmbeddedConfig
from april.engines.embedded.forward import Forward, LeanForward
from april.engines.embedded.transformers_forward import transformers_forward
from april.models.kernel import LANES, Kernel, kernel
from april.models.lean_decode import LeanDecoder


def make_forward(module: Any, config: EmbeddedConfig) -> Forward:
    """The fastest forward that is exact for this module, on a copy of its weights.

    Raises:
        ModelError: when the lean forward is asked for by name and cannot serve the module.
    """
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    decoder = LeanDecoder.from_module(module, dtype) if config.forward != "transformers" and not config.record_routes else None
    if decoder is not None:
        return LeanForward(decoder, _kernel(decoder, config))
    if config.forward == "lean":
        raise ModelError(
            "the lean forward does not know this architecture",
            got=getattr(getattr(module, "config", None), "model_type", type(module).__name__),
            expected="qwen3, qwen2 or llama with default rope and no sliding window",
            hint='set engine.forward = "auto"',
        )
    forward = transformers_forward(module, dtype)
    if config.record_routes:
        forward.record_routes()
    return forward


def _kernel(decoder: LeanDecoder, config: EmbeddedConfig) -> Kernel | None:
    """The compiled kernel where it serves the model and the options; warns where it would and cannot be built."""
    shape, plain = decoder.shape, not (config.max_draft_tokens or config.decode_chunk_steps > 1 or config.cuda_graphs)
    fits = all(size % LANES == 0 for size in (shape.head_dim, shape.hidden_size, shape.mlp_size))
    if not (config.native and plain and fits and decoder.device.type == "cpu" and decoder.dtype == torch.float32):
        return None
    try:
        return kernel(shape.head_dim, shape.num_heads // shape.num_kv_heads)
    except ModelError as error:
        why = " ".join(str(error).split())
        text = f"decoding on torch's operators, which is slower: {why}; engine.native = false says that this is meant"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return None


def make_chunks(forward: Forward, config: EmbeddedConfig, longest_tokens: int) -> ChunkDecoder | None:
    """What decodes several steps without the host; None where every step is looked at.

    Args:
        longest_tokens: of any row.

    Raises:
        EngineError: for a forward that is not lean, or graphs without CUDA.
    """
    if config.decode_chunk_steps == 1 and not config.cuda_graphs:
        return None
    key = "cuda_graphs" if config.cuda_graphs else "decode_chunk_steps"
    if not isinstance(forward, LeanForward):
        raise EngineError(
            "steps without the host need the lean forward",
            where=f"engine.{key}",
            got="a model that runs through transformers",
            expected="qwen3, qwen2 or llama with default rope and no sliding window",
            hint="remove engine.decode_chunk_steps and engine.cuda_graphs",
        )
    if config.cuda_graphs and forward.device.type != "cuda":
        raise EngineError(
            "CUDA graphs need a CUDA device",
            where="engine.cuda_graphs",
            got=f"a model on {forward.device}",
            expected="a model on cuda",
            hint='set engine.cuda_graphs = false, or model.device = "cuda" where there is one',
        )
    capture = cuda_graph_capture(forward.device) if config.cuda_graphs else None
    return ChunkDecoder(forward, config.decode_chunk_steps, longest_tokens, capture)
