"""The loss of an algorithm, put together from its atoms in one fixed order.

whole batch       rewards -> advantage -> adjust            `credit`
optimiser step    weights and bounds of scope "batch"       `stage`
                  aggregate -> share of each token          `shares`
micro-batch       log-ratio -> bounds -> surrogate, times weights under the mask, times share, summed
                  plus penalties and objectives with their own coefficient and share     `policy_loss`
                  objectives of the value model             `value_loss`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from april.algorithms.advantages.returns import reward_to_go
from april.algorithms.bind import SHARE, Algorithm
from april.algorithms.columns import TokenBatch
from april.algorithms.losses.ratio import interpolated

__all__ = ["SHARE", "Algorithm", "Loss", "credit", "policy_loss", "shares", "stage", "value_loss"]

LOW, HIGH = "bounds.low", "bounds.high"
"""Columns of bounds that an optimiser step evaluates once."""


@dataclass(frozen=True)
class Loss:
    """The loss of some whole samples and what it was made of; all but `total` detached.

    Attributes:
        total: scalar to differentiate; parts of a batch add up to the batch's loss.
        current, proximal: log-probs (N,).
        log_ratio: (N,).
        clipped: bool (N,), no gradient because of a bound.
        weight: (N,), product of the corrections; before the mask.
        dropped: bool (N,) by the name of each weight that can drop tokens: where it did.
        parts: value of the policy loss and of each term, coefficient included.
    """

    total: Tensor
    current: Tensor
    proximal: Tensor
    log_ratio: Tensor
    clipped: Tensor
    weight: Tensor
    dropped: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, Tensor] = field(default_factory=dict)


def credit(algorithm: Algorithm, tokens: TokenBatch) -> TokenBatch:
    """The batch with its final "reward" and "advantage"; statistics over the whole batch.

    Where an objective reads "return" and no atom has made it, it is the undiscounted Monte-Carlo return.
    """
    for transform in algorithm.rewards:
        tokens = _replaced(tokens, transform(tokens), "reward")
    tokens = _replaced(tokens, algorithm.advantage(tokens), "advantage")
    for adjust in algorithm.adjusts:
        tokens = _replaced(tokens, adjust(tokens["advantage"], tokens), "advantage")
    if "return" in algorithm.live_needs and "return" not in tokens:
        tokens = tokens.with_columns(**{"return": reward_to_go(tokens)})
    return tokens


def _replaced(tokens: TokenBatch, made: Tensor | Mapping[str, Tensor], name: str) -> TokenBatch:
    """The batch with what an atom made: one column, or several by name."""
    return tokens.with_columns(**(made if isinstance(made, Mapping) else {name: made}))


def shares(algorithm: Algorithm, tokens: TokenBatch) -> TokenBatch:
    """The batch with the share columns of all its aggregates; `tokens` is everything one optimiser step trains."""
    return tokens.with_columns(**{name: aggregate(tokens) for name, aggregate in algorithm.aggregates.items()})


def stage(algorithm: Algorithm, tokens: TokenBatch) -> TokenBatch:
    """The batch with everything that an optimiser step evaluates once, over all it trains.

    Args:
        algorithm: the atoms.
        tokens: all samples of the step, with credit and the columns of `Algorithm.staged_needs`.

    Returns:
        With a column for each weight of scope "batch", for bounds of that scope, and with the shares. Where a weight leaves
        the denominator, the tokens that it drops count in no share.
    """
    columns: dict[str, Tensor] = {w.column: w.function(tokens).detach() for w in algorithm.weights if w.staged}
    if algorithm.bounds is not None and algorithm.bounds_staged:
        low, high = algorithm.bounds(tokens)
        columns |= {LOW: low.detach(), HIGH: high.detach()}
    counted = tokens["mask"]
    for weight in algorithm.weights:
        if not weight.in_denominator:
            counted = counted & (columns[weight.column] != 0)
    shared = shares(algorithm, tokens.with_columns(mask=counted))
    return shared.with_columns(mask=tokens["mask"], **columns)


def policy_loss(
    algorithm: Algorithm, current: Tensor, tokens: TokenBatch, *, proximal: Literal["recompute", "interpolate"] = "recompute"
) -> Loss:
    """The loss of whole samples of a batch.

    Args:
        algorithm: the atoms.
        current: log-probs (N,) under the policy being trained, with gradient.
        tokens: micro-batch with credit and shares.
        proximal: what the proximal policy is where there is no such column: the detached current one, or one between it and
            the behaviour policy.

    Returns:
        Its loss. A token outside "trained" adds exactly 0 to value and gradient, whatever its log-prob.
    """
    trained = tokens["trained"]
    current = torch.where(trained, current, current.detach().nan_to_num(0.0, 0.0, 0.0))
    now = current.detach()
    if "proximal" not in tokens:
        between = proximal == "interpolate"
        tokens = tokens.with_columns(proximal=interpolated(tokens["behaviour"], now, tokens["lag"]) if between else now)
    tokens = tokens.with_columns(current=now)
    log_ratio = algorithm.ratio(current, tokens["proximal"], tokens)
    loss, clipped = _surrogate(algorithm, log_ratio, current, tokens)
    weight = torch.ones_like(loss)
    dropped: dict[str, Tensor] = {}
    for each in algorithm.weights:
        factor = tokens[each.column] if each.column in tokens else each.function(tokens).detach()
        weight = weight * factor
        if each.drops:
            dropped[each.name] = (factor == 0) & trained
    parts = {"policy_loss": _total(loss * weight, tokens, SHARE)}
    for term in algorithm.terms:
        parts[f"{term.name}_loss"] = term.coefficient * _total(term.loss(current, tokens), tokens, term.share)
    return Loss(
        total=torch.stack(list(parts.values())).sum(),
        current=now,
        proximal=tokens["proximal"],
        log_ratio=log_ratio.detach(),
        clipped=clipped & trained,
        weight=weight.detach(),
        dropped=dropped,
        parts={name: part.detach() for name, part in parts.items()},
    )


def _surrogate(algorithm: Algorithm, log_ratio: Tensor, current: Tensor, tokens: TokenBatch) -> tuple[Tensor, Tensor]:
    bounds: tuple[Tensor, Tensor] | None = None
    if LOW in tokens:
        bounds = tokens[LOW], tokens[HIGH]
    elif algorithm.bounds is not None:
        low, high = algorithm.bounds(tokens)
        bounds = low.detach(), high.detach()
    return algorithm.surrogate(log_ratio, current, tokens["advantage"], bounds, tokens)


def value_loss(algorithm: Algorithm, predicted: Tensor, tokens: TokenBatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of the value model on whole samples of a batch.

    Args:
        algorithm: the atoms.
        predicted: values (N,) before each token, with gradient.
        tokens: micro-batch with credit, shares, "value" and "return".

    Returns:
        The scalar to differentiate, and each objective's part of it, detached.
    """
    parts = {
        f"{term.name}_loss": term.coefficient * _total(term.loss(predicted, tokens), tokens, term.share)
        for term in algorithm.value_terms
    }
    return torch.stack(list(parts.values())).sum(), {name: part.detach() for name, part in parts.items()}


def _total(loss: Tensor, tokens: TokenBatch, share: str) -> Tensor:
    zero = torch.zeros_like(loss)
    return torch.where(tokens["trained"], loss * tokens[share], zero).sum()
