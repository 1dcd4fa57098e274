"""Names of components: kind -> name -> where its config and its builder live. Nothing is imported before it is used.

Third parties add to it with entry points of the group `april.<kind>` ("name = module:ConfigClass"), where the config class has
an attribute `builder: ClassVar[str] = "module:attr"`; in a notebook, `register` does the same.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from april.config.refusal import SEE_LIST, refusal
from april.config.schema import Config
from april.core.errors import RecipeError, choice


@dataclass(frozen=True, slots=True)
class Component:
    """Where a component lives: its typed config, and what builds it from the config (both "module:attr")."""

    config: str | type[Config]
    builder: str | Callable[..., Any]


KINDS: dict[str, dict[str, Component]] = {
    "schedule": {
        "sync": Component("april.rollout.schedules.sync:SyncConfig", "april.rollout.schedules.sync:SyncSchedule"),
        "april": Component("april.rollout.schedules.april:AprilConfig", "april.rollout.schedules.april:AprilSchedule"),
        "delayed": Component("april.rollout.schedules.delayed:DelayedConfig", "april.rollout.schedules.delayed:DelayedSchedule"),
        "one_step": Component(
            "april.rollout.schedules.one_step:OneStepConfig", "april.rollout.schedules.one_step:OneStepSchedule"
        ),
        "bounded_async": Component(
            "april.rollout.schedules.bounded_async:BoundedAsyncConfig",
            "april.rollout.schedules.bounded_async:BoundedAsyncSchedule",
        ),
        "token_budget": Component(
            "april.rollout.schedules.token_budget:TokenBudgetConfig", "april.rollout.schedules.token_budget:TokenBudgetSchedule"
        ),
        "replicated": Component(
            "april.rollout.schedules.replicated:ReplicatedConfig", "april.rollout.schedules.replicated:ReplicatedSchedule"
        ),
        "truncated": Component(
            "april.rollout.schedules.truncated:TruncatedConfig", "april.rollout.schedules.truncated:TruncatedSchedule"
        ),
        "windowed": Component(
            "april.rollout.schedules.windowed:WindowedConfig", "april.rollout.schedules.windowed:WindowedSchedule"
        ),
        "tail_batching": Component(
            "april.rollout.schedules.tail_batching:TailBatchingConfig",
            "april.rollout.schedules.tail_batching:TailBatchingSchedule",
        ),
        "multi_version": Component(
            "april.rollout.schedules.multi_version:MultiVersionConfig",
            "april.rollout.schedules.multi_version:MultiVersionSchedule",
        ),
        "rolling": Component("april.rollout.schedules.rolling:RollingConfig", "april.rollout.schedules.rolling:RollingSchedule"),
        "longest_first": Component(
            "april.rollout.schedules.longest_first:LongestFirstConfig",
            "april.rollout.schedules.longest_first:LongestFirstSchedule",
        ),
    },
    "watch": {
        "length_budgets": Component(
            "april.rollout.watches.length_budgets:LengthBudgetsConfig", "april.rollout.watches.length_budgets:LengthBudgets"
        ),
        "early_cut": Component("april.rollout.watches.early_cut:EarlyCutConfig", "april.rollout.watches.early_cut:EarlyCut"),
    },
    "engine": {
        "embedded": Component("april.engines.embedded.config:EmbeddedConfig", "april.engines.embedded.engine:EmbeddedEngine"),
        "vllm": Component("april.engines.vllm.config:VllmConfig", "april.engines.vllm.engine:VllmEngine"),
        "vllm_server": Component("april.engines.vllm.config:VllmServerConfig", "april.engines.vllm.server:VllmServerEngine"),
    },
    "task": {
        "reasoning_gym": Component(
            "april.environments.reasoning_gym:ReasoningGymTask", "april.environments.reasoning_gym:ReasoningGymTask"
        ),
        "jsonl": Component("april.environments.jsonl:JsonlTask", "april.environments.jsonl:JsonlTask"),
        "items": Component("april.environments.items:ItemsTask", "april.environments.items:ItemsTask"),
    },
    "reward": {
        "reasoning_gym": Component("april.rewards.reasoning_gym:ReasoningGymReward", "april.rewards.build:build_reward"),
        "math": Component("april.rewards.math_answer:MathReward", "april.rewards.build:build_reward"),
        "exact": Component("april.rewards.exact:ExactReward", "april.rewards.build:build_reward"),
        "python": Component("april.rewards.python:PythonReward", "april.rewards.build:build_reward"),
        "combine": Component("april.rewards.combine:CombinedReward", "april.rewards.build:build_reward"),
        "judge": Component("april.rewards.generative:JudgeReward", "april.rewards.build:build_reward"),
        "flaw_check": Component("april.rewards.flaws:FlawCheckReward", "april.rewards.build:build_reward"),
        "error_step": Component("april.rewards.flaws:ErrorStepReward", "april.rewards.build:build_reward"),
        "tool_trace": Component("april.rewards.traces:ToolTraceReward", "april.rewards.build:build_reward"),
        "workflow": Component("april.rewards.workflow:WorkflowReward", "april.rewards.build:build_reward"),
        "meta_prediction": Component("april.rewards.meta:MetaPredictionReward", "april.rewards.build:build_reward"),
        "patterns": Component("april.rewards.patterns:PatternsReward", "april.rewards.build:build_reward"),
        "program": Component("april.rewards.program:ProgramReward", "april.rewards.build:build_reward"),
        "sql": Component("april.rewards.sql:SqlReward", "april.rewards.build:build_reward"),
    },
}


def register(kind: str, name: str, config: type[Config], builder: str | Callable[..., Any]) -> None:
    """Make a component known under a new name.

    Raises:
        RecipeError: for an unknown kind, or a name that is taken by something else.
    """
    table = _table(kind)
    component = Component(config, builder)
    if name in table and table[name] != component:
        raise RecipeError("two components have one name", where=kind, got=name, expected="a new name")
    table[name] = component


def config_class(kind: str, name: object, where: str) -> type[Config]:
    """The typed config of a component.

    Raises:
        RecipeError: for a name that nobody registered; names the nearest one.
    """
    component = _find(kind, name, where)
    loaded = load(component.config)
    return loaded  # type: ignore[no-any-return]


def builder(kind: str, name: str) -> Callable[..., Any]:
    """What builds a component from its config."""
    component = _find(kind, name, kind)
    return load(component.builder)  # type: ignore[no-any-return]


def names(kind: str) -> list[str]:
    """All known names of a kind."""
    _load_entry_points(kind)
    return sorted(_table(kind))


def load(target: Any) -> Any:
    """The object that "module:attr" names; anything else is returned as it is."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def parse(kind: str, value: object, where: str) -> Config:
    """The typed config of a component from recipe data: a config, a name, or a table with `type`.

    Raises:
        RecipeError: unknown type or key (naming the nearest), or a value that its field refuses.
    """
    if isinstance(value, Config):
        return value
    data = {"type": value} if isinstance(value, str) else value
    if not isinstance(data, Mapping) or "type" not in data:
        raise RecipeError(
            f"a {kind} is a table with a type",
            where=where,
            got=value,
            expected=f"type = one of {', '.join(names(kind))}",
            hint=f"`april list {kind}` describes them",
        )
    model = config_class(kind, data["type"], f"{where}.type")
    return validate(model, data, where)


