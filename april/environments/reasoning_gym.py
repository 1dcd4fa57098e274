"""Any procedural task of reasoning-gym, or a mixture of several."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from april.config.schema import Config
from april.core.errors import RecipeError, nearest
from april.core.random import stream_key, uniforms
from april.core.template import fill
from april.environments.base import Item


class MixturePart(Config):
    """One task of a mixture."""

    name: str = Field(description="Name of a reasoning-gym task.")
    weight: float = Field(1.0, gt=0, description="Share of the items, relative to the other parts.")
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the task's generator.")


class ReasoningGymTask(Config):
    """Problems made by reasoning-gym, judged by their own scorer."""

    type: Literal["reasoning_gym"] = "reasoning_gym"
    name: str | None = Field(None, description='Name of a reasoning-gym task, such as "chain_sum"; or give `mixture`.')
    options: dict[str, Any] = Field(default_factory=dict, description="Options of the task's generator, such as num_terms.")
    mixture: tuple[MixturePart, ...] = Field((), description="Several tasks, drawn by weight; instead of `name`.")
    size: int = Field(1000, ge=1, description="Number of items.")
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of the generator; the same seed gives the same items.")
    gold_template: str = Field("{answer}", description="A completion that earns the full reward, from an item's fields.")

    @model_validator(mode="after")
    def _one_source(self) -> ReasoningGymTask:
        if (self.name is None) == (not self.mixture):
            raise ValueError("give either `name` or `mixture`")
        if self.mixture and self.options:
            raise ValueError("`options` has no effect with `mixture`: each part has its own")
        for part in self.parts():
            if {"size", "seed"} & part.options.keys():
                raise ValueError("`size` and `seed` belong to the task, not to `options`")
        return self

    def parts(self) -> tuple[MixturePart, ...]:
        """The tasks drawn from; one unless this is a mixture."""
        return self.mixture or (MixturePart(name=self.name or "", weight=1.0, options=self.options),)

    def load(self) -> list[Item]:
        """Generate the items: item i of a part is the part's own item number i, whatever the other parts are.

        Raises:
            RecipeError: for an unknown task, or options that its generator refuses.
        """
        parts = self.parts()
        where = [f"task.mixture[{i}]" for i in range(len(parts))] if self.mixture else ["task"]
        datasets = [
            make_dataset(part.name, {"size": self.size, "seed": self.seed, **part.options}, place)
            for part, place in zip(parts, where, strict=True)
        ]
        counts = [0] * len(parts)
        items: list[Item] = []
        for choice in self._choices():
            part, index = parts[choice], counts[choice]
            counts[choice] += 1
            name = f"{part.name}-s{self.seed}-{index}" if len(parts) == 1 else f"{choice}.{part.name}-s{self.seed}-{index}"
            task = {"name": part.name, "options": dict(part.options)}
            items.append({**datasets[choice][index], "id": name, "task": task})
        return items

    def _choices(self) -> list[int]:
        weights = [part.weight for part in self.parts()]
        total = sum(weights)
        edges = [sum(weights[: i + 1]) / total for i in range(len(weights))]
        draws = uniforms([stream_key(self.seed, "mixture")] * self.size, range(self.size))
        return [next((i for i, edge in enumerate(edges[:-1]) if draw < edge), len(edges) - 1) for draw in draws]

    def gold(self, item: Mapping[str, Any]) -> str | None:
        """`gold_template`, filled; None where the generator gives no answer."""
        return None if item.get("answer") is None else fill(self.gold_template, item, "task.gold_template")

    def default_reward(self) -> dict[str, Any]:
        """The task's own scorer."""
        return {"type": "reasoning_gym"}


def task_names() -> list[str]:
    """All tasks of the installed reasoning-gym."""
    import reasoning_gym  # noqa: F401  # fills the table below
    from reasoning_gym.factory import DATASETS

    return sorted(DATASETS)


def make_dataset(name: str, options: Mapping[str, Any], where: str = "task") -> Any:
    """A generator of reasoning-gym.

    Args:
        name: of the task.
        options: fields of its config, `size` and `seed` among them.
        where: recipe path, for messages.

    Raises:
        RecipeError: for an unknown name, an unknown option, or values that the generator refuses.
    """
    names = task_names()
    from reasoning_gym.factory import DATASETS, create_dataset

    if name not in names:
        guess = nearest(name, names)
        hint = guess if guess.startswith("did you mean") else f"one of {len(names)} tasks, such as {', '.join(names[:8])}"
        raise RecipeError(
            "an unknown task of reasoning-gym", where=f"{where}.name", got=name, expected="a task's name", hint=hint
        )
    accepted = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.init]
    for option in options:
        if option not in accepted:
            expected = "one of " + ", ".join(other for other in accepted if other not in ("size", "seed"))
            raise RecipeError(
                f"an unknown option of {name}",
                where=f"{where}.options",
                got=option,
                expected=expected,
                hint=nearest(option, accepted),
            )
    try:
        return create_dataset(name, **options)
    except Exception as error:  # the checks of the generators are asserts and errors of all kinds
        raise RecipeError(
            f"{name} refuses its options",
            where=f"{where}.options",
            got=", ".join(f"{key}={value!r}" for key, value in options.items()),
            expected=str(error).strip() or f"values that its checks accept ({type(error).__name__})",
        ) from error
