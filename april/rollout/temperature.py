"""How each token's temperature follows its entropy: measured on one batch, for the samples issued next."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from april.core.group import Group
from april.core.sampling import SMALLEST_ENTROPY, AdaptiveTemperature


@dataclass(frozen=True, slots=True)
class TemperatureRule:
    """Token-level temperatures of HAPO (arXiv 2509.16591).

    The log entropies of a batch give the pivot, where the temperature stays, and the most and the least uncertain token, where
    it changes by `strength`. Samples that are issued before the first batch have one temperature for all tokens.

    Attributes:
        strength: largest relative change; 0 for none.
        quantile: share of the tokens that are less uncertain than the pivot.
    """

    strength: float = 0.0
    quantile: float = 0.8

    def measured(self, groups: Iterable[Group]) -> AdaptiveTemperature | None:
        """What samples issued after these groups are drawn with; None where no entropies were recorded, or without strength."""
        if not self.strength:
            return None
        found = [
            sample.entropies[sample.loss_mask] for group in groups for sample, _ in group.rewarded if sample.entropies is not None
        ]
        entropies = np.concatenate(found).astype(np.float64) if found else np.zeros(0)
        logs = np.log(np.maximum(entropies[~np.isnan(entropies)], SMALLEST_ENTROPY))
        if not len(logs):
            return None
        pivot = float(np.quantile(logs, self.quantile, method="inverted_cdf"))
        above, below = float(logs.max()) - pivot, pivot - float(logs.min())
        return AdaptiveTemperature(self.strength, pivot, 1 / above if above > 0 else 0.0, 1 / below if below > 0 else 0.0)
