"""Typed configs of the built-in atoms, one module a slot; importing the package registers them all. No torch."""

from april.algorithms.specs import adjust, advantages, aggregate, filters, losses, penalties, rewards, update, weights

__all__ = ["adjust", "advantages", "aggregate", "filters", "losses", "penalties", "rewards", "update", "weights"]
