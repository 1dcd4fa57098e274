"""What a step's data looks like: age, segments, and the length bias of stopping early."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from april.core.group import Batch
from april.core.ids import NO_VERSION


class LengthMeter:
    """Mean length of delivered samples over mean length of issued ones.

    Stopping at the first finished groups delivers short samples first. Issued samples that still run are censored: their
    final length is only known to exceed the present one. The mean over all issued samples is therefore the
    Kaplan-Meier mean (Kaplan and Meier, JASA 1958): S(t) = prod over u <= t of (1 - finished at u / at risk at u), and the mean
    is the sum of S(t) over t >= 0.

    Args:
        max_tokens: the largest possible response.
    """

    def __init__(self, max_tokens: int) -> None:
        self._finished = np.zeros(max_tokens + 1, np.int64)
        self._delivered_tokens = 0
        self._delivered = 0

    def finished(self, num_tokens: int) -> None:
        """A sample ended with this many response tokens."""
        self._finished[num_tokens] += 1

    def delivered(self, num_tokens: int) -> None:
        """A sample was handed to the trainer."""
        self._delivered += 1
        self._delivered_tokens += num_tokens

    @property
    def delivered_mean_tokens(self) -> float:
        """Mean response length of all delivered samples; nan before the first."""
        return self._delivered_tokens / self._delivered if self._delivered else float("nan")

    def issued_mean_tokens(self, open_tokens: npt.ArrayLike) -> float:
        """Kaplan-Meier mean length of all started samples; nan before any finished.

        Args:
            open_tokens: integers (S,), present lengths of the samples that were started and are not finished.
        """
        censored = np.bincount(np.asarray(open_tokens, np.int64), minlength=len(self._finished))
        total = self._finished + censored
        if not self._finished.any():
            return float("nan")
        at_risk = total[::-1].cumsum()[::-1]
        hazard = np.divide(self._finished, at_risk, out=np.zeros(len(total)), where=at_risk > 0)
        survival = np.cumprod(1 - hazard)
        last = int(np.flatnonzero(total)[-1])
        return float(survival[:last].sum())

    def state_dict(self) -> dict[str, object]:
        used = np.flatnonzero(self._finished)
        return {
            "finished": {str(n): int(self._finished[n]) for n in used},
            "delivered": self._delivered,
            "delivered_tokens": self._delivered_tokens,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        self._finished[:] = 0
        for length, count in state["finished"].items():  # type: ignore[attr-defined]
            self._finished[int(length)] = count
        self._delivered, self._delivered_tokens = int(state["delivered"]), int(state["delivered_tokens"])  # type: ignore[call-overload]


def describe_batch(batch: Batch) -> dict[str, float]:
    """Rewards, lengths and ages of a batch's sampled members; lag counts versions at the moment of training, queue time included.

    `stale_token_fraction` is the share of trained tokens (those within `max_token_lag`) with a lag above 0.
    """
    pairs = [pair for group in batch.groups for pair in group.sampled.rewarded]
    lengths = np.array([len(sample) for sample, _ in pairs], np.int64)
    versions = np.concatenate([sample.versions[sample.loss_mask] for sample, _ in pairs] or [np.zeros(0, np.int32)])
    lag = batch.version - versions[versions != NO_VERSION]
    if batch.max_token_lag is not None:
        lag = lag[lag <= batch.max_token_lag]
    out = {
        "num_samples": float(len(pairs)),
        "batch_tokens": float(lengths.sum()),
        "reward_mean": _mean([reward.value for _, reward in pairs]),
        "accuracy": _mean([reward.correct for _, reward in pairs]),
        "segments_mean": _mean([sample.num_segments for sample, _ in pairs]),
        "truncated_fraction": _mean([sample.stop == "length" for sample, _ in pairs]),
        "lag_mean": _mean(lag),
        "stale_token_fraction": _mean(lag > 0),
    }
    if len(lengths):
        out |= {"length_mean": float(lengths.mean()), "length_max": float(lengths.max())}
        out |= {f"length_p{q}": float(np.percentile(lengths, q)) for q in (50, 99)}
    if len(lag):
        out |= {"lag_p95": float(np.percentile(lag, 95)), "lag_max": float(lag.max())}
    return out


def _mean(values: npt.ArrayLike) -> float:
    array = np.asarray(values, np.float64)
    return float(array.mean()) if array.size else float("nan")
