"""What a vLLM server says of itself, and what an engine in front of it can promise."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from april.core.errors import EngineError, ProcessError
from april.engines.base import Caps, UpdateMode
from april.engines.embedded.stops import Decodes
from april.engines.vllm.config import VllmServerConfig
from april.engines.vllm.request import Settings

_MODES: tuple[UpdateMode, ...] = ("drain", "recompute", "keep_kv")
_LARGEST_ENTROPY_VOCABULARY = 256
"""Exact entropies over HTTP are the log-probs of all tokens as text, for every token."""
_COMMAND = "docs/engine_vllm.md shows the command"


@dataclass(frozen=True, slots=True)
class Promised:
    """A server's limits, the engine's promises, the numerics, and whether the server heeds priorities."""

    settings: Settings
    caps: Caps
    dtype: str
    by_priority: bool

    def priority(self, serial: int) -> int:
        """Of a request: earlier ones keep their KV memory longer, where the server heeds that."""
        return serial if self.by_priority else 0


def promises(told: Any, config: VllmServerConfig, url: str, vocab_size: int, tokenizer: Decodes | None) -> Promised:
    """What a server can do, by its own configuration.

    Args:
        told: the answer of its `/server_info`.

    Raises:
        ProcessError: it does not say.
        EngineError: its log-probs would not be those of the distribution that it samples from, or it takes no weights.
    """
    try:
        served = _Served.of(told["vllm_config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ProcessError(
            "a vLLM server does not say what it is",
            where="engine.urls",
            got=f"{url}: {type(error).__name__} {error}",
            expected="a vLLM 0.32 server that runs with VLLM_SERVER_DEV_MODE=1",
            hint=_COMMAND,
        ) from error
    for option, (got, expected) in served.needed.items():
        if got != expected:
            told_where = f"{url}: {option}"
            raise EngineError(
                "a vLLM server is not set up for training", where=told_where, got=got, expected=expected, hint=_COMMAND
            )
    settings = Settings(
        context_tokens=served.context_tokens,
        row_tokens=min(served.context_tokens, served.kv_tokens),
        vocab_size=vocab_size,
        largest_entropy_vocabulary=_LARGEST_ENTROPY_VOCABULARY,
        entropy_top_k=config.entropy_top_k,
        has_tokenizer=tokenizer is not None,
        seeded=config.seeded,
    )
    caps = Caps(
        max_running=min(config.max_running, served.places),
        kv_tokens=served.kv_tokens,
        max_sample_tokens=settings.row_tokens,
        update_modes=frozenset(_MODES),
        addressed_random=False,
        entropy=settings.exact_entropies,
        score=False,
        shares_prefix=served.prefix_caching,
        sleeps=served.sleeps,
    )
    return Promised(settings, caps, served.dtype, served.policy == "priority")


@dataclass(frozen=True, slots=True)
class _Served:
    """The parts of a server's configuration that matter here; `needed` holds options with what they are and must be."""

    context_tokens: int
    kv_tokens: int
    places: int
    policy: str
    dtype: str
    prefix_caching: bool
    sleeps: bool
    needed: dict[str, tuple[Any, str]]

    @staticmethod
    def of(told: dict[str, Any]) -> _Served:
        model, cache, scheduler = told["model_config"], told["cache_config"], told["scheduler_config"]
        return _Served(
            context_tokens=int(model["max_model_len"]),
            kv_tokens=(int(cache["num_gpu_blocks"]) - 1) * int(cache["block_size"]),
            places=int(scheduler["max_num_seqs"]),
            policy=str(scheduler["policy"]),
            dtype=str(model["dtype"]).removeprefix("torch."),
            prefix_caching=bool(cache["enable_prefix_caching"]),
            sleeps=bool(model.get("enable_sleep_mode")),
            needed={
                "--logprobs-mode": (model["logprobs_mode"], "processed_logprobs"),
                "--weight-transfer-config": ((told.get("weight_transfer_config") or {}).get("backend"), "april"),
            },
        )


def key_of(variable: str | None) -> str | None:
    """The key in an environment variable.

    Raises:
        EngineError: the variable is not set.
    """
    if variable is not None and not os.environ.get(variable):
        raise EngineError("an environment variable is not set", where="engine.api_key", got=variable, expected="the server's key")
    return os.environ[variable] if variable is not None else None
