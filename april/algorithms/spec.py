"""Typed configs of all built-in atoms, and of an algorithm as a whole. No torch: listing and checking stay instant.

A slot is filled by a table with a `type`; ordered chains are arrays of such tables; weights, penalties and objectives
are tables by name, where the name is the default type and `false` takes an inherited part away.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from april.algorithms.atoms import CHAINS, ONE, SLOTS, TABLES, Atom, parse, register
from april.config.schema import Config
from april.core.errors import RecipeError

__all__ = ["CHAINS", "ONE", "SLOTS", "TABLES", "AlgorithmConfig", "Atom", "register"]


class ZeroVariance(Atom):
    """Drop groups whose members all agree: they give no group-relative gradient (DAPO dynamic sampling)."""

    type: Literal["zero_variance"] = "zero_variance"
    by: Literal["correct", "reward"] = Field("correct", description="what must differ: solved or not, or the reward itself")


class Overlong(Atom):
    """Linear penalty on responses near the length limit (DAPO soft overlong punishment)."""

    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    type: Literal["overlong"] = "overlong"
    max_tokens: int = Field(gt=0, description="response tokens at which the penalty reaches `factor`")
    buffer_tokens: int = Field(gt=0, description="the penalty starts this many tokens before max_tokens")
    factor: float = Field(1.0, ge=0, description="penalty at max_tokens and beyond")

    @model_validator(mode="after")
    def _buffer_fits(self) -> Overlong:
        if self.buffer_tokens > self.max_tokens:
            raise RecipeError(
                "the buffer is longer than the limit",
                where="algorithm.reward.overlong: buffer_tokens, max_tokens",
                got=f"{self.buffer_tokens} > {self.max_tokens}",
            )
        return self


class GroupRelative(Atom):
    """Reward minus the group's mean, over its standard deviation (GRPO; `std = "none"`: Dr.GRPO)."""

    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    type: Literal["group"] = "group"
    std: Literal["sample", "population", "none"] = Field(
        default="sample", description="scale: standard deviation with n - 1, with n, or none"
    )
    eps: float = Field(default=1e-6, ge=0, description="added to the standard deviation")


class LeaveOneOut(Atom):
    """Reward minus the mean of the siblings (RLOO)."""

    requires: ClassVar[frozenset[str]] = frozenset({"reward"})
    type: Literal["leave_one_out"] = "leave_one_out"


class Whiten(Atom):
    """Zero mean and unit variance over all maskable tokens of the batch (REINFORCE++)."""

    type: Literal["whiten"] = "whiten"
    eps: float = Field(1e-8, ge=0, description="added to the variance")
    shift: bool = Field(True, description="subtract the mean; false only scales")


class TokenRatio(Atom):
    """Current over proximal probability, token by token."""

    requires: ClassVar[frozenset[str]] = frozenset({"proximal"})
    type: Literal["token"] = "token"


class SequenceRatio(Atom):
    """Geometric mean of the token ratios of a sample, with the gradient of each token kept (GSPO)."""

    requires: ClassVar[frozenset[str]] = frozenset({"proximal"})
    type: Literal["sequence"] = "sequence"


class ConstantBounds(Atom):
    """Fixed bounds of the ratio."""

    type: Literal["constant"] = "constant"
    low: float = Field(
        default=0.8, ge=0, le=1, description="smallest ratio that still gives a gradient when the advantage is negative"
    )
    high: float = Field(default=1.2, ge=1, description="largest ratio that still gives a gradient when the advantage is positive")


class Clip(Atom):
    """PPO's clipped surrogate: the larger of -A r and -A clip(r, low, high)."""

    requires: ClassVar[frozenset[str]] = frozenset({"advantage"})
    type: Literal["clip"] = "clip"
    dual_clip: float | None = Field(default=None, gt=1, description="bound on the loss of a negative advantage, in units of |A|")


class Plain(Atom):
    """The policy gradient itself, -A log p; no ratio and no bounds (REINFORCE)."""

    requires: ClassVar[frozenset[str]] = frozenset({"advantage"})
    type: Literal["plain"] = "plain"


class Truncated(Atom):
    """Truncated importance sampling from the sampler to the proximal policy: min(w, cap)."""

    requires: ClassVar[frozenset[str]] = frozenset({"behaviour", "proximal"})
    type: Literal["tis"] = "tis"
    cap: float = Field(2.0, gt=0, description="largest weight of a token")
    low: float = Field(0.0, ge=0, description="smallest weight of a token")
    level: Literal["token", "sequence"] = Field("token", description="weight of each token, or the product over its sample")