def validate(model: type[Config], data: object, where: str) -> Config:
    """Validate recipe data, turning pydantic's findings into one-screen errors."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise refusal(error, model, data, where) from None


def _table(kind: str) -> dict[str, Component]:
    if kind not in KINDS:
        raise RecipeError("there is no such kind of component", got=kind, **choice(kind, KINDS, SEE_LIST))
    return KINDS[kind]


def _find(kind: str, name: object, where: str) -> Component:
    table = _table(kind)
    if isinstance(name, str) and name not in table:
        _load_entry_points(kind)
    if not isinstance(name, str) or name not in table:
        raise RecipeError(
            f"unknown {kind}", where=where, got=name, **choice(str(name), table, f"`april list {kind}` describes them")
        )
    return table[name]


def _load_entry_points(kind: str) -> None:
    table = _table(kind)
    for point in importlib.metadata.entry_points(group=f"april.{kind}"):
        package = point.dist.name if point.dist else "an unknown package"
        if point.name in table:
            if table[point.name].config != point.value:
                raise RecipeError(
                    "two components have one name",
                    where=f"april.{kind}",
                    got=f"{point.name} of {package}",
                    expected="a new name",
                    hint=f"remove or update the package {package}",
                )
            continue
        try:
            build = point.load().builder
        except Exception as error:  # a stranger's module may raise anything while it is imported
            raise RecipeError(
                "a plug-in cannot be used",
                where=f"{package}: april.{kind} {point.name}",
                got=f"{type(error).__name__}: {error}",
                expected=f"a config class at {point.value}, with an attribute `builder`",
                hint=f"repair, update or remove the package {package}",
            ) from error
        table[point.name] = Component(point.value, build)
