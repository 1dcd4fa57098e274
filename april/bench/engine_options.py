"""Options of April's engine that a benchmark changes: `--engine key=value`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from april.config.load import parse_override
from april.core.errors import DataError
from april.engines.embedded.config import EmbeddedConfig
from april.registry import validate

FIXED = frozenset({"type", "process", "replicas", "max_running", "kv_tokens", "threads", "steps_per_poll"})
"""What a benchmark sets itself, from its requests and its own options."""


def engine_options(texts: Iterable[str]) -> dict[str, Any]:
    """`key=value` texts as keyword arguments of `EmbeddedConfig`.

    Raises:
        DataError: for a key that the benchmark sets itself.
        RecipeError: for an unknown key, or a value that the engine cannot use.
    """
    options: dict[str, Any] = {}
    for text in texts:
        options |= parse_override(text)
    fixed = sorted(FIXED & options.keys())
    if fixed:
        raise DataError("the benchmark sets this option of the engine itself", where="--engine", got=", ".join(fixed))
    validate(EmbeddedConfig, options, "--engine")
    return options