class Mask(Atom):
    """Weights outside the band drop to 0, others stay (IcePop; MIS): denominators keep the original tokens."""

    requires: ClassVar[frozenset[str]] = frozenset({"behaviour", "proximal"})
    type: Literal["mask"] = "mask"
    low: float = Field(0.5, ge=0, description="smallest weight that is kept")
    high: float = Field(5.0, gt=0, description="largest weight that is kept")
    level: Literal["token", "sequence_mean"] = Field(
        "token", description="what is compared: the token's weight, or its sample's geometric mean"
    )


class Term(Atom):
    """Base of additive terms: own coefficient and, where given, own aggregate."""

    not_options: ClassVar[frozenset[str]] = frozenset({"coefficient", "aggregate"})
    coefficient: float = Field(1.0, ge=0, description="factor of the term")
    aggregate: SerializeAsAny[Atom] | None = Field(None, description="how its tokens add up; the algorithm's own when left out")

    @field_validator("aggregate", mode="before")
    @classmethod
    def _aggregate(cls, value: object) -> object:
        return None if value is None or value is False else parse("aggregate", value, where="aggregate")


class K3(Term):
    """Penalty on the divergence from the reference: exp(-d) + d - 1 with d = current - reference."""

    requires: ClassVar[frozenset[str]] = frozenset({"reference"})
    type: Literal["k3"] = "k3"
    coefficient: float = Field(0.001, ge=0, description="factor of the penalty")


class K2(Term):
    """Penalty on the divergence from the reference: d^2 / 2, whose gradient is that of the divergence itself."""

    requires: ClassVar[frozenset[str]] = frozenset({"reference"})
    type: Literal["k2"] = "k2"
    coefficient: float = Field(0.001, ge=0, description="factor of the penalty")


class TokenMean(Atom):
    """Every token of the batch counts the same (DAPO)."""

    type: Literal["token_mean"] = "token_mean"


class SequenceMean(Atom):
    """Every sample counts the same, whatever its length (GRPO)."""

    type: Literal["sequence_mean"] = "sequence_mean"


class SequenceSum(Atom):
    """Mean over samples of the sum over their tokens (REINFORCE on whole responses, RLOO)."""

    type: Literal["sequence_sum"] = "sequence_sum"


class FixedLength(Atom):
    """Sum over tokens / (samples * constant): no length bias (Dr.GRPO)."""

    type: Literal["fixed_length"] = "fixed_length"
    constant: int = Field(gt=0, description="tokens; a fixed number such as the token budget, never a measured length")


class PlainUpdate(Atom):
    """One ordinary optimiser step."""

    type: Literal["plain"] = "plain"


def _register_builtin() -> None:
    here, losses = "april.algorithms", "april.algorithms.losses"
    builtin: tuple[tuple[str, type[Atom], str], ...] = (
        ("filter", ZeroVariance, f"{here}.filters:zero_variance"),
        ("reward", Overlong, f"{here}.rewards:overlong"),
        ("advantage", GroupRelative, f"{here}.advantages.group:group_relative"),
        ("advantage", LeaveOneOut, f"{here}.advantages.group:leave_one_out"),
        ("adjust", Whiten, f"{here}.advantages.adjust:whiten"),
        ("ratio", TokenRatio, f"{losses}.ratio:token"),
        ("ratio", SequenceRatio, f"{losses}.ratio:sequence"),
        ("bounds", ConstantBounds, f"{losses}.bounds:constant"),
        ("surrogate", Clip, f"{losses}.surrogate:clip"),
        ("surrogate", Plain, f"{losses}.surrogate:plain"),
        ("weights", Truncated, f"{losses}.weights:truncated"),
        ("weights", Mask, f"{losses}.weights:masked"),
        ("penalties", K3, f"{losses}.penalties:k3"),
        ("penalties", K2, f"{losses}.penalties:k2"),
        ("aggregate", TokenMean, f"{losses}.aggregate:token_mean"),
        ("aggregate", SequenceMean, f"{losses}.aggregate:sequence_mean"),
        ("aggregate", SequenceSum, f"{losses}.aggregate:sequence_sum"),
        ("aggregate", FixedLength, f"{losses}.aggregate:fixed_length"),
        ("update", PlainUpdate, f"{here}.update:plain"),
    )
    for slot, config, target in builtin:
        register(slot, config.model_fields["type"].default, config, target)


_register_builtin()


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
                "a chain is an array of tables", where=f"algorithm.{slot}", got=value, expected='[{ type = "..." }]'
            )
        return tuple(parse(slot, item, where=f"algorithm.{slot}[{index}]") for index, item in enumerate(value))

    @field_validator(*TABLES, mode="before")
    @classmethod
    def _table(cls, value: object, info: ValidationInfo) -> object:
        slot = str(info.field_name)
        if not isinstance(value, Mapping):
            raise RecipeError("parts are given by name", where=f"algorithm.{slot}", got=value, expected="{ name = { ... } }")
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
        return frozenset().union(*(atom.requires for _, atom in self.atoms()))
