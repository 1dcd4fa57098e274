"""An algorithm as a whole: one typed atom per slot. No torch: listing and checking stay instant.

A slot is filled by a table with a `type`; ordered chains are arrays of such tables; weights, penalties and objectives
are tables by name, where the name is the default type and `false` takes an inherited part away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from april.algorithms import specs
from april.algorithms.atoms import CHAINS, ONE, SLOTS, TABLES, Atom, parse, register
from april.algorithms.specs.advantages import GroupRelative
from april.algorithms.specs.aggregate import SequenceMean
from april.algorithms.specs.losses import ConstantBounds, TokenRatio
from april.algorithms.specs.losses_surrogate import Clip
from april.algorithms.specs.update import PlainUpdate
from april.config.schema import Config
from april.core.errors import RecipeError

__all__ = ["CHAINS", "ONE", "SLOTS", "TABLES", "AlgorithmConfig", "Atom", "register", "specs"]


class AlgorithmConfig(Config):
    """An algorithm: one atom per slot. The defaults are GRPO without a correction weight."""

    filter: tuple[SerializeAsAny[Atom], ...] = Field((), description="which complete groups train, in order")
    compose: tuple[SerializeAsAny[Atom], ...] = Field((), description="changes to the groups of a batch, in order")
    reward: tuple[SerializeAsAny[Atom], ...] = Field((), description="changes to the rewards of a batch, in order")
    advantage: SerializeAsAny[Atom] = Field(GroupRelative(), description="credit of each token")
    adjust: tuple[SerializeAsAny[Atom], ...] = Field((), description="changes to the credit, in order")
    ratio: SerializeAsAny[Atom] = Field(TokenRatio(), description="current over proximal policy")
    bounds: SerializeAsAny[Atom] | None = Field(
        ConstantBounds(), description="bounds of the ratio; false for surrogates that have none"
    )
    surrogate: SerializeAsAny[Atom] = Field(Clip(), description="the loss of a token")
    weights: dict[str, SerializeAsAny[Atom]] = Field({}, description="corrections and masks, multiplied")
    penalties: dict[str, SerializeAsAny[Atom]] = Field({}, description="terms added after the weights")
    aggregate: SerializeAsAny[Atom] = Field(SequenceMean(), description="how tokens add up to one loss")
    objectives: dict[str, SerializeAsAny[Atom]] = Field({}, description="further losses")
    update: SerializeAsAny[Atom] = Field(PlainUpdate(), description="what wraps the optimiser step")

    @field_validator(*ONE, mode="before")
    @classmethod
    def _one(cls, value: object, info: ValidationInfo) -> object:
        slot = str(info.field_name)
        if slot == "bounds" and (value is None or value is False):
            return None
        return parse(slot, value, where=f"algorithm.{slot}")

    @field_validator(*CHAINS, mode="before")
    @classmethod
    def _chain(cls, value: object, info: ValidationInfo) -> object:
        slot = str(info.field_name)
        if not isinstance(value, list | tuple):
            raise RecipeError(
                "a chain is an array of tables",
                where=f"algorithm.{slot}",
                got=value,
                expected='[{ type = "..." }]',
                hint=f"`april list algorithm.{slot}` describes what may be in it",
            )
        return tuple(parse(slot, item, where=f"algorithm.{slot}[{index}]") for index, item in enumerate(value))

    @field_validator(*TABLES, mode="before")
    @classmethod
    def _table(cls, value: object, info: ValidationInfo) -> object:
        slot = str(info.field_name)
        if not isinstance(value, Mapping):
            raise RecipeError(
                "parts are given by name",
                where=f"algorithm.{slot}",
                got=value,
                expected="{ name = { ... } }",
                hint=f"`april list algorithm.{slot}` describes what may be in it",
            )
        kept = {name: item for name, item in value.items() if item is not False and item is not None}
        return {name: parse(slot, item, where=f"algorithm.{slot}.{name}", default_type=str(name)) for name, item in kept.items()}

    def atoms(self) -> Iterator[tuple[str, Atom]]:
        """All atoms with their recipe paths below `algorithm`."""
        for slot in type(self).model_fields:
            value: Any = getattr(self, slot)
            if isinstance(value, Atom):
                yield slot, value
            elif isinstance(value, tuple):
                yield from ((f"{slot}[{index}]", item) for index, item in enumerate(value))
            elif isinstance(value, dict):
                yield from ((f"{slot}.{name}", item) for name, item in value.items())

    @property
    def requires(self) -> frozenset[str]:
        """Columns that the atoms read."""
        return frozenset().union(*(atom.needs for _, atom in self.atoms()))
