"""How long responses are, from those that have finished: one running sum, and a few questions."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(slots=True)
class LengthSums:
    """Sums over finished samples; differences of two of them describe what finished in between.

    Attributes:
        samples: how many finished.
        tokens: their response tokens.
        squares: sum of squared response lengths.
        prompt_tokens: tokens of their prompts.
    """

    samples: int = 0
    tokens: int = 0
    squares: int = 0
    prompt_tokens: int = 0

    def add(self, num_tokens: int, num_prompt_tokens: int) -> None:
        """A sample ended."""
        self.samples += 1
        self.tokens += num_tokens
        self.squares += num_tokens * num_tokens
        self.prompt_tokens += num_prompt_tokens

    @property
    def resident_tokens(self) -> float:
        """Context (prompt and response) that a sample holds on average while it runs; nan before the first has finished.

        With places that are refilled as they empty, a running sample of length L is met with probability proportional to L
        and is on average half way: E[L^2] / (2 E[L]) response tokens (the mean age of a renewal process), plus its prompt.
        """
        if not self.samples or not self.tokens:
            return float("nan")
        return self.squares / (2 * self.tokens) + self.prompt_tokens / self.samples

    def to_dict(self) -> dict[str, int]:
        """For checkpoints."""
        return asdict(self)
