"""What makes optimiser steps out of a batch: plain, slow-fast, or as many passes as a bandit chooses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist, fmean, pstdev
from typing import Any, Literal

import torch
from torch import Tensor

from april.core.metric import Mean, Metrics
from april.core.random import stream_key, uniforms


@dataclass
class Work:
    """The mini-batches of one batch and how to take an optimiser step on one of them.

    Attributes:
        step: (index of a mini-batch) -> whether the weights moved: gradients of it at the present weights, clipped, and one
            optimiser step; none where the mini-batch has no signal.
        num_parts: mini-batches.
        num_epochs: passes over them that the recipe asks for.
        parameters: the policy's, to be changed in place under `torch.no_grad`.
        index: number of the update in the run, from 0.
        reward_mean: mean reward of the batch as judged.
        entropy: mean of -behaviour log-prob over the batch.
        state: the atom's own memory, kept from batch to batch and saved with the trainer: numbers and lists of them.
        metrics: of each step so far.
    """

    step: Callable[[int], bool]
    num_parts: int = 1
    num_epochs: int = 1
    parameters: Sequence[Tensor] = ()
    index: int = 0
    reward_mean: float = math.nan
    entropy: float = math.nan
    state: dict[str, Any] = field(default_factory=dict)
    metrics: list[Metrics] = field(default_factory=list)

    def epoch(self) -> None:
        """One optimiser step on each mini-batch, in order."""
        for part in range(self.num_parts):
            self.step(part)


def plain(work: Work) -> None:
    """One ordinary optimiser step on each mini-batch, in each epoch."""
    for _ in range(work.num_epochs):
        work.epoch()


def slow_fast(work: Work, *, fast_steps: int = 3, alpha: float = 0.8, window_steps: int = 10, threshold: float = 2.0) -> Metrics:
    """K fast steps on the same mini-batch, back to theta_0 + alpha (theta_K - theta_0), and one slow step from there.

    The entropy of the last `window_steps` batches, this one included, is watched: once it is `threshold` standard deviations
    (population) from their mean, alpha is 0 from the next batch on, for good, and one ordinary step is taken. The
    optimiser's moments advance in all steps.

    Source: SFPO (arXiv 2510.04072), its fast trajectory, repositioning and slow correction.
    """
    off = bool(work.state.get("off", False))
    for _ in range(work.num_epochs):
        for part in range(work.num_parts):
            if not off:
                _fast(work, part, fast_steps, alpha)
            work.step(part)
    history = [*work.state.get("entropies", []), work.entropy][-window_steps:]
    z = entropy_z(history) if len(history) == window_steps else 0.0
    work.state.update(entropies=history, off=off or abs(z) >= threshold)
    return {"reposition_alpha": Mean(0.0 if off else alpha, 1), "entropy_z": Mean(z, 1)}


def _fast(work: Work, part: int, steps: int, alpha: float) -> None:
    start = [parameter.detach().clone() for parameter in work.parameters]
    moved = [work.step(part) for _ in range(steps)]
    if any(moved):
        with torch.no_grad():
            for parameter, before in zip(work.parameters, start, strict=True):
                parameter.copy_(torch.lerp(before, parameter, alpha))


def entropy_z(history: Sequence[float]) -> float:
    """(last - mean) / standard deviation (population) of all of them, the last included; 0 without any spread."""
    spread = pstdev(history)
    return (history[-1] - fmean(history)) / spread if spread > 0 else 0.0


def bandit_epochs(
    work: Work,
    *,
    arms: tuple[int, ...] = (1, 2, 3, 5),
    rule: Literal["ucb", "thompson", "round_robin"] = "ucb",
    exploration: float = 0.2,
    window_trials: int = 10,
    min_trials: int = 2,
    noise: float = 0.05,
    baseline_decay: float = 0.9,
    max_kl: float | None = None,
) -> Metrics:
    """As many passes over the batch as a bandit chooses.

    The reward of a choice is the mean reward of the next batch above its exponential average; one that is not finite counts
    for nothing. After a batch whose largest kl_proximal passed `max_kl`, the smallest number of passes is taken.

    Source: ADEPT (Adaptive Data Exploitation in Deep Reinforcement Learning, arXiv 2501.12620); the reward's centring is
    ours.
    """
    state = work.state
    if len(state.get("trials", arms)) != len(arms):  # the recipe of a continued run has other arms
        state.clear()
    rewards: list[list[float]] = state.setdefault("rewards", [[] for _ in arms])
    trials: list[int] = state.setdefault("trials", [0] * len(arms))
    _credit_last_arm(state, work.reward_mean, window_trials, baseline_decay)
    total = sum(trials)
    if max_kl is not None and state.get("kl", 0.0) > max_kl:
        arm = arms.index(min(arms))
    elif rule == "round_robin" or min(trials) < min_trials:
        arm = trials.index(min(trials)) if rule != "round_robin" else total % len(arms)
    elif rule == "ucb":
        arm = _best(ucb_scores([fmean(r) if r else 0.0 for r in rewards], trials, exploration))
    else:
        arm = _best(thompson_draws(rewards, noise, work.index))
    trials[arm] += 1
    state["arm"] = arm
    for _ in range(arms[arm]):
        work.epoch()
    kls = [metrics["kl_proximal"].value for metrics in work.metrics if "kl_proximal" in metrics]
    state["kl"] = max((kl for kl in kls if math.isfinite(kl)), default=0.0)
    return {"update_epochs": Mean(arms[arm], 1)}


def _credit_last_arm(state: dict[str, Any], reward_mean: float, window_trials: int, decay: float) -> None:
    if not math.isfinite(reward_mean):
        return
    baseline = state.get("baseline")
    if baseline is not None and "arm" in state:
        kept = state["rewards"][state["arm"]]
        kept.append(reward_mean - baseline)
        del kept[:-window_trials]
    state["baseline"] = reward_mean if baseline is None else decay * baseline + (1 - decay) * reward_mean


def ucb_scores(values: Sequence[float], trials: Sequence[int], exploration: float) -> list[float]:
    """Q + c sqrt(ln t / n) of each arm, with t the number of all trials. Source: Auer et al. 2002, UCB1."""
    total = sum(trials)
    return [value + exploration * math.sqrt(math.log(total) / n) for value, n in zip(values, trials, strict=True)]


def thompson_draws(rewards: Sequence[Sequence[float]], noise: float, index: int) -> list[float]:
    """One draw of each arm's mean: Normal(mean, std^2 / n + noise^2), addressed by the number of the update."""
    draws = []
    for arm, seen in enumerate(rewards):
        variance = (pstdev(seen) ** 2 / len(seen) if seen else 0.0) + noise**2
        uniform = float(uniforms(stream_key(index, "bandit"), arm)[0])
        normal = NormalDist().inv_cdf(min(max(uniform, 1e-12), 1 - 1e-12))
        draws.append((fmean(seen) if seen else 0.0) + math.sqrt(variance) * normal)
    return draws


def _best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)
