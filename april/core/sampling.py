"""How tokens are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from april.core.errors import DataError

SMALLEST_ENTROPY = 1e-8
"""Below it a distribution is certain; keeps logarithms finite."""


@dataclass(frozen=True, slots=True)
class AdaptiveTemperature:
    """A temperature for each token, by the entropy H of its distribution at the base temperature.

    Attributes:
        strength: largest relative change, in [0, 1).
        pivot: log H (H in nats) at which nothing changes.
        scale_above, scale_below: what a unit of log H above and below the pivot changes, in units of `strength`.
    """

    strength: float
    pivot: float
    scale_above: float
    scale_below: float

    def __post_init__(self) -> None:
        if not (0 <= self.strength < 1 and self.scale_above >= 0 and self.scale_below >= 0):
            raise DataError("an adaptive temperature is out of range", got=self, expected="0 <= strength < 1 and scales >= 0")

    def factors(self, entropies: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.float64]:
        """Temperature over base temperature for tokens of these entropies (T,); 1 where the entropy is unknown (nan)."""
        wide = entropies.astype(np.float64)
        logs = np.log(np.maximum(np.where(np.isnan(wide), 1.0, wide), SMALLEST_ENTROPY))
        found = temperature_factor(logs - self.pivot, self.strength, self.scale_above, self.scale_below)
        return np.where(np.isnan(wide), 1.0, found)


def temperature_factor(z: Any, strength: Any, scale_above: Any, scale_below: Any) -> Any:
    """1 + strength * clip(z * scale, -1, 1), scale_above where z > 0 and scale_below elsewhere: numpy arrays or tensors.

    Source: HAPO (arXiv 2509.16591), adaptive temperature: an uncertain token is drawn hotter, a certain one colder.

    Args:
        z: log entropy minus its pivot.
        strength: largest relative change.
        scale_above, scale_below: not negative, so that a low entropy lowers the temperature.
    """
    above = z > 0
    return 1 + strength * (z * (above * scale_above + ~above * scale_below)).clip(-1, 1)


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
        entropy: whether the entropy (nats) of each sampling distribution is recorded; with `adaptive` that of the
            distribution at the base temperature, from which each token's own temperature follows.
        seed: root of the sample's random stream.
        adaptive: gives each token a temperature of its own around `temperature`; needs `entropy`. Greedy samples ignore it.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    entropy: bool = False
    seed: int = 0
    adaptive: AdaptiveTemperature | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1"),
            (self.temperature >= 0, "temperature", self.temperature, "0 (greedy) or more"),
            (0 < self.top_p <= 1, "top_p", self.top_p, "in (0, 1]"),
            (self.top_k >= 0, "top_k", self.top_k, "0 (all) or more"),
            (all(self.stop_strings), "stop_strings", self.stop_strings, "no empty string"),
            (self.adaptive is None or self.entropy, "entropy", self.entropy, "true, as sampling.adaptive needs it"),
        )
        for holds, name, got, expected in checks:
            if not holds:
                raise DataError("a sampling parameter is out of range", where=f"sampling.{name}", got=got, expected=expected)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken, always."""
        return self.temperature <= 0

    @property
    def truncates(self) -> bool:
        """Whether top-p or top-k can remove tokens from the distribution."""
        return self.top_p < 1 or self.top_k > 0
