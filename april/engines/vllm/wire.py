"""What goes over the wire to a vLLM server and what comes back: requests as JSON, replies as checked chunks."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from april.core.errors import EngineError
from april.engines.vllm.request import Request, Settings, entropy

_LOGPROBS = (-9999.0, 1e-4)
"""Open below: vLLM sends the lower end where it has no log-prob."""
PREFIX = "generate-tokens-"
"""What vLLM puts before the request ids of its generate endpoint; an abort names the whole."""


class Garbage(ValueError):
    """A reply that cannot be one of vLLM's."""


class VersionSpan(NamedTuple):
    """Output tokens [start, end) were sampled by the weights of this name."""

    version: str
    start: int
    end: int


class Chunk(NamedTuple):
    """Tokens of one request.

    Attributes:
        entropies: of the tokens, where they were asked for.
        finish: why the request ended, with its last tokens: "stop", "length" or "abort".
        versions: over all its output tokens, with the last ones.
    """

    key: str
    token_ids: list[int]
    logprobs: list[float]
    entropies: list[float] | None
    finish: str | None
    versions: tuple[VersionSpan, ...]


class Usage(NamedTuple):
    """What a request's prompt cost: tokens, and how many of them lay in the prefix cache."""

    key: str
    prompt_tokens: int
    cached_tokens: int


def body_of(request: Request, settings: Settings, *, salt: str, priority: int) -> dict[str, Any]:
    """The JSON body that asks for what is left of a sample, as a stream of tokens.

    Args:
        salt: keys the prefix cache.
        priority: smaller goes first.
    """
    return {
        "request_id": request.key,
        "token_ids": request.context.tolist(),
        "sampling_params": request.parameters(settings),
        "stream": True,
        "stream_options": {"include_usage": True},
        "cache_salt": salt,
        "priority": priority,
    }


def parse(line: str, key: str, *, vocab_size: int, entropies: int | None) -> Chunk | Usage | None:
    """What a line of a stream says; None for one that says nothing.

    Args:
        line: of server-sent events.
        key: of the request whose stream it is.
        vocab_size: tokens are below it.
        entropies: how many log-probs each entropy is made from; 0 for all that are there, None for no entropies.

    Raises:
        Garbage: it is not what vLLM sends; the message says what is wrong.
        EngineError: vLLM reports an error.
    """
    if not line.startswith("data: "):
        if line:
            raise Garbage(f"the line {line[:80]!r}")
        return None
    try:
        reply = json.loads(line[len("data: ") :])
    except ValueError:
        raise Garbage(f"no JSON: {line[:80]!r}") from None
    if isinstance(reply, dict) and "error" in reply:
        raise EngineError("vLLM reports an error", where=key, got=str(reply["error"])[:300])
    try:
        return _usage(reply, key) if not reply["choices"] else _chunk(reply["choices"][0], key, vocab_size, entropies)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError) as error:
        raise Garbage(f"{type(error).__name__}: {error} in {line[:80]!r}") from None


def _usage(reply: dict[str, Any], key: str) -> Usage | None:
    usage = reply["usage"]
    if usage is None:
        return None
    return Usage(key, int(usage["prompt_tokens"]), int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0))


def _chunk(choice: dict[str, Any], key: str, vocab_size: int, entropies: int | None) -> Chunk:
    tokens = [int(token) for token in choice["token_ids"] or ()]
    content = (choice["logprobs"] or {}).get("content") or []
    if len(content) != len(tokens):
        raise Garbage(f"{len(tokens)} tokens with {len(content)} log-probs")
    logprobs = [float(entry["logprob"]) for entry in content]
    for token, entry, logprob in zip(tokens, content, logprobs, strict=True):
        if not 0 <= token < vocab_size or entry["token_id"] != token or not _LOGPROBS[0] < logprob <= _LOGPROBS[1]:
            raise Garbage(f"token {token} with log-prob {logprob}")
    return Chunk(
        key,
        tokens,
        [min(0.0, logprob) for logprob in logprobs],
        None if entropies is None else [entropy(_candidates(entry), entropies) for entry in content],
        choice["finish_reason"],
        tuple(
            VersionSpan(str(span["version"]), int(span["start"]), int(span["end"])) for span in choice["weight_versions"] or ()
        ),
    )


def _candidates(entry: dict[str, Any]) -> list[float]:
    return [float(candidate["logprob"]) for candidate in entry["top_logprobs"]]
