"""How tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from april.core.errors import DataError


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """Sampling parameters, frozen with a sample when it is first issued.

    Attributes:
        max_new_tokens: response tokens allowed in total, over all segments of the sample.
        temperature: divides the logits; 0 means greedy (the log-prob of a greedy token is 0).
        top_p: smallest set of tokens whose mass reaches this; 1 keeps all.
        top_k: number of most likely tokens kept; 0 keeps all.
        stop_token_ids: a sample ends (reason "eos") with the first of these, which stays in the response.
        stop_strings: a sample ends (reason "stop") with the token that completes one of these.
        entropy: whether the entropy (nats) of each sampling distribution is recorded.
        seed: root of the sample's random stream.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    entropy: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1"),
            (self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (all) or more"),
            (all(self.stop_strings), "stop_strings", self.stop_strings, "no empty string"),
        )
        for holds, name, got, expected in checks:
            if not holds:
                raise DataError("a sampling parameter is out of range", where=f"sampling.{name}", got=got, expected=expected)

    @property
    def truncates(self) -> bool:
        """Whether top-p or top-k can remove tokens from the distribution."""
        return self.top_p < 1 or self.top_k > 0
