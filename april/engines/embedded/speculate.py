"""Speculative decoding without a second model: guesses from text that is there, verified by the draw itself.

A guess for the next tokens of a sample is what followed its last few tokens earlier: in its own prompt and response, or in
those of its group (prompt lookup; Saxena 2023, "Prompt lookup decoding"; verification in one pass: Leviathan et al. 2023,
"Fast inference from transformers via speculative decoding"). One pass computes the distributions p behind the last token
and behind every guess. The standard rule accepts a guess x with probability min(1, p(x) / q(x)) and repairs the
distribution where it rejects. Here the rule is: draw the token from p at the uniform that belongs to the position, as
without guesses, and accept the guess when it is that token. A deterministic guess has q(x) = 1, so both rules accept it
with probability p(x); this one also keeps every token the same as without guesses, hence the distribution, and
the promise that a sample cut anywhere continues with the same tokens.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from april.core.ids import GroupId
from april.engines.embedded.slots import Ints

_MEASURED_TOKENS = 256
_PRIOR_TOKENS = 16
_PROBE_STEPS = 64
_PROBE_ROWS = 4


def accepted_counts(fed: Ints, drawn: Ints, counts: Ints) -> Ints:
    """How many guesses of each row equal what was drawn, up to the first that does not.

    Args:
        fed: (n, Q), the row's last token and its guesses.
        drawn: (n, Q), the token drawn behind each of them.
        counts: (n,), tokens fed; the rest of a row is padding.

    Returns:
        (n,), 0 to counts - 1.
    """
    width = fed.shape[1]
    same = (fed[:, 1:] == drawn[:, :-1]) & (np.arange(1, width) < counts[:, None])
    accepted: Ints = np.cumprod(same, axis=1).sum(axis=1)
    return accepted


@dataclass
class _Text:
    """What a group has written: where each n-gram was seen last."""

    seen: dict[tuple[int, ...], tuple[list[int], int]] = field(default_factory=dict)
    num_tokens: int = 0
    num_running: int = 0


class Drafts:
    """Guesses for running samples.

    Args:
        match_tokens: length of the n-gram that has to agree.
        max_tokens: of one guess.
        budget_tokens: text remembered of groups that do not run.
    """

    def __init__(self, match_tokens: int, max_tokens: int, budget_tokens: int) -> None:
        self._match, self._max, self._budget_tokens = match_tokens, max_tokens, budget_tokens
        self._groups: OrderedDict[GroupId, _Text] = OrderedDict()
        self._text: dict[int, tuple[_Text, list[int]]] = {}
        self._length: dict[int, int] = {}
        self._total_tokens = 0

    def open(self, slot: int, group: GroupId, token_ids: Sequence[int]) -> None:
        """A sample starts with these tokens (prompt and response)."""
        text = self._groups.setdefault(group, _Text())
        self._groups.move_to_end(group)
        text.num_running += 1
        self._text[slot], self._length[slot] = (text, []), min(2, self._max)
        self.extend(slot, token_ids)
        self._forget()

    def extend(self, slot: int, token_ids: Sequence[int]) -> None:
        """A sample has grown by these tokens."""
        text, history = self._text[slot]
        for token in token_ids:
            if len(history) >= self._match:
                text.seen[tuple(history[-self._match :])] = (history, len(history))
            history.append(token)
        text.num_tokens += len(token_ids)
        self._total_tokens += len(token_ids)

    def num_tokens(self, slot: int) -> int:
        """Tokens known of a sample."""
        return len(self._text[slot][1])

    def close(self, slot: int) -> None:
        """A sample has stopped; its text stays for its group."""
        text, _ = self._text.pop(slot)
        text.num_running -= 1
        del self._length[slot]

    def _forget(self) -> None:
        for group, text in list(self._groups.items()):
            if self._total_tokens <= self._budget_tokens:
                return
            if not text.num_running:
                self._total_tokens -= text.num_tokens
                del self._groups[group]

    def guess(self, slot: int, most: int) -> list[int]:
        """What may follow the sample's last token; at most `most` tokens."""
        text, history = self._text[slot]
        found = text.seen.get(tuple(history[-self._match :]))
        if found is None or most < 1:
            return []
        source, start = found
        return source[start : start + min(most, self._length[slot])]

    def verified(self, slot: int, num_drafted: int, num_accepted: int) -> None:
        """Guess more where guesses hold, less where they do not."""
        if num_accepted == num_drafted:
            self._length[slot] = min(self._max, 2 * self._length[slot])
        elif num_accepted == 0:
            self._length[slot] = max(1, self._length[slot] // 2)


class Payoff:
    """Whether guesses pay, by tokens alone, so that an engine's decisions stay the same in every run.

    A step over N tokens costs N + o, with o = `overhead_rows`: what it costs besides its rows is worth so many of them. A
    step with guesses prepares itself anew, which costs p = o / 4 more. With n rows, d guesses and a of them accepted, tokens
    per cost rise when (n + a) / (n + d + o + p) > n / (n + o), that is when a (n + o) > n (d + p).

    Args:
        overhead_rows: see above.
        adaptive: whether guesses stop where they do not pay; a few rows then go on guessing now and then.
    """

    def __init__(self, overhead_rows: int, *, adaptive: bool) -> None:
        self._overhead_rows, self._adaptive = overhead_rows, adaptive
        self._drafted, self._accepted = float(_PRIOR_TOKENS), _PRIOR_TOKENS / 2
        self._steps, self._probing = 0, False
        self.drafted_tokens = self.accepted_tokens = 0
        self.state = "measuring"

    def rows(self, num_rows: int) -> int:
        """How many of the rows may guess in this step."""
        if not self._adaptive:
            self.state = "on"
            return num_rows
        needed, rate = num_rows / (num_rows + self._overhead_rows), self._accepted / self._drafted
        self._steps += 1
        self._probing = rate <= needed
        if not self._probing:
            self.state = "on"
            return num_rows
        self.state = f"paused: {rate:.2f} of the guesses hold, {needed:.2f} needed with {num_rows} rows"
        return _PROBE_ROWS if self._steps % _PROBE_STEPS == 0 else 0

    def pays(self, num_rows: int, num_drafted: int) -> bool:
        """Whether so many guesses are worth a step of their own; a few that probe always are."""
        if not self._adaptive or self._probing or not num_drafted:
            return num_drafted > 0
        expected = num_drafted * self._accepted / self._drafted
        pays = expected * (num_rows + self._overhead_rows) > num_rows * (num_drafted + self._overhead_rows / 4)
        if not pays:
            self.state = f"paused: {num_drafted} guesses are too few for a step with {num_rows} rows"
        return pays

    def verified(self, num_drafted: int, num_accepted: int) -> None:
        """Remember a step's outcome; older ones fade."""
        self.drafted_tokens += num_drafted
        self.accepted_tokens += num_accepted
        fade = max(0.0, 1 - num_drafted / _MEASURED_TOKENS)
        self._drafted = self._drafted * fade + num_drafted
        self._accepted = self._accepted * fade + num_accepted


@dataclass(frozen=True)
class Feed:
    """Tokens of one step with guesses.

    Attributes:
        token_ids: (n, Q), last token and guesses of each row, padded with -1.
        counts: (n,), tokens of each row.
    """

    token_ids: Ints
    counts: Ints

    @property
    def packed(self) -> npt.NDArray[np.bool_]:
        """(n, Q): where a token is."""
        return np.arange(self.token_ids.shape[1]) < self.counts[:, None]


def feed_of(last_token: Ints, guesses: Sequence[Sequence[int]]) -> Feed:
    """Each row's last token with its guess behind it."""
    counts = np.array([1 + len(guess) for guess in guesses], np.int64)
    token_ids = np.full((len(counts), int(counts.max())), -1, np.int64)
    token_ids[:, 0] = last_token
    for row, guess in enumerate(guesses):
        token_ids[row, 1 : 1 + len(guess)] = guess
    return Feed(token_ids, counts)
