"""The registry of atoms: slot -> type name -> (typed config, function). No torch.

An atom is a config class and one function. The function gets what its slot promises, then the config's own fields
as keywords:

    filter      fn(group)                                   -> reason to drop it, or None
    compose     fn(groups)                                  -> groups
    reward      fn(tokens)                                  -> reward_N, or columns to add or replace by name
    advantage   fn(tokens)                                  -> advantage_N, or columns to add or replace by name
    adjust      fn(advantage_N, tokens)                     -> advantage_N, or columns to add or replace by name
    ratio       fn(current_N, proximal_N, tokens)           -> log-ratio_N
    bounds      fn(tokens)                                  -> low_N, high_N
    surrogate   fn(log_ratio_N, current_N, advantage_N, bounds, tokens) -> loss_N, clipped_N
    weights     fn(tokens)                                  -> weight_N, detached
    penalties   fn(current_N, tokens)                       -> loss_N
    aggregate   fn(tokens)                                  -> share_N with loss = sum(share * loss)
    objectives  fn(current_N, tokens)                       -> loss_N; of role "value": fn(value_N, tokens)
    update      fn(work)                                    -> metrics or None; takes the optimiser steps of a batch

`tokens` is an `april.algorithms.columns.TokenBatch`: the whole batch for reward, advantage, adjust and aggregate, and
whole samples of it (a micro-batch) for the rest.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import Field, create_model

from april.config.schema import Config
from april.core.errors import RecipeError, choice, nearest
from april.registry import validate

Scope = Literal["sample", "group", "batch"]

ONE = ("advantage", "ratio", "bounds", "surrogate", "aggregate", "update")
CHAINS = ("filter", "compose", "reward", "adjust")
TABLES = ("weights", "penalties", "objectives")

COLUMNS: dict[str, str] = {
    "token_ids": "int64, the response token",
    "mask": "bool, the policy may be trained here; counts in every denominator",
    "trained": "bool, mask without tokens that are too stale",
    "behaviour": "log-prob under the policy that sampled the token",
    "temperature": "temperature that the token was drawn at",
    "lag": "int64, versions between the token's weights and the batch; 0 where no policy sampled",
    "step": "int64, number of the update",
    "reward": "reward of the token's sample",
    "correct": "1 where the token's sample counts as solved, else 0",
    "finished": "bool, the token's sample ended by itself and not at its token budget",
    "part.*": "a named part of the sample's reward; nan where it has none of that name",
    "item.*": "a number of the prompt's item; nan where it has none of that name",
    "turn": "int64, index of the turn in its sample: what an environment says and what the policy answers",
    "anchor": "int64, the state before the turn; equal states of a group have equal ones",
    "baseline": "mean reward of the greedy members of the token's group, which do not train; nan where there are none",
    "advantage": "credit of the token",
    "proximal": "log-prob under the weights before the update",
    "current": "log-prob under the weights being trained, without gradient",
    "current_entropy": "entropy of the policy being trained; with gradient in the loss, before the update in credit",
    "value": "what the value model expects before the token; before the update",
    "return": "what the value model is trained towards",
    "reference": "log-prob under the frozen reference policy",
    "entropy": "entropy of the sampling distribution, as the engine recorded it; nan where it did not",
    "entropy_score": "normalised log-entropy in [-1, 1], 0 at the pivot; from the adjust `normalised_entropy`",
    "token_reward": "reward given at the token itself, on top of its sample's; from a reward transform or the environment",
}


OPEN_COLUMNS = ("part.", "item.")
"""Columns that the data name: what follows the dot."""


class Info(NamedTuple):
    """What the catalogue says about a built-in atom.

    Attributes:
        paper: source with its section or equation.
        formula: in one line, in the words of the code.
        certainty: "A": numbers of a public implementation are among its golden cases; "B": read in released code or several
            descriptions; "C": reconstructed from an abstract.
        golden: names of its cases among the golden numbers.
    """

    paper: str
    formula: str
    certainty: Literal["A", "B", "C"]
    golden: tuple[str, ...] = ()


class Atom(Config):
    """Base of the configs of all atoms.

    Attributes:
        type: its name.
        requires: columns that its function reads.
        optional: columns that it reads where they are there.
        scope: what its function must see at once, for slots that otherwise get a micro-batch: whole samples; whole groups,
            which then share a micro-batch; or everything that one optimiser step trains, for which it is evaluated once,
            before the first backward pass.
        provides: columns that it adds or replaces for the atoms after it.
        info: what the catalogue says about it.
    """

    requires: ClassVar[frozenset[str]] = frozenset()
    optional: ClassVar[frozenset[str]] = frozenset()
    provides: ClassVar[frozenset[str]] = frozenset()
    scope: ClassVar[Scope] = "sample"
    info: ClassVar[Info | None] = None
    type: str

    @property
    def needs(self) -> frozenset[str]:
        """Columns that its function reads with these options; `requires` unless an option changes it."""
        return self.requires

    @property
    def reads(self) -> frozenset[str]:
        """Columns that it needs, and those that it takes where they are there."""
        return self.needs | self.optional

    @property
    def makes(self) -> frozenset[str]:
        """Columns that it adds or replaces with these options; `provides` unless an option changes it."""
        return self.provides

    @property
    def min_group_size(self) -> int:
        """Members that a group must have for the atom to say anything; above 1 where it compares siblings."""
        return 1

    @property
    def corrects(self) -> bool:
        """Whether, as a ratio, surrogate or weight, it accounts for tokens that older weights sampled."""
        return "behaviour" in self.needs

    @property
    def idle_options(self) -> Mapping[str, str]:
        """Options that have no effect -> the option that makes them so."""
        return {}

    def options(self) -> dict[str, Any]:
        """The keywords of the atom's function."""
        return {name: getattr(self, name) for name in type(self).model_fields if name not in ("type", *self.not_options)}

    not_options: ClassVar[frozenset[str]] = frozenset()


