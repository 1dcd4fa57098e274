"""An algorithm as functions: every atom of a config with its options bound, and what each stage of a step must know of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

from torch import Tensor

from april.algorithms.atoms import Atom, Scope, function_of, role_of
from april.algorithms.spec import AlgorithmConfig

SHARE = "share"
"""Column of each token's share in the loss; a term with an aggregate of its own adds its slot and name."""
_UNITS: tuple[Scope, ...] = ("sample", "group", "batch")


class Term(NamedTuple):
    """A penalty or objective: its formula, its factor, the column that holds its shares, and the model that it trains."""

    name: str
    loss: Callable[..., Tensor]
    coefficient: float
    share: str
    role: str = "policy"


class Weight(NamedTuple):
    """A correction: its formula, whether it is evaluated once an optimiser step, and whether tokens that it drops still count."""

    name: str
    function: Callable[..., Tensor]
    staged: bool = False
    in_denominator: bool = True
    drops: bool = False

    @property
    def column(self) -> str:
        """Where its values are kept when it is staged."""
        return f"weight.{self.name}"


@dataclass(frozen=True)
class Algorithm:
    """The atoms of a config as functions that need no more options."""

    config: AlgorithmConfig
    compose: tuple[Callable[..., Any], ...]
    rewards: tuple[Callable[..., Any], ...]
    advantage: Callable[..., Any]
    adjusts: tuple[Callable[..., Any], ...]
    ratio: Callable[..., Tensor]
    bounds: Callable[..., tuple[Tensor, Tensor]] | None
    surrogate: Callable[..., tuple[Tensor, Tensor]]
    weights: tuple[Weight, ...]
    terms: tuple[Term, ...]
    value_terms: tuple[Term, ...]
    aggregates: dict[str, Callable[..., Tensor]]
    update: Callable[..., Any]

    @staticmethod
    def of(config: AlgorithmConfig) -> Algorithm:
        """Look up the function of every atom and bind its options."""
        terms, aggregates = _terms(config)
        return Algorithm(
            config=config,
            compose=tuple(_bound("compose", atom) for atom in config.compose),
            rewards=tuple(_bound("reward", atom) for atom in config.reward),
            advantage=_bound("advantage", config.advantage),
            adjusts=tuple(_bound("adjust", atom) for atom in config.adjust),
            ratio=_bound("ratio", config.ratio),
            bounds=None if config.bounds is None else _bound("bounds", config.bounds),
            surrogate=_bound("surrogate", config.surrogate),
            weights=tuple(_weight(name, atom) for name, atom in config.weights.items()),
            terms=tuple(term for term in terms if term.role != "value"),
            value_terms=tuple(term for term in terms if term.role == "value"),
            aggregates=aggregates,
            update=_bound("update", config.update),
        )

    @property
    def bounds_staged(self) -> bool:
        """Whether the bounds are evaluated once an optimiser step."""
        return self.config.bounds is not None and self.config.bounds.scope == "batch"

    @cached_property
    def unit(self) -> Scope:
        """What a micro-batch must hold whole: samples, groups, or everything that an optimiser step trains."""
        config = self.config
        live: list[Atom] = [config.ratio, config.surrogate, *config.penalties.values()]
        live += [atom for atom in config.objectives.values() if role_of(atom) != "value"]
        kept = [atom for atom in (config.bounds, *config.weights.values()) if atom is not None and atom.scope != "batch"]
        return max((atom.scope for atom in [*live, *kept]), key=_UNITS.index)

    @property
    def whole_groups(self) -> bool:
        """Whether a micro-batch must hold whole groups."""
        return self.unit != "sample"

    @property
    def zero_without_advantage(self) -> bool:
        """Whether a sample whose tokens all have advantage 0 is sure to get no gradient; only a surrogate that says so is."""
        return not self.terms and bool(getattr(self.config.surrogate, "zero_without_advantage", False))

    @property
    def reads_values(self) -> bool:
        """Whether an atom reads what a value model expects."""
        return "value" in self.config.requires

    @cached_property
    def credit_needs(self) -> frozenset[str]:
        """Columns that must be there before any credit is given."""
        return _needs([*self.config.reward, self.config.advantage, *self.config.adjust])

    @cached_property
    def staged_needs(self) -> frozenset[str]:
        """Columns that must be there before the first backward pass of an optimiser step."""
        staged = [self.config.weights[weight.name] for weight in self.weights if weight.staged]
        staged += [self.config.bounds] if self.config.bounds is not None and self.bounds_staged else []
        return _needs([*staged, self.config.aggregate])

    @cached_property
    def live_needs(self) -> frozenset[str]:
        """Columns that the loss of a micro-batch reads."""
        config = self.config
        live = [config.ratio, config.bounds, config.surrogate, *config.weights.values(), *config.penalties.values()]
        return _needs([atom for atom in [*live, *config.objectives.values()] if atom is not None])


def _needs(atoms: Iterable[Atom]) -> frozenset[str]:
    return frozenset().union(*(atom.needs for atom in atoms))


def _bound(slot: str, atom: Atom) -> Callable[..., Any]:
    return partial(function_of(slot, atom), **atom.options())


def _weight(name: str, atom: Atom) -> Weight:
    counts = bool(getattr(atom, "in_denominator", True))
    drops, staged = hasattr(atom, "in_denominator"), atom.scope == "batch" or not counts
    return Weight(name, _bound("weights", atom), staged=staged, in_denominator=counts, drops=drops)


def _terms(config: AlgorithmConfig) -> tuple[list[Term], dict[str, Callable[..., Tensor]]]:
    """Penalties and objectives, and every aggregate by the column that holds its shares."""
    terms, aggregates = [], {SHARE: _bound("aggregate", config.aggregate)}
    for slot in ("penalties", "objectives"):
        for name, atom in getattr(config, slot).items():
            own = getattr(atom, "aggregate", None)
            share = f"{SHARE}.{slot}.{name}" if own is not None else SHARE
            if own is not None:
                aggregates[share] = _bound("aggregate", own)
            terms.append(Term(name, _bound(slot, atom), float(getattr(atom, "coefficient", 1.0)), share, role_of(atom)))
    return terms, aggregates
