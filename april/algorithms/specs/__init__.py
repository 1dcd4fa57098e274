"""Typed configs of the built-in atoms, one module a slot; importing the package registers them all. No torch."""

from april.algorithms.specs import (
    adjust,
    adjust_entropy,
    advantages,
    advantages_credit,
    advantages_query,
    aggregate,
    compose,
    filters,
    losses,
    losses_surrogate,
    objectives,
    penalties,
    rewards,
    rewards_parts,
    update,
    weights,
)

__all__ = [
    "adjust",
    "adjust_entropy",
    "advantages",
    "advantages_credit",
    "advantages_query",
    "aggregate",
    "compose",
    "filters",
    "losses",
    "losses_surrogate",
    "objectives",
    "penalties",
    "rewards",
    "rewards_parts",
    "update",
    "weights",
]
