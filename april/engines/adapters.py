"""An engine for runs that publish adapters only: it holds the base, and merges what comes."""

from __future__ import annotations

from typing import Any

from april.engines.base import Engine, UpdateMode, Weights
from april.models.adapters import MergedWeights, is_adapters
from april.models.policy import Policy


class AdapterEngine:
    """Another engine, to which published adapters come as the whole merged model.

    Each version is merged from the base as it was loaded, never from the version before it: a thousand updates leave no
    trace. Everything else is the other engine's.

    Args:
        engine: any engine that serves the base; in the same process.
        base: the policy without adapters; its memory is read at every update.
    """

    def __init__(self, engine: Engine, base: Policy) -> None:
        self._engine, self._base = engine, base.weights()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # of an object that is being copied, and has no engine yet
            raise AttributeError(name)
        return getattr(self._engine, name)

    def update_weights(self, weights: Weights, version: int, mode: UpdateMode = "drain") -> None:
        """See `april.engines.base.Engine`; a whole model is taken as it is.

        Raises:
            ModelError: adapters of another base.
        """
        merged = MergedWeights(self._base, weights) if is_adapters(weights) else weights
        self._engine.update_weights(merged, version, mode)