class Siblings(Atom):
    """Base of the atoms that compare the members of a group with each other."""

    @property
    def min_group_size(self) -> int:
        """Two, unless a sample without siblings gets its plain reward."""
        return 1 if getattr(self, "singleton", "zero") == "raw" else 2


class Entry(NamedTuple):
    """A registered atom: its config class and its function, lazily as "module:function" or itself."""

    config: type[Atom]
    function: str | Callable[..., Any]


SLOTS: dict[str, dict[str, Entry]] = {slot: {} for slot in (*ONE, *CHAINS, *TABLES)}


def register(slot: str, name: str, config: type[Atom], function: str | Callable[..., Any]) -> None:
    """Make an atom known under `name`; the way for a loss of one's own in a notebook or a plug-in.

    Raises:
        RecipeError: unknown slot, or the name is taken by another config.
    """
    if slot not in SLOTS:
        raise RecipeError("there is no such slot", where=f"algorithm.{slot}", got=slot, hint=nearest(slot, SLOTS))
    taken = SLOTS[slot].get(name)
    if taken is not None and taken != Entry(config, function):
        raise RecipeError("two atoms have one name", where=f"algorithm.{slot}", got=name, expected="a new name")
    SLOTS[slot][name] = Entry(config, function)


def builtin(slot: str, target: str) -> Callable[[type[Atom]], type[Atom]]:
    """Register a config class under its `type`, with its function as "module:function"."""

    def decorate(config: type[Atom]) -> type[Atom]:
        register(slot, config.model_fields["type"].default, config, target)
        return config

    return decorate


def atom(
    slot: str, name: str, *, requires: frozenset[str] = frozenset(), scope: Scope = "sample"
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a function an atom; its keyword-only parameters become the typed options.

        @april.atom("surrogate", "soft_clip")
        def soft_clip(log_ratio, current, advantage, bounds, tokens, *, width: float = 0.2): ...

    Afterwards a recipe may say `surrogate = { type = "soft_clip", width = 0.1 }`. Registering the name again replaces it,
    as happens when a notebook's cell runs twice.

    Args:
        slot: which part of an algorithm it fills; the module's docstring says what each slot's function gets and returns.
        name: its `type`.
        requires: columns that the trainer must provide.
        scope: what it must see at once, see `Atom`.

    Raises:
        RecipeError: unknown slot, or an option without annotation.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        options: dict[str, Any] = {}
        for option in inspect.signature(function, eval_str=True).parameters.values():
            if option.kind is not option.KEYWORD_ONLY:
                continue
            if option.annotation is option.empty:
                raise RecipeError(
                    "an option needs a type", where=f"{function.__name__}({option.name})", expected="such as width: float = 0.2"
                )
            options[option.name] = (option.annotation, ... if option.default is option.empty else option.default)
        config = create_model(name, __base__=Atom, __doc__=function.__doc__ or name, type=(Literal[name], Field(name)), **options)  # type: ignore[arg-type]
        config.requires, config.scope = frozenset(requires), scope
        if slot in SLOTS:
            SLOTS[slot].pop(name, None)
        register(slot, name, config, function)
        return function

    return decorate


def function_of(slot: str, atom: Atom) -> Callable[..., Any]:
    """The function of an atom; imports its module on first use."""
    function = SLOTS[slot][atom.type].function
    if not isinstance(function, str):
        return function
    module, name = function.split(":")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def role_of(objective: Atom) -> str:
    """The model that an objective trains: "policy" or "value"."""
    return str(getattr(objective, "role", "policy"))


def parse(slot: str, value: object, *, where: str, default_type: str | None = None) -> Atom:
    """The typed config of one atom from recipe data: a config, a type name, or a table with `type`.

    Raises:
        RecipeError: unknown type or key (naming the nearest), or a value that its field refuses.
    """
    if isinstance(value, Atom):
        return value
    data = {"type": value} if isinstance(value, str) else {} if value is True else value
    if not isinstance(data, Mapping):
        raise RecipeError(
            "an atom is a table with a type",
            where=where,
            got=value,
            expected='such as { type = "..." }',
            hint=f"`april list algorithm.{slot}` describes them",
        )
    name = data.get("type", default_type)
    if not isinstance(name, str) or name not in SLOTS[slot]:
        raise RecipeError(
            "unknown type",
            where=f"{where}.type",
            got=name,
            **choice(str(name), SLOTS[slot], f"`april list algorithm.{slot}` describes them"),
        )
    return validate(SLOTS[slot][name].config, {**data, "type": name}, where)  # type: ignore[return-value]
