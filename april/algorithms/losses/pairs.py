"""Pair losses: which two samples of a group make a pair, and what a pair costs. All margins are (P,), a value a pair.

With c and j the log-ratios of the chosen and the rejected sample to the reference, summed or averaged over tokens:
delta = c - j, and beta delta is the difference of the implicit rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from april.algorithms.columns import Layout, TokenBatch

Pairs = Literal["best_worst", "all"]


class Margins(NamedTuple):
    """What a pair loss sees.

    Attributes:
        chosen, rejected: log-ratios to the reference (P,); log-probs where there is none.
        score: reward of the chosen minus that of the rejected sample (P,).
    """

    chosen: Tensor
    rejected: Tensor
    score: Tensor

    @property
    def delta(self) -> Tensor:
        """(P,)."""
        return self.chosen - self.rejected


def select(tokens: TokenBatch, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Chosen and rejected samples (P,) of each pair.

    "best_worst": the samples of highest and of lowest reward of each group, where they differ; among
    equals the one that the behaviour policy found likelier, so that the order of samples does not matter.
    "all": every solved with every unsolved sample of its group. Samples without a trained token are left out.
    """
    layout, usable = tokens.layout, _usable(tokens)
    if pairs == "all":
        solved = layout.first(tokens["correct"]) > 0
        same = layout.group_of_sample[:, None] == layout.group_of_sample[None, :]
        found = (same & (solved & usable)[:, None] & (~solved & usable)[None, :]).nonzero()
        return found[:, 0], found[:, 1]
    reward = layout.first(tokens["reward"])
    zeros = torch.zeros_like(tokens["behaviour"])
    likely = layout.sum(torch.where(tokens["mask"], tokens["behaviour"], zeros))
    best, worst = _extreme(reward, usable, likely, layout), _extreme(-reward, usable, likely, layout)
    real = (best >= 0) & (worst >= 0)
    best, worst = best[real], worst[real]
    differ = usable[best] & usable[worst] & (reward[best] > reward[worst])
    return best[differ], worst[differ]


def _usable(tokens: TokenBatch) -> Tensor:
    return tokens.layout.sum(tokens["trained"].to(torch.float64)) > 0


def _extreme(values: Tensor, usable: Tensor, likely: Tensor, layout: Layout) -> Tensor:
    """(G,): the usable sample of each group with its largest value, the likeliest of equals; -1 where there is none."""
    groups, candidate = layout.group_of_sample, usable
    for key in (values, likely.to(values.dtype)):
        left = torch.where(candidate, key, torch.full_like(key, -math.inf))
        largest = left.new_full((layout.num_groups,), -math.inf).scatter_reduce(0, groups, left, "amax")
        candidate = candidate & (left == largest[groups])
    index = torch.arange(layout.num_samples, device=values.device)
    candidates = torch.where(candidate, index, torch.full_like(index, layout.num_samples))
    first = index.new_full((layout.num_groups,), layout.num_samples).scatter_reduce(0, groups, candidates, "amin")
    return torch.where(first < layout.num_samples, first, torch.full_like(first, -1))


def num_pairs(tokens: TokenBatch, pairs: Pairs) -> Tensor:
    """Number of pairs, without listing those of "all"."""
    if pairs == "best_worst":
        return torch.tensor(len(select(tokens, pairs)[0]), dtype=torch.float64, device=tokens.layout.offsets.device)
    layout, usable = tokens.layout, _usable(tokens)
    solved = layout.first(tokens["correct"]) > 0
    right, wrong = (layout.group_sum(chosen.to(torch.float64)) for chosen in (solved & usable, ~solved & usable))
    return (right * wrong).sum()


