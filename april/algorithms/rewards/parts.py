"""Rewards put together from named parts: judgements, measured run times, costs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from april.algorithms.columns import TokenBatch
from april.algorithms.rewards.values import of_samples


def weighted_parts(tokens: TokenBatch, *, weights: Mapping[str, float], keep: float = 0.0) -> Tensor:
    """R = keep * R + sum of weight * part; a part that a sample lacks counts 0.

    Source: ReEx-SQL (arXiv 2505.12768) with weights format 2, execution 3, exact 1, entity 1, exploration 2.

    Args:
        tokens: needs "reward" and the named columns.
        weights: column -> weight.
        keep: factor of the reward as it was.

    Returns:
        (N,).
    """
    total = keep * tokens.layout.first(tokens["reward"])
    for column, weight in weights.items():
        total = total + weight * of_samples(tokens, column, default=0.0)
    return tokens.layout.spread(total)


def flaw_penalty(
    tokens: TokenBatch, *, right: float = 1.0, wrong: float = -1.0, penalty: float = 1.0, flawed: str = "part.flawed"
) -> Tensor:
    """`right` for sound right answers, `right` - penalty for flawed ones, `wrong` for the rest.

    Source: FAPO (arXiv 2510.22543), equation 6. An answer without a verdict counts as sound.

    Args:
        tokens: needs "reward", "correct".
        right, wrong: rewards.
        penalty: of a right answer that a judge found flawed.
        flawed: column that is above 0.5 where it did.

    Returns:
        (N,).
    """
    correct = tokens.layout.first(tokens["correct"]) > 0.5
    found = of_samples(tokens, flawed, default=0.0) > 0.5
    value = torch.where(found, right - penalty, right).to(tokens["reward"].dtype)
    return tokens.layout.spread(torch.where(correct, value, torch.full_like(value, wrong)))


def cost_discount(
    tokens: TokenBatch, *, base: float = 1.0, price: float = 3.0, max_discount: float = 0.8, cost: str = "part.cost"
) -> Tensor:
    """R = R * (base - min(price * cost, max_discount)): no success, no reward; success is worth less the more it cost.

    Source: xRouter (arXiv 2510.08439).

    Args:
        tokens: needs "reward" and the column of costs.
        base: worth of a success that cost nothing.
        price: of one unit of cost.
        max_discount: largest discount.
        cost: column with each sample's cost.

    Returns:
        (N,).
    """
    discount = (price * of_samples(tokens, cost)).clamp(max=max_discount)
    return tokens["reward"] * tokens.layout.spread(base - discount)


def cost_blend(
    tokens: TokenBatch,
    *,
    cost_fraction: float = 0.5,
    cost: str = "part.cost",
    format_part: str | None = None,
    low_quantile: float = 0.05,
    high_quantile: float = 0.95,
) -> Tensor:
    """R = (R + format) * (1 - a) + a * c where R > 0, R + format elsewhere, -1 for a format error; c in [0, 1] is cheapness.

    Prices are ranked among those of the batch (`cheapness`); the paper's release keeps the last 1,000 calls instead.

    Source: Router-R1 (arXiv 2506.09033).

    Args:
        tokens: needs "reward" and the column of costs.
        cost_fraction: a, the share of the reward that cheapness decides.
        cost: column with each sample's price, not below 0.
        format_part: column that is below 0 for a format error, else added to the reward; without one 0.
        low_quantile, high_quantile: prices that count as free and as most expensive.

    Returns:
        (N,).
    """
    score = tokens.layout.first(tokens["reward"])
    form = torch.zeros_like(score) if format_part is None else of_samples(tokens, format_part, default=0.0)
    prices = of_samples(tokens, cost)
    return tokens.layout.spread(blended(score, form, cheapness(prices, prices, low_quantile, high_quantile), cost_fraction))


def blended(score: Tensor, form: Tensor, cheap: Tensor, cost_fraction: float) -> Tensor:
    """The reward of `cost_blend` (S,) from its three parts (S,)."""
    both = score + form
    reward = torch.where(score > 0, both * (1 - cost_fraction) + cost_fraction * cheap, both)
    return torch.where(form < 0, -torch.ones_like(reward), reward)


def cheapness(prices: Tensor, window: Tensor, low_quantile: float = 0.05, high_quantile: float = 0.95) -> Tensor:
    """1 for the cheapest and 0 for the dearest of a window: linear in the square root of the price between two quantiles.

    Source: Router-R1 (arXiv 2506.09033), its release.

    Args:
        prices: (S,), to be ranked.
        window: (W,), prices to rank among.
        low_quantile, high_quantile: of the window.

    Returns:
        (S,); 0.5 when both quantiles are one price.
    """
    if len(window) == 0:
        return torch.full_like(prices, 0.5)
    ends = torch.quantile(window.sqrt(), prices.new_tensor([low_quantile, high_quantile]))
    span = ends[1] - ends[0]
    if not bool(span > 0):
        return torch.full_like(prices, 0.5)
    return (1 - (prices.sqrt() - ends[0]) / span).clamp(0, 1)


def speed_ladder(
    tokens: TokenBatch,
    *,
    time: str = "part.time_s",
    reference_time: str = "item.reference_time_s",
    cap: float = 1.0,
    failed: float = -0.3,
    runtime_error: float = -0.6,
    compile_error: float = -1.0,
    compiled: str = "part.compiled",
    ran: str = "part.ran",
) -> Tensor:
    """Programs that pass earn 0.5 + 0.5 * min(reference time / time, cap); the others by how far they came.

    Source: ACECode (arXiv 2412.17264); the ladder of failures is reconstructed.

    Args:
        tokens: needs "reward", "correct" and the columns below.
        time: seconds that the sample's program took; read where it passes.
        reference_time: seconds of the reference program.
        cap: largest ratio of speeds that is rewarded.
        failed, runtime_error, compile_error: rewards of programs that give wrong results, stop, or do not start.
        compiled, ran: columns that are 0 where the program did not start, or stopped; 1 where they are missing.

    Returns:
        (N,).
    """
    correct = tokens.layout.first(tokens["correct"]) > 0.5
    taken, reference = of_samples(tokens, time, default=0.0, needed=correct), of_samples(tokens, reference_time)
    ratio = (reference / taken.clamp(min=1e-6)).clamp(max=cap)
    reward = torch.full_like(ratio, failed)
    reward = torch.where(of_samples(tokens, ran, default=1.0) > 0.5, reward, torch.full_like(ratio, runtime_error))
    reward = torch.where(of_samples(tokens, compiled, default=1.0) > 0.5, reward, torch.full_like(ratio, compile_error))
    return tokens.layout.spread(torch.where(correct, 0.5 + 0.5 * ratio, reward))


def improvement(
    tokens: TokenBatch,
    *,
    time: str = "part.time_s",
    baseline_time: str = "item.baseline_time_s",
    baseline_passes: str = "item.baseline_passes",
    format_part: str | None = None,
    improve_weight: float = 0.5,
    format_weight: float = 0.2,
    gain_weight: float = 0.5,
    sharpness: float = 1.0,
    max_time_s: float = 90.0,
) -> Tensor:
    """R = improve_weight * (pass + gain_weight * gain where pass > 0) + format_weight * format, against a baseline program.

    Source: Afterburner (arXiv 2505.23387); see `pass_change` and `speed_gain`.

    Args:
        tokens: needs "reward", "correct" and the columns below.
        time: seconds that the sample's program took; a program that fails counts as `max_time_s`.
        baseline_time: seconds of the program to improve; one that was wrong counts as `max_time_s`, too.
        baseline_passes: 1 where that program was right, else 0.
        format_part: column that is 1 where the format is right; without one it always is.
        improve_weight, format_weight, gain_weight: of the parts.
        sharpness: of the gain.
        max_time_s: longer times count as this.

    Returns:
        (N,).
    """
    correct = tokens.layout.first(tokens["correct"])
    form = torch.ones_like(correct) if format_part is None else of_samples(tokens, format_part, default=0.0)
    right_before, longest = of_samples(tokens, baseline_passes), torch.full_like(correct, max_time_s)
    passed, worked = pass_change(right_before, correct), right_before > 0.5
    before = torch.where(worked, of_samples(tokens, baseline_time, default=max_time_s, needed=worked), longest)
    now = correct > 0.5
    after = torch.where(now, of_samples(tokens, time, default=max_time_s, needed=now), longest)
    gain = speed_gain(before, after, sharpness=sharpness, max_time_s=max_time_s)
    improved = passed + torch.where(passed > 0, gain_weight * gain, torch.zeros_like(gain))
    return tokens.layout.spread(improve_weight * improved + format_weight * form)


def pass_change(before: Tensor, after: Tensor) -> Tensor:
    """(S,): 0.5 both pass, 1 repaired, -1 broken, -0.5 still failing. Source: Afterburner (arXiv 2505.23387)."""
    was, now = before > 0.5, after > 0.5
    right = torch.where(was, 0.5, 1.0)
    return torch.where(now, right, torch.where(was, -1.0, -0.5)).to(after.dtype)


def speed_gain(before_s: Tensor, after_s: Tensor, *, sharpness: float = 1.0, max_time_s: float = 90.0) -> Tensor:
    """tanh(sharpness * relative gain in [-1, 1]) (S,). Source: Afterburner (arXiv 2505.23387)."""
    before, after = before_s.clamp(max=max_time_s), after_s.clamp(max=max_time_s)
    return torch.tanh(sharpness * ((before - after) / before.clamp(min=1e-6)).clamp(-1, 1))
