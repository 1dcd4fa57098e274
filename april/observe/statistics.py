"""Estimates with honest intervals, from few numbers. numpy only; every interval is a 95 % one unless it says otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from april.core.errors import DataError

_T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
"""0.975 quantiles of Student's t for 1 to 30 degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval.

    Attributes:
        value: the point estimate.
        low, high: ends of the interval.
        num: independent observations behind it.
    """

    value: float
    low: float
    high: float
    num: int

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pass_at_k(num_samples: npt.ArrayLike, num_correct: npt.ArrayLike, k: int) -> npt.NDArray[np.float64]:
    """Probability that at least one of k samples is correct, unbiased: 1 - C(n - c, k) / C(n, k).

    Chen et al., "Evaluating Large Language Models Trained on Code" (2021), equation 1.

    Args:
        num_samples: n of each problem (P,), or one n for all.
        num_correct: c of each problem (P,).
        k: samples allowed; at most n.

    Returns:
        float64 (P,); its mean is the pass@k of the set.

    Raises:
        DataError: for k outside 1 to n, or c outside 0 to n.
    """
    correct = np.atleast_1d(np.asarray(num_correct, np.int64))
    total = np.broadcast_to(np.asarray(num_samples, np.int64), correct.shape)
    if k < 1 or (total < k).any():
        raise DataError(
            "pass@k needs at least k samples of each problem", got=f"k = {k}, n = {total.min(initial=0)}", expected="1 <= k <= n"
        )
    if (correct < 0).any() or (correct > total).any():
        raise DataError("more correct samples than samples", got=f"c = {correct.max()}", expected="0 <= c <= n")
    factors = [1.0 - k / np.arange(n - c + 1, n + 1) for n, c in zip(total, correct, strict=True)]
    return np.asarray([1.0 if n - c < k else 1.0 - np.prod(f) for n, c, f in zip(total, correct, factors, strict=True)])


def wilson_interval(num_correct: int, num_total: int, confidence: float = 0.95) -> Estimate:
    """A proportion with the score interval, which stays in [0, 1] and is right for small counts.

    Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Raises:
        DataError: for counts that are no proportion.
    """
    if not 0 <= num_correct <= num_total or num_total == 0:
        raise DataError(
            "counts that are no proportion", got=f"{num_correct} of {num_total}", expected="0 <= correct <= total, total > 0"
        )
    z, n, p = NormalDist().inv_cdf(0.5 + confidence / 2), num_total, num_correct / num_total
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Estimate(p, 0.0 if num_correct == 0 else centre - half, 1.0 if num_correct == n else centre + half, n)


def paired_difference(before: npt.ArrayLike, after: npt.ArrayLike, confidence: float = 0.95) -> Estimate:
    """Mean of after - before over the same problems, with the normal interval.

    For right (1) and wrong (0) the standard error is that of McNemar's table: with b problems lost and c gained,
    sqrt(b + c - (c - b)^2 / n) / n; Agresti, "Categorical Data Analysis" (2013), section 11.1. Where a problem has several
    samples, give its mean: problems, not samples, are the independent observations.

    Args:
        before, after: score of each problem (P,), in the same order.

    Raises:
        DataError: for scores that cannot be paired.
    """
    difference = _paired(before, after)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    mean = float(difference.mean())
    half = z * float(difference.std()) / math.sqrt(len(difference))
    return Estimate(mean, mean - half, mean + half, len(difference))


def _paired(before: npt.ArrayLike, after: npt.ArrayLike) -> npt.NDArray[np.float64]:
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) == 0:
        raise DataError(
            "scores that cannot be paired", got=f"shapes {first.shape} and {second.shape}", expected="both (P,), P > 0"
        )
    return second - first


def mean_interval(values: Sequence[float]) -> Estimate:
    """Mean over runs (seeds) with Student's t interval; unbounded for a single run, which says nothing of the spread.

    Raises:
        DataError: for no values.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or len(numbers) == 0:
        raise DataError("no values to average", got=f"shape {numbers.shape}", expected="(R,), R > 0")
    mean = float(numbers.mean())
    if len(numbers) == 1:
        return Estimate(mean, -math.inf, math.inf, 1)
    half = t_quantile_975(len(numbers) - 1) * float(numbers.std(ddof=1)) / math.sqrt(len(numbers))
    return Estimate(mean, mean - half, mean + half, len(numbers))


def t_quantile_975(degrees: int) -> float:
    """0.975 quantile of Student's t: a table to 30 degrees of freedom, then the first terms of its expansion in 1 / degrees.

    Abramowitz and Stegun, "Handbook of Mathematical Functions" (1964), 26.7.5.

    Raises:
        DataError: for less than one degree of freedom.
    """
    if degrees < 1:
        raise DataError("a t interval needs degrees of freedom", got=degrees, expected="at least 1")
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = NormalDist().inv_cdf(0.975)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / degrees + second / degrees**2
