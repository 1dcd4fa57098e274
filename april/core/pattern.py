"""Answers found by regular expressions: tasks find them in solutions, rewards in responses, in the same way."""

from __future__ import annotations

import re


def checked_pattern(value: str | None) -> str | None:
    """`value`, when it is a regular expression; for validators of configs.

    Raises:
        ValueError: when it is not.
    """
    if value is not None:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
    return value


def last_match(text: str, pattern: str | None) -> str | None:
    """The last match of `pattern` in `text` (its first group where it has one), or all of the text without a pattern.

    Returns:
        the match without surrounding white space, or None where there is none.
    """
    if pattern is None:
        return text.strip()
    found = None
    for found in re.finditer(pattern, text):  # noqa: B007  # the last one is wanted
        pass
    if found is None:
        return None
    match = found.group(1 if found.re.groups else 0)
    return None if match is None else match.strip()