def dpo(m: Margins, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) log sigmoid(beta delta) - e log sigmoid(-beta delta). Source: Rafailov et al. 2023, arXiv 2305.18290."""
    return -(1 - label_smoothing) * logsigmoid(beta * m.delta) - label_smoothing * logsigmoid(-beta * m.delta)


def robust(m: Margins, *, beta: float, label_smoothing: float = 0.1) -> Tensor:
    """DPO without the bias of flipped labels. Source: Chowdhury et al. 2024, arXiv 2403.00409."""
    e = label_smoothing
    return (-(1 - e) * logsigmoid(beta * m.delta) + e * logsigmoid(-beta * m.delta)) / (1 - 2 * e)


def hinge(m: Margins, *, beta: float) -> Tensor:
    """max(1 - beta delta, 0). Source: SLiC (Zhao et al. 2023, arXiv 2305.10425)."""
    return relu(1 - beta * m.delta)


def ipo(m: Margins, *, beta: float) -> Tensor:
    """(delta - 1 / (2 beta))^2, log-ratios averaged over tokens by default. Source: Azar et al. 2023, arXiv 2310.12036."""
    return (m.delta - 1 / (2 * beta)).square()


def simpo(m: Margins, *, beta: float, margin: float) -> Tensor:
    """-log sigmoid(beta delta - margin) on mean log-probs, without a reference. Source: Meng et al. 2024, arXiv 2405.14734."""
    return -logsigmoid(beta * m.delta - margin)


def nca(m: Margins, *, beta: float) -> Tensor:
    """Pulls the chosen up in absolute terms as well. Source: Chen et al. 2024, arXiv 2402.05369."""
    c, j = beta * m.chosen, beta * m.rejected
    return -logsigmoid(c) - 0.5 * logsigmoid(-c) - 0.5 * logsigmoid(-j)


def bco(m: Margins, *, beta: float, centre: float | None = None) -> Tensor:
    """-log sigmoid(beta c - D) - log sigmoid(D - beta j); D is `centre` or the mean of both over all pairs.

    Source: Jung et al. 2024, arXiv 2404.04656, with the mean of the pairs at hand in place of a running one.
    """
    c, j = beta * m.chosen, beta * m.rejected
    if centre is None:
        centre = float(torch.cat([c, j]).detach().mean()) if len(c) else 0.0
    return -logsigmoid(c - centre) - logsigmoid(centre - j)


def sppo(m: Margins, *, beta: float) -> Tensor:
    """(c - 1 / (2 beta))^2 + (j + 1 / (2 beta))^2. Source: SPPO with hard labels (Wu et al. 2024, arXiv 2405.00675)."""
    return (m.chosen - 0.5 / beta).square() + (m.rejected + 0.5 / beta).square()


def apo_zero(m: Margins, *, beta: float) -> Tensor:
    """1 - sigmoid(beta c) + sigmoid(beta j): chosen up, rejected down. Source: D'Oosterlinck et al. 2024, arXiv 2408.06266."""
    return 1 - torch.sigmoid(beta * m.chosen) + torch.sigmoid(beta * m.rejected)


def apo_down(m: Margins, *, beta: float) -> Tensor:
    """sigmoid(beta c) + 1 - sigmoid(beta delta): both down, the rejected more. Source: arXiv 2408.06266."""
    return torch.sigmoid(beta * m.chosen) + 1 - torch.sigmoid(beta * m.delta)


def exo(m: Margins, *, beta: float, label_smoothing: float = 1e-3) -> Tensor:
    """Reverse KL from the model's preference to the smoothed label. Source: Ji et al. 2024, arXiv 2402.00856."""
    z, e = beta * m.delta, label_smoothing
    return torch.sigmoid(z) * (logsigmoid(z) - math.log(1 - e)) + torch.sigmoid(-z) * (logsigmoid(-z) - math.log(e))


def aot(m: Margins, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO on sorted log-ratios: the distribution of the chosen above that of the rejected. Source: arXiv 2406.05882."""
    return dpo(
        m._replace(chosen=m.chosen.sort().values, rejected=m.rejected.sort().values), beta=beta, label_smoothing=label_smoothing
    )


def discopop(m: Margins, *, beta: float, temperature: float = 0.05) -> Tensor:
    """Logistic and exponential loss, mixed by sigmoid(beta delta / temperature). Source: Lu et al. 2024, arXiv 2406.08414."""
    z = beta * m.delta
    gate = torch.sigmoid(z / temperature)
    return -logsigmoid(z) * (1 - gate) + (-z).exp() * gate


def rpo(
    m: Margins, *, beta: float, eta: float = 1.0, distance: Literal["squared", "backward_kl", "forward_kl"] = "squared"
) -> Tensor:
    """Distance between the implicit margin beta delta and the rewards' margin eta * score; 0 where they agree.

    Source: Sun et al. 2025, arXiv 2502.00203.
    """
    z, target = beta * m.delta, eta * m.score
    if distance == "squared":
        return (z - target).square()
    return _bernoulli_kl(target, z) if distance == "backward_kl" else _bernoulli_kl(z, target)


def _bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """KL between coins of log-odds a and b."""
    return torch.sigmoid(a) * (logsigmoid(a) - logsigmoid(b)) + torch.sigmoid(-a) * (logsigmoid(-a) - logsigmoid(-b))


LOSSES: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (dpo, robust, hinge, ipo, simpo, nca, bco, sppo, apo_zero, apo_down, exo, aot, discopop, rpo)
}
