"""How much to roll out: formulas over what is known of a prompt or a response. No torch; nothing here draws or decides.

Each is a pure function of numbers, so that an allocator or an expansion can be tested without a model.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

from april.core.errors import DataError


def whole_rollouts(root_entropy: float, tool_entropy: float, budget: int, *, sharpness: float = 1.0) -> float:
    """How many of a prompt's rollouts start from the prompt; the others branch at tool calls.

    budget * sigmoid(sharpness * (H of the question - mean H after tool calls)): branch where the tools leave more doubt.
    Not rounded: round it and keep it in [1, budget].

    Source: AEPO (arXiv 2510.14545), entropy pre-monitoring; the sharpness is not published.

    Args:
        root_entropy, tool_entropy: mean entropies in nats.
        budget: rollouts of the prompt.
        sharpness: of the sigmoid.
    """
    x = sharpness * (root_entropy - tool_entropy)
    share = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
    return budget * share


def branch_score(base: float, entropy_change: float, consecutive: int, *, weight: float = 0.2, penalty: float = 0.05) -> float:
    """(base + weight * change of entropy) * (1 - penalty * branches in a row): branch where it is at least a threshold (0.5).

    Source: AEPO (arXiv 2510.14545), its release; base is uniform in [0, 1].
    """
    return (base + weight * entropy_change) * (1 - penalty * consecutive)


class ForkCost(NamedTuple):
    """What a tree of forks costs.

    Attributes:
        rollouts: complete responses.
        token_fraction: tokens generated, relative to as many independent responses.
    """

    rollouts: int
    token_fraction: float


def fork_cost(num_roots: int, forks_per_root: int, branches: int) -> ForkCost:
    """Every root is forked at some of its tokens into some branches, on average in its middle.

    Source: ETTRL (arXiv 2508.11356), entropy-fork tree majority rollout.
    """
    children = forks_per_root * branches
    return ForkCost(num_roots * (1 + children), (1 + 0.5 * children) / (1 + children))


def cut_points(length_tokens: int, *, first_fraction: float = 0.25, step_fraction: float = 0.25, extra: int = 2) -> list[int]:
    """Where to cut a reasoning of this length, so that the policy answers from what it has: 1 + extra places inside of it.

    Source: JET (arXiv 2509.23392), two-stage rollout; its fractions are not published.
    """
    cuts = [round(length_tokens * (first_fraction + step * step_fraction)) for step in range(extra + 1)]
    return [cut for cut in cuts if 0 < cut < length_tokens]


def uncertainty_gain(std: float, num_rollouts: int, *, confidence: float = 0.95) -> float:
    """By how much one more rollout narrows the confidence interval of a prompt's mean reward.

    Source: XRPO (arXiv 2510.06672), rollout allocation by Student's t.

    Args:
        std: of the prompt's rewards so far (n - 1).
        num_rollouts: n, at least 2.
        confidence: two-sided.

    Raises:
        DataError: fewer than two rollouts have no standard deviation.
    """
    return half_width(std, num_rollouts, confidence) - half_width(std, num_rollouts + 1, confidence)


def half_width(std: float, num_rollouts: int, confidence: float = 0.95) -> float:
    """t * std / sqrt(n), half of the confidence interval of a mean of n values."""
    if num_rollouts < 2:
        raise DataError("an interval needs two values", where="half_width", got=num_rollouts, expected="2 rollouts or more")
    return student_quantile((1 + confidence) / 2, num_rollouts - 1) * std / math.sqrt(num_rollouts)


def exploration_bonus(num_rollouts: int, total_rollouts: int, *, strength: float = 1.0) -> float:
    """strength * sqrt(log(1 + all rollouts) / rollouts of the prompt). Source: XRPO (arXiv 2510.06672), reconstructed."""
    return strength * math.sqrt(math.log1p(total_rollouts) / num_rollouts)


@cache
def student_quantile(share: float, degrees: int) -> float:
    """Quantile of Student's t distribution with a whole number of degrees of freedom, for shares from 0.5 on; by bisection."""
    low, high = 0.0, 1.0
    while _student_below(high, degrees) < share:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_below(middle, degrees) < share else (low, middle)
    return (low + high) / 2


def _student_below(t: float, degrees: int) -> float:
    """P(T <= t) for t >= 0: the finite series for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term = total = cosine if odd else 1.0
    for k in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not odd:
        return 0.5 + sine * total / 2
    return 0.5 + (angle + (sine * total if degrees > 1 else 0.0)) / math.pi
