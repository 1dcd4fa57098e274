"""Stop strings: matched on decoded text, cut at a token boundary, looked for in a window at the end of the response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

_TOKENS_PER_CHARACTER = 4  # a byte-level token holds at least one byte, a character at most four
_SPARE_TOKENS = 16


class Decodes(Protocol):
    """The part of a tokenizer that stop strings need."""

    def decode(self, token_ids: Any) -> str: ...


def window_tokens(stop_strings: Sequence[str]) -> int:
    """Tokens at the end of a response that are sure to hold any of these strings."""
    return _TOKENS_PER_CHARACTER * max(map(len, stop_strings)) + _SPARE_TOKENS


def completes_stop(tail: Sequence[int], stop_strings: Sequence[str], decode: Callable[[list[int]], str]) -> bool:
    """Whether the last token of `tail` completes a stop string; a match that was there before it does not count."""
    ids = [int(token) for token in tail]
    text = decode(ids)
    if not any(stop in text for stop in stop_strings):
        return False
    before = len(decode(ids[:-1]))
    return any(text.find(stop, max(0, before - len(stop) + 1)) >= 0 for stop in stop_strings)
