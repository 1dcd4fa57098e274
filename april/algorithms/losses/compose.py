"""The loss of an algorithm, put together from its atoms in one fixed order.

whole batch     rewards -> advantage -> adjust            `credit`
                aggregate -> share of each token          `shares`
micro-batch     log-ratio -> bounds -> surrogate, times weights under the mask, times share, summed
                plus penalties and objectives with their own coefficient and share     `policy_loss`
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from april.algorithms.atoms import Atom, function_of
from april.algorithms.columns import TokenBatch
from april.algorithms.spec import AlgorithmConfig

SHARE = "share"


class Term(NamedTuple):
    """A penalty or objective: its formula, its factor and the column that holds its shares."""

    name: str
    loss: Callable[..., Tensor]
    coefficient: float
    share: str


@dataclass(frozen=True)
class Algorithm:
    """The atoms of a config as functions that need no more options."""

    config: AlgorithmConfig
    compose: tuple[Callable[..., Any], ...]
    rewards: tuple[Callable[..., Tensor], ...]
    advantage: Callable[..., Tensor]
    adjusts: tuple[Callable[..., Tensor], ...]
    ratio: Callable[..., Tensor]
    bounds: Callable[..., tuple[Tensor, Tensor]] | None
    surrogate: Callable[..., tuple[Tensor, Tensor]]
    weights: tuple[tuple[str, Callable[..., Tensor]], ...]
    terms: tuple[Term, ...]
    aggregates: dict[str, Callable[..., Tensor]]
    update: Callable[..., None]

    @staticmethod
    def of(config: AlgorithmConfig) -> Algorithm:
        """Look up the function of every atom and bind its options."""
        terms, aggregates = [], {SHARE: _bound("aggregate", config.aggregate)}
        for slot in ("penalties", "objectives"):
            for name, atom in getattr(config, slot).items():
                own = getattr(atom, "aggregate", None)
                share = f"{SHARE}.{slot}.{name}" if own is not None else SHARE
                if own is not None:
                    aggregates[share] = _bound("aggregate", own)
                terms.append(Term(name, _bound(slot, atom), float(getattr(atom, "coefficient", 1.0)), share))
        return Algorithm(
            config=config,
            compose=tuple(_bound("compose", atom) for atom in config.compose),
            rewards=tuple(_bound("reward", atom) for atom in config.reward),
            advantage=_bound("advantage", config.advantage),
            adjusts=tuple(_bound("adjust", atom) for atom in config.adjust),
            ratio=_bound("ratio", config.ratio),
            bounds=None if config.bounds is None else _bound("bounds", config.bounds),
            surrogate=_bound("surrogate", config.surrogate),
            weights=tuple((name, _bound("weights", atom)) for name, atom in config.weights.items()),
            terms=tuple(terms),
            aggregates=aggregates,
            update=_bound("update", config.update),
        )


def _bound(slot: str, atom: Atom) -> Callable[..., Any]:
    return partial(function_of(slot, atom), **atom.options())


@dataclass(frozen=True)
class Loss:
    """The loss of some whole samples and what it was made of; all but `total` detached.

    Attributes:
        total: scalar to differentiate; parts of a batch add up to the batch's loss.
        current, proximal: log-probs (N,).
        log_ratio: (N,).
        clipped: bool (N,), no gradient because of a bound.
        weight: (N,), product of the corrections; before the mask.
        parts: value of the policy loss and of each term, coefficient included.
    """

    total: Tensor
    current: Tensor
    proximal: Tensor
    log_ratio: Tensor
    clipped: Tensor
    weight: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def credit(algorithm: Algorithm, tokens: TokenBatch) -> TokenBatch:
    """The batch with its final "reward" and "advantage"; statistics over the whole batch."""
    for transform in algorithm.rewards:
        tokens = tokens.with_columns(reward=transform(tokens))
    advantage = algorithm.advantage(tokens)
    for adjust in algorithm.adjusts:
        advantage = adjust(advantage, tokens)
    return tokens.with_columns(advantage=advantage)


def shares(algorithm: Algorithm, tokens: TokenBatch) -> TokenBatch:
    """The batch with the share columns of all its aggregates; `tokens` is everything one optimiser step trains."""
    return tokens.with_columns(**{name: aggregate(tokens) for name, aggregate in algorithm.aggregates.items()})


def policy_loss(algorithm: Algorithm, current: Tensor, tokens: TokenBatch) -> Loss:
    """The loss of whole samples of a batch.

    Args:
        algorithm: the atoms.
        current: log-probs (N,) under the policy being trained, with gradient.
        tokens: micro-batch with credit and shares; without "proximal" the detached current policy is proximal.

    Returns:
        Its loss. A token outside "trained" adds exactly 0 to value and gradient, whatever its log-prob.
    """
    trained = tokens["trained"]
    current = torch.where(trained, current, current.detach().nan_to_num(0.0, 0.0, 0.0))
    if "proximal" not in tokens:
        tokens = tokens.with_columns(proximal=current.detach())
    proximal = tokens["proximal"]
    log_ratio = algorithm.ratio(current, proximal, tokens)
    bounds = None if algorithm.bounds is None else algorithm.bounds(tokens)
    loss, clipped = algorithm.surrogate(log_ratio, current, tokens["advantage"], bounds)
    weight = torch.ones_like(loss)
    for _, correction in algorithm.weights:
        weight = weight * correction(tokens).detach()
    parts = {"policy_loss": _total(loss * weight, tokens, SHARE)}
    for term in algorithm.terms:
        parts[f"{term.name}_loss"] = term.coefficient * _total(term.loss(current, tokens), tokens, term.share)
    return Loss(
        total=torch.stack(list(parts.values())).sum(),
        current=current.detach(),
        proximal=proximal,
        log_ratio=log_ratio.detach(),
        clipped=clipped & trained,
        weight=weight.detach(),
        parts={name: part.detach() for name, part in parts.items()},
    )


def _total(loss: Tensor, tokens: TokenBatch, share: str) -> Tensor:
    zero = torch.zeros_like(loss)
    return torch.where(tokens["trained"], loss * tokens[share], zero).sum()
